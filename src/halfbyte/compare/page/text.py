"""Numbers and names as the pages print them.

    scale = scale_for("bytes", [2.1e9, 0.8e9])       Scale("GB", 1e9): one unit for a whole column
    scale.digits(figures)                            decimals for all: two digits of an interval's half
    number(2.1, 2), clean(name), width(name, 13)

1 GB is 10⁹ bytes. Thousands are parted by narrow no-break spaces; the minus is a minus.
"""

import math
import re
import statistics
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, takewhile

from halfbyte.compare.schema import Figure, Interval, Unit

NOT_MEASURED = "not measured"
THIN, NBSP, MINUS, DASH = "\u202f", "\u00a0", "\u2212", "\u2013"
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1f\x85\u2028\u2029]+")
_JOINERS = "\u200d\u200c"  # format characters that words and emoji are spelled with

_BYTES = (("GB", 1e9, 0.5), ("MB", 1e6, 0.5), ("kB", 1e3, 0.5), ("bytes", 1.0, 0.0))
_SECONDS = (("h", 3600.0, 2.0), ("min", 60.0, 2.0), ("s", 1.0, 0.5), ("ms", 1e-3, 0.0))
_COUNT = (("million", 1e6, 1.0), ("", 1.0, 0.0))
_JOULES = (("MJ", 1e6, 1.0), ("kJ", 1e3, 1.0), ("J", 1.0, 0.0))
"""Units by size: name, how many of the base unit, and how much of it there has to be for it to read well."""


def clean(text: str) -> str:
    """`text` without what cannot be printed (control characters, half surrogates, reversals of direction); tabs and
    ends of lines become spaces."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_printable(char) for char in _BREAKS.sub(" ", text))


def clean_lines(text: str) -> str:
    """As `clean`, but lines stay lines: for commands."""
    return "\n".join(clean(line.expandtabs(4)) for line in text.replace("\r\n", "\n").split("\n"))


def _printable(char: str) -> str:
    return "\ufffd" if unicodedata.category(char) in _UNPRINTABLE and char not in _JOINERS else char


def width(text: str, size: float) -> float:
    """About how wide `text` is at this font size: rather too wide than too narrow, in any sans-serif."""
    return sum(map(_ems, text)) * size


@cache
def _ems(char: str) -> float:
    if char in " .,:;il|'!()[]jtfrI":
        return 0.42
    if char in "mwMW%@—…" or ord(char) > 0x2E7F or unicodedata.east_asian_width(char) in "WF":
        return 1.05
    return 0.8 if char.isupper() else 0.66


def fitted(text: str, size: float, room: float) -> str:
    """`text`, cut with an ellipsis where it is wider than `room`."""
    if len(text) * 1.05 * size <= room or width(text, size) <= room:
        return text
    reach = accumulate(_ems(char) * size for char in text)
    kept = sum(1 for _ in takewhile(lambda end: end + width("…", size) <= room, reach))
    return text[:kept].rstrip() + "…"


def wrapped(text: str, size: float, room: float, lines: int) -> list[str]:
    """`text` broken between words into at most `lines` lines of width `room`; the last is cut where more is left."""
    out: list[str] = []
    words = text.split(" ")
    while words:
        line = words.pop(0)
        last = len(out) == lines - 1
        while words and (last or width(f"{line} {words[0]}", size) <= room):
            line = f"{line} {words.pop(0)}"
        out.append(fitted(line, size, room))
    return out


def number(value: float, decimals: int) -> str:
    """`value` with this many decimals (negative: rounded to tens, hundreds, …)."""
    rounded = round(value, decimals)
    text = f"{abs(rounded):,.{max(decimals, 0)}f}".replace(",", THIN)
    return (MINUS if rounded < 0 else "") + text


def significant(value: float, digits: int = 3) -> int:
    """Decimals that show this many digits of `value`."""
    if value == 0 or not math.isfinite(value):
        return 0
    return min(digits - 1 - math.floor(math.log10(abs(value))), 9)


def plain(value: float, digits: int = 3) -> str:
    """One number by itself: integers whole, others with at most so many digits."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return number(value, 0)
    if abs(value) < 1e-3 or abs(value) >= 1e12:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", MINUS, 1 if value < 0 else 0)
    text = number(value, max(significant(value, digits), 0))
    return text.rstrip("0").rstrip(".") if "." in text else text


