"""The few shapes that the charts are drawn with, as SVG text. Same calls, same bytes.

Colours, dashes and sizes of letters are the style sheet's: shapes carry classes. `c0` … `c7` choose a variant's colour,
`d0` … its dash, and each variant has a shape as well, so that nothing is told by colour alone.
"""

import math
from collections.abc import Iterable
from html import escape

from halfbyte.compare.page.document import Svg
from halfbyte.compare.page.text import clean, number, plain

WIDE, NARROW = 840.0, 340.0
"""Units of a chart for a page, and of one for a phone or for one of several beside each other."""
COLOURS, DASHES = 8, 5
SIZE, SMALL = 12.5, 11.5
"""Font sizes as the style sheet has them."""

_SHAPES = (
    "M{l} 0a{r} {r} 0 1 0 {d} 0a{r} {r} 0 1 0 -{d} 0z",  # circle
    "M-{s} -{s}H{s}V{s}H-{s}z",  # square
    "M0 -{t}L{t} {s}H-{t}z",  # triangle
    "M0 -{t}L{t} 0L0 {t}L-{t} 0z",  # diamond
    "M0 {t}L{t} -{s}H-{t}z",  # triangle on its point
    "M-{q} -{t}H{q}V-{q}H{t}V{q}H{q}V{t}H-{q}V{q}H-{t}V-{q}H-{q}z",  # plus
    "M-{t} -{q}H{t}V{q}H-{t}z",  # bar
)


def n(value: float) -> str:
    """A coordinate: one decimal at most."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


def colour(index: int) -> str:
    """The style classes of the variant at this place in the report: its colour and dash."""
    return f"c{index % COLOURS} d{index % DASHES}"


def shape(index: int, radius: float = 5.0) -> str:
    """The path of a variant's mark around 0, 0. With 7 shapes and 8 colours, 56 variants look different."""
    r = radius
    sizes = {"r": r, "l": -r, "d": 2 * r, "s": 0.9 * r, "t": 1.25 * r, "q": 0.45 * r}
    return _SHAPES[index % len(_SHAPES)].format(**{name: n(value) for name, value in sizes.items()})


class Canvas:
    """Collects shapes; `svg()` is what they are together."""

    def __init__(self, width: float) -> None:
        self.width = width
        self.parts: list[str] = []

    def svg(self, height: float) -> Svg:
        return Svg(self.width, math.ceil(height), "".join(self.parts))

    def text(self, x: float, y: float, text: str, style: str = "", anchor: str = "start", more: str = "") -> None:
        """A line of text; `more` stands softer after it."""
        attributes = f' class="{style}"' if style else ""
        attributes += f' text-anchor="{anchor}"' if anchor != "start" else ""
        tail = f' <tspan class="tick" dx="4">{escape(clean(more))}</tspan>' if more else ""
        self.parts.append(f'<text x="{n(x)}" y="{n(y)}"{attributes}>{escape(clean(text))}{tail}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        self.parts.append(f'<path class="{style}" d="M{n(x1)} {n(y1)}L{n(x2)} {n(y2)}"/>')

    def rect(self, x: float, y: float, width: float, height: float, style: str) -> None:
        size = f'width="{n(max(width, 0))}" height="{n(max(height, 0))}"'
        self.parts.append(f'<rect class="{style}" x="{n(x)}" y="{n(y)}" {size}/>')

    def path(self, points: Iterable[tuple[float, float]], style: str, closed: bool = False) -> None:
        d = "L".join(f"{n(x)} {n(y)}" for x, y in points)
        self.parts.append(f'<path class="{style}" d="M{d}{"z" if closed else ""}"/>')

    def mark(self, x: float, y: float, index: int, style: str = "mark", radius: float = 5.0) -> None:
        self.parts.append(
            f'<path class="{style} {colour(index)}" transform="translate({n(x)} {n(y)})" d="{shape(index, radius)}"/>'
        )

    def dot(self, x: float, y: float, radius: float, style: str) -> None:
        self.parts.append(f'<circle class="{style}" cx="{n(x)}" cy="{n(y)}" r="{n(radius)}"/>')


class Axis:
    """Values from `low` to `high` laid out between two coordinates, with room to spare and round ticks."""

    def __init__(self, values: Iterable[float], start: float, end: float, ticks: int, pad: float = 0.06) -> None:
        known = list(values)
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        if high - low <= max(1e-12 * max(abs(low), abs(high)), 1e-30):
            reach = abs(low) * 0.05 if abs(low) > 1e-20 else 1.0
            low, high = low - reach, high + reach
        else:
            room = (high - low) * pad
            low, high = (low - room if low else low), (high + room if high else high)
        self.low, self.high, self.start, self.end = low, high, start, end
        self.ticks, self.decimals = round_values(low, high, ticks)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        return number(tick, self.decimals)


class LogAxis(Axis):
    """Positive values by their logarithm, ticks at 1, 2 and 5 times powers of ten; what lies beyond is at an end."""

    def __init__(self, values: Iterable[float], start: float, end: float, ticks: int) -> None:
        known = [value for value in values if value > 0]
        self.low, self.high, self.start, self.end = min(known) / 1.15, max(known) * 1.15, start, end
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if len(powers) <= ticks - 1 else (1,)
        places = [step * 10.0**power for power in powers for step in steps]
        self.ticks = [place for place in places if self.low <= place <= self.high]

    def at(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return self.start + math.log(inside / self.low) / math.log(self.high / self.low) * (self.end - self.start)

    def label(self, tick: float) -> str:
        return plain(tick)


def round_values(low: float, high: float, count: int) -> tuple[list[float], int]:
    """At most about `count` round numbers from low to high, and the decimals that they need."""
    rough = (high - low) / max(count, 1)
    power = math.floor(math.log10(rough))
    step, extra = next(
        (s * 10.0**power, d)
        for s, d in ((1, 0), (2, 0), (2.5, 1), (5, 0), (10, -1))
        if s * 10.0**power >= rough * 0.999
    )
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)], max(extra - power, 0)
