"""Curves with bands, each named at its end."""

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.compare.page.document import Svg
from halfbyte.compare.page.svg import NARROW, SIZE, SMALL, WIDE, Axis, Canvas, LogAxis, colour
from halfbyte.compare.page.text import fitted, width

_SPACING = 16.0
_FAR = 10.0
"""Largest over smallest mean from which on a chart is by logarithms."""
_MOST = 240
"""Points of one curve that are drawn; of more, some are left out evenly, never the last."""


@dataclass(frozen=True)
class Curve:
    """Points (x, mean, low, high) in the chart's units."""

    label: str
    mark: int
    points: Sequence[tuple[float, float, float | None, float | None]]


def thinned(count: int, most: int) -> list[int]:
    """At most `most` places out of `count`, evenly, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def by_logarithm(curves: Sequence[Curve]) -> bool:
    """Whether the curves fall so far that nothing would be seen of their ends otherwise."""
    means = [mean for curve in curves for _, mean, _, _ in curve.points]
    return bool(means) and min(means) > 0 and max(means) > _FAR * min(means)


def lines(curves: Sequence[Curve], x_title: str, y_title: str, wide: bool) -> Svg:
    """Means as lines, each with its own dash; 95 % intervals as bands where there are any."""
    total = WIDE if wide else NARROW
    longest = max((width(curve.label, SIZE) for curve in curves), default=0)
    room = min(longest + 30, 210 if wide else 112)
    height = max(300.0 if wide else 230.0, 50 + _SPACING * len(curves))
    drawn = [(curve, [curve.points[i] for i in thinned(len(curve.points), _MOST)]) for curve in curves]
    ys = [y for _, points in drawn for _, *values in points for y in values if y is not None]
    y_axis = Axis(ys, height - 38, 26, 6 if wide else 5, 0.04)
    if by_logarithm(curves):
        means = [mean for _, points in drawn for _, mean, *_ in points]
        y_axis, y_title = LogAxis(means, height - 38, 26, 6 if wide else 5), f"{y_title}, logarithmic"
    left = max(width(y_axis.label(tick), SMALL) for tick in y_axis.ticks or [0.0]) + 8
    x_axis = Axis((x for _, points in drawn for x, *_ in points), left, total - room, 6 if wide else 4, 0.02)
    canvas = Canvas(total)
    _frame(canvas, x_axis, y_axis, x_title, y_title)
    for curve, points in drawn:
        band = [(x, high) for x, _, _, high in points if high is not None]
        band += [(x, low) for x, _, low, _ in reversed(points) if low is not None]
        if len(band) > 3:
            canvas.path([(x_axis.at(x), y_axis.at(y)) for x, y in band], f"area {colour(curve.mark)}", closed=True)
    for curve, points in drawn:
        places = [(x_axis.at(x), y_axis.at(mean)) for x, mean, _, _ in points]
        canvas.path(places, f"curve {colour(curve.mark)}")
        for place in places if len(places) <= 16 else places[-1:]:
            canvas.mark(*place, curve.mark, "mark", 3.4)
    _names(
        canvas, [(curve, x_axis.at(p[-1][0]), y_axis.at(p[-1][1])) for curve, p in drawn if p], x_axis.end, height - 38
    )
    return canvas.svg(height)


def _frame(canvas: Canvas, x_axis: Axis, y_axis: Axis, x_title: str, y_title: str) -> None:
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        canvas.line(x_axis.start, y, x_axis.end, y, "grid")
        canvas.text(x_axis.start - 6, y + 4, y_axis.label(tick), "tick", "end")
    canvas.line(x_axis.start, y_axis.start, x_axis.end, y_axis.start, "axis")
    for tick in x_axis.ticks:
        x, label = x_axis.at(tick), x_axis.label(tick)
        canvas.line(x, y_axis.start, x, y_axis.start + 4, "axis")
        canvas.text(max(x, width(label, SMALL) / 2), y_axis.start + 16, label, "tick", "middle")
    canvas.text(0, 12, fitted(y_title, SMALL, canvas.width), "tick")
    canvas.text(x_axis.end, y_axis.start + 32, fitted(x_title, SMALL, x_axis.end), "tick", "end")


def _names(canvas: Canvas, ends: Sequence[tuple[Curve, float, float]], right: float, bottom: float) -> None:
    """Labels beside the curves' ends, pushed apart where they would cover each other, with a hair to their curve."""
    ordered = sorted(ends, key=lambda end: (end[2], end[0].mark))
    places = apart([y for _, _, y in ordered], _SPACING, 20, bottom)
    for (curve, x, y), place in zip(ordered, places, strict=True):
        canvas.line(x + 5, y, right + 8, place, "hair")
        canvas.mark(right + 15, place, curve.mark, "mark", 3.8)
        canvas.text(right + 23, place + 4, fitted(curve.label, SIZE, canvas.width - right - 24), "label")


def apart(wanted: Sequence[float], spacing: float, low: float, high: float) -> list[float]:
    """Ascending places at least `spacing` apart, near the wanted ones and, where they find room, between the bounds."""
    places: list[float] = []
    for y in wanted:
        places.append(max(y, places[-1] + spacing if places else low))
    limit = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - spacing
    return places