def capital(text: str) -> str:
    """`text` as a heading begins: with a capital, unless its first word has one elsewhere (mAP)."""
    first = text.split(" ")[0]
    return text[:1].upper() + text[1:] if first.islower() else text


@dataclass(frozen=True)
class Scale:
    """A unit to print in: its name ("" for none), and how many of the base unit it is."""

    suffix: str
    factor: float = 1.0

    def titled(self, label: str) -> str:
        """A heading, with the unit unless the label has it already."""
        said = f"({self.suffix})" in label or (self.suffix == "tokens/s" and "tokens" in label.lower())
        return capital(label) if said or not self.suffix else f"{capital(label)}, {self.suffix}"

    def digits(self, values: Iterable[Figure | Interval | float | None]) -> int:
        """Decimals for a column: two digits of the typical interval's half, but no more than five of the typical value;
        without intervals three of the typical value."""
        known = [value for value in values if value is not None]
        halves = [half for value in known if (half := _half(value) / self.factor) > 0]
        means = [abs(_mean(value)) / self.factor for value in known if _mean(value)]
        if halves:
            most = significant(statistics.median(means), 5) if means else 5
            return _clamped(min(significant(statistics.median(halves), 2), max(most, 0)))
        if not means or all(float(mean).is_integer() for mean in means):
            return 0
        return _clamped(significant(statistics.median(means), 4 if self.suffix == "" else 3))

    def number(self, value: float, decimals: int) -> str:
        return number(value / self.factor, decimals)

    def text(self, value: float, decimals: int | None = None) -> str:
        """A number with its unit, to stand in a sentence or beside a mark."""
        digits = self.digits([value]) if decimals is None else decimals
        unit = f"{NBSP}{self.suffix}" if self.suffix else ""
        return self.number(value, digits) + unit

    def interval(self, low: float | None, high: float | None, decimals: int) -> str:
        """ "1.2 to 1.4", or nothing where there is no interval or both ends read the same."""
        if low is None or high is None:
            return ""
        ends = self.number(low, decimals), self.number(high, decimals)
        return "" if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _clamped(decimals: int) -> int:
    return min(max(decimals, 0), 5)


def _mean(value: Figure | Interval | float) -> float:
    return value.mean if isinstance(value, Figure | Interval) else value


def _half(value: Figure | Interval | float) -> float:
    if not isinstance(value, Figure | Interval) or value.low is None or value.high is None:
        return 0.0
    return abs(value.high / 2 - value.low / 2)


def scale_for(unit: Unit, values: Iterable[float], currency: str = "") -> Scale:
    """The unit in which numbers of `unit`, from the smallest to the largest of `values`, read best."""
    sizes = [abs(value) for value in values if value]
    typical = math.sqrt(min(sizes)) * math.sqrt(max(sizes)) if sizes else 0.0
    if unit == "bytes":
        return _largest(_BYTES, typical)
    if unit == "seconds":
        return _largest(_SECONDS, typical) if typical else Scale("s")
    if unit == "joules":
        return _largest(_JOULES, typical)
    if unit in ("count", "supervised tokens"):
        return _largest(_COUNT, min(sizes, default=0.0))
    if unit == "share":
        return Scale("%", 0.01)
    return {"tokens/s": Scale("tokens/s"), "money": Scale(clean(currency)), "loss": Scale("")}[unit]


def _largest(steps: Sequence[tuple[str, float, float]], typical: float) -> Scale:
    """The largest unit of which there is enough."""
    return next(Scale(suffix, factor) for suffix, factor, enough in steps if typical >= enough * factor)
