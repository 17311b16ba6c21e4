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
    """In the chart's unit. `words` say what the row shows; `band` is a range drawn behind it; `parts` are stacked."""

    label: str
    words: str
    mark: int | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: Sequence[float] = ()
    band: tuple[float, float] | None = None
    parts: Sequence[tuple[int, float]] = ()

    def extent(self) -> list[float]:
        ends = [self.value, self.low, self.high, *self.seeds, *(self.band or ())]
        return [end for end in ends if end is not None] + ([sum(size for _, size in self.parts)] if self.parts else [])


@dataclass(frozen=True)
class _Layout:
    """Where things stand: the plot's edges, a row's height, its middle and its text's place."""

    width: float
    left: float
    right: float
    height: float
    middle: float
    wide: bool
    words: float

    @classmethod
    def of(cls, rows: Sequence[Row], wide: bool) -> "_Layout":
        if not wide:
            return cls(NARROW, 10, NARROW - 10, 50, 33, False, 0)
        label = min(max((width(row.label, SIZE) for row in rows), default=0) + 34, 220)
        words = min(max((width(row.words, SIZE) for row in rows), default=0) + 18, 290)
        return cls(WIDE, label, WIDE - words, 34, 17, True, words - 18)


def points(rows: Sequence[Row], axis_title: str, wide: bool = False, zero: bool = False) -> Svg:
    """A mark for each value over its 95 % interval, small dots for the seeds, bands behind. `zero`: a line at zero."""
    return _chart(rows, axis_title, wide, zero, _draw_point)


def stacks(rows: Sequence[Row], axis_title: str, wide: bool = False) -> Svg:
    """Bars of parts from zero on, lettered as in the legend, with a line where the value was measured."""
    return _chart(rows, axis_title, wide, True, _draw_stack)


def _chart(
    rows: Sequence[Row], axis_title: str, wide: bool, zero: bool, draw: "Callable[[Canvas, Axis, Row, float], None]"
) -> Svg:
    place = _Layout.of(rows, wide)
    canvas = Canvas(place.width)
    extent = [end for row in rows for end in row.extent()] + ([0.0] if zero else [])
    axis = Axis(extent, place.left, place.right, 5 if wide else 4)
    bottom = 6 + place.height * len(rows)
    for tick in axis.ticks:
        x = axis.at(tick)
        canvas.line(x, 4, x, bottom, "zero" if zero and abs(tick) < 1e-12 else "grid")
        _inside(canvas, x, bottom + 15, axis.label(tick))
    canvas.text(place.right, bottom + 31, fitted(axis_title, SMALL, place.width - 20), "tick", "end")
    for i, row in enumerate(rows):
        top = 6 + i * place.height
        _name(canvas, place, row, top)
        draw(canvas, axis, row, top + place.middle)
    return canvas.svg(bottom + 38)


def _inside(canvas: Canvas, x: float, y: float, label: str) -> None:
    """A tick's label, centred unless it would be cut at the edge."""
    half = width(label, SMALL) / 2
    canvas.text(min(max(x, half), canvas.width - half), y, label, "tick", "middle")


def _name(canvas: Canvas, place: _Layout, row: Row, top: float) -> None:
    """The row's mark, name and words."""
    indent = 16.0 if row.mark is not None else 0.0
    if place.wide:
        y = top + place.middle
        if row.mark is not None:
            canvas.mark(7, y, row.mark, "mark", 4.5)
        canvas.text(indent, y + 4, fitted(row.label, SIZE, place.left - indent - 14), "label")
        lines = wrapped(row.words, SIZE, place.words, 2)
        for i, line in enumerate(lines):
            canvas.text(place.right + 18, y + 4 + (i - (len(lines) - 1) / 2) * 14.5, line)
        return
    words = fitted(row.words, SIZE, place.width * 0.62)
    room = place.width - width(words, SIZE) - indent - 8
    if row.mark is not None:
        canvas.mark(7, top + 11, row.mark, "mark", 4.5)
    canvas.text(indent, top + 15, fitted(row.label, SIZE, room), "label")
    canvas.text(place.width, top + 15, words, "", "end")


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
