"""Charts with a row for each thing: a point with its interval, a band with what was measured in it, a stack of parts.

On a page a row's name stands left of the plot and its words right of it; on a phone both stand above it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from halfbyte.compare.page.document import Svg
from halfbyte.compare.page.svg import NARROW, SIZE, SMALL, WIDE, Axis, Canvas
from halfbyte.compare.page.text import fitted, width, wrapped


@dataclass(frozen=True)
class Row:
    """In the chart's unit. `words` say what the row shows and `more` how sure it is; `band` is a range drawn behind it,
    `parts` are stacked."""

    label: str
    words: str
    mark: int | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: Sequence[float] = ()
    band: tuple[float, float] | None = None
    parts: Sequence[tuple[int, float]] = ()
    more: str = ""

    def extent(self) -> list[float]:
        ends = [self.value, self.low, self.high, *self.seeds, *(self.band or ())]
        return [end for end in ends if end is not None] + ([sum(size for _, size in self.parts)] if self.parts else [])

    def told(self) -> str:
        """The row in words."""
        return f"{self.label}: {self.words}" + (f" ({self.more})" if self.more else "")


def told(rows: Sequence[Row]) -> str:
    """A chart in words, for who does not see it."""
    return "; ".join(row.told() for row in rows) + "."


@dataclass(frozen=True)
class _Layout:
    """The plot's edges, a row's height, where in it the marks are, and the room for words.

    On a page words have a column of their own. On a phone they end the name's line where all rows' fit there, else they
    are up to three lines below it.
    """

    width: float
    left: float
    right: float
    height: float
    middle: float
    wide: bool
    words: float
    below: bool

    @classmethod
    def of(cls, rows: Sequence[Row], wide: bool) -> "_Layout":
        if wide:
            label = min(max((width(row.label, SIZE) for row in rows), default=0) + 34, 220)
            words = min(max((_said(row) for row in rows), default=0) + 24, 290)
            lines = max((len(wrapped(row.words, SIZE, words - 18, 3)) for row in rows), default=0)
            height = max(34, 15 * lines + 6)
            return cls(WIDE, label, WIDE - words, height, height / 2, True, words - 18, False)
        below = any(width(row.label, SIZE) + width(row.words, SIZE) > NARROW - 34 for row in rows)
        lines = max((len(wrapped(row.words, SIZE, NARROW, 3)) for row in rows), default=0) if below else 0
        text = 22 + 15 * lines
        return cls(NARROW, 8, NARROW - 8, text + 30, text + 13, False, NARROW, below)


def _said(row: Row) -> float:
    return width(row.words, SIZE) + (8 + width(row.more, SMALL) if row.more else 0)


def points(rows: Sequence[Row], axis_title: str, wide: bool = False, zero: bool = False) -> Svg:
    """A mark for each value over its 95 % interval, small dots for the seeds, bands behind. `zero`: a line at zero."""
    return _chart(rows, axis_title, wide, zero, _draw_point)


def stacks(rows: Sequence[Row], axis_title: str, wide: bool = False) -> Svg:
    """Bars of parts from zero on, lettered as in the legend, with a line where the value was measured."""
    return _chart(rows, axis_title, wide, True, _draw_stack)


def _chart(
    rows: Sequence[Row], axis_title: str, wide: bool, zero: bool, draw: Callable[[Canvas, Axis, Row, float], None]
) -> Svg:
    place = _Layout.of(rows, wide)
    canvas = Canvas(place.width)
    extent = [end for row in rows for end in row.extent()] + ([0.0] if zero else [])
    axis = Axis(extent, place.left, place.right, 5 if wide else 4)
    bottom = 6 + place.height * len(rows)
    for i, row in enumerate(rows):
        top = 6 + i * place.height
        reach = (top, top + place.height) if wide else (top + place.middle - 13, top + place.middle + 13)
        for tick in axis.ticks:
            style = "zero" if zero and abs(tick) < 1e-9 * (axis.high - axis.low) else "grid"
            canvas.line(axis.at(tick), reach[0], axis.at(tick), reach[1], style)
        _name(canvas, place, row, top)
        draw(canvas, axis, row, top + place.middle)
    for tick in axis.ticks:
        half = width(axis.label(tick), SMALL) / 2
        x = min(max(axis.at(tick), half), canvas.width - half)
        canvas.text(x, bottom + 15, axis.label(tick), "tick", "middle")
    titles = wrapped(axis_title, SMALL, place.right, 2)
    for i, line in enumerate(titles):
        canvas.text(place.right, bottom + 31 + 14 * i, line, "tick", "end")
    return canvas.svg(bottom + 24 + 14 * len(titles))


def _name(canvas: Canvas, place: _Layout, row: Row, top: float) -> None:
    """The row's mark, name and words."""
    indent = 16.0 if row.mark is not None else 0.0
    y = top + place.middle if place.wide else top + 11
    if row.mark is not None:
        canvas.mark(7, y, row.mark, "mark", 4.5)
    if place.wide:
        canvas.text(indent, y + 4, fitted(row.label, SIZE, place.left - indent - 14), "label")
        lines = [row.words] if row.more else wrapped(row.words, SIZE, place.words, 3)
        for i, line in enumerate(lines):
            canvas.text(place.right + 18, y + 4 + (i - (len(lines) - 1) / 2) * 14.5, line, more=row.more)
        return
    room = place.width - indent - (0 if place.below else width(row.words, SIZE) + 8)
    canvas.text(indent, top + 15, fitted(row.label, SIZE, room), "label")
    if not place.below:
        fits = indent + width(row.label, SIZE) + _said(row) + 8 <= place.width
        canvas.text(place.width, top + 15, row.words, "", "end", more=row.more if fits else "")
        return
    for i, line in enumerate(wrapped(row.words, SIZE, place.width, 3)):
        canvas.text(0, top + 31 + 15 * i, line)


def _draw_point(canvas: Canvas, axis: Axis, row: Row, y: float) -> None:
    if row.band is not None:
        start, end = axis.at(row.band[0]), axis.at(row.band[1])
        canvas.rect(start, y - 6, max(end - start, 2), 12, "band")
        canvas.line(start, y - 6, start, y + 6, "edge")
    if row.low is not None and row.high is not None:
        low, high = axis.at(row.low), axis.at(row.high)
        canvas.line(low, y, high, y, "whisker")
        for end in (low, high):
            canvas.line(end, y - 4, end, y + 4, "whisker")
    for seed in row.seeds:
        canvas.dot(axis.at(seed), y + 9, 1.6, "seed")
    if row.value is not None:
        canvas.mark(axis.at(row.value), y, row.mark or 0, "mark" if row.mark is not None else "mark plain")


def _draw_stack(canvas: Canvas, axis: Axis, row: Row, y: float) -> None:
    reached = 0.0
    for part, size in row.parts:
        start, end = axis.at(reached), axis.at(reached + size)
        canvas.rect(start, y - 8, max(end - start - 1.2, 0.4), 16, f"part k{part}")
        if end - start >= 13:
            canvas.text((start + end) / 2 - 0.6, y + 4, chr(ord("A") + part), f"letter k{part}", "middle")
        reached += size
    if row.value is not None:
        x = axis.at(row.value)
        canvas.line(x, y - 12, x, y + 12, "measured")
        canvas.path([(x - 4, y - 14), (x + 4, y - 14), (x, y - 8.5)], "pointer", closed=True)
    if row.low is not None and row.high is not None:
        canvas.line(axis.at(row.low), y + 12, axis.at(row.high), y + 12, "measured")
