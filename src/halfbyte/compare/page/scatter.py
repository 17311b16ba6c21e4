"""Quality against memory: a mark for each variant, its name and time beside it, and the front as a step line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from halfbyte.compare.page.document import Svg
from halfbyte.compare.page.svg import NARROW, SIZE, SMALL, WIDE, Axis, Canvas
from halfbyte.compare.page.text import fitted, width

_LINE, _INDENT, _SPACING = 14.0, 14.0, 17.0
_BESIDE = 8
"""Spots on a page that can have their names beside them without covering each other; on a phone two fewer."""
Place = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Spot:
    """`x` is better when it is less. `filled`: nothing beats it in all that counts."""

    label: str
    note: str
    mark: int
    x: float
    y: float
    filled: bool


def scatter(spots: Sequence[Spot], x_title: str, y_title: str, higher_is_better: bool, wide: bool) -> Svg:
    """Few spots have their names beside them; more have them in a list beside the plot."""
    total = WIDE if wide else NARROW
    listed = len(spots) > (_BESIDE if wide else _BESIDE - 2)
    right = total - 12 - (250 if wide else 150) * listed
    height = max(340.0 if wide else 300.0, (50 + _SPACING * len(spots)) * listed)
    y_axis = Axis((spot.y for spot in spots), height - 38, 30, 5, 0.16)
    left = max(width(y_axis.label(tick), SMALL) for tick in y_axis.ticks or [0.0]) + 8
    x_axis = Axis((spot.x for spot in spots), left, right, 6 if wide else 4, 0.14)
    canvas = Canvas(total)
    for tick in y_axis.ticks:
        canvas.line(left, y_axis.at(tick), right, y_axis.at(tick), "grid")
        canvas.text(left - 6, y_axis.at(tick) + 4, y_axis.label(tick), "tick", "end")
    for tick in x_axis.ticks:
        canvas.line(x_axis.at(tick), y_axis.start, x_axis.at(tick), y_axis.start + 4, "axis")
        canvas.text(x_axis.at(tick), y_axis.start + 16, x_axis.label(tick), "tick", "middle")
    canvas.line(left, y_axis.start, right, y_axis.start, "axis")
    canvas.text(0, 12, fitted(y_title, SMALL, total), "tick")
    if listed:
        canvas.text(0, y_axis.start + 32, fitted(x_title, SMALL, total), "tick")
    else:
        canvas.text(right, y_axis.start + 32, fitted(x_title, SMALL, right - 4), "tick", "end")
    best = front([(spot.x, spot.y) for spot in spots], higher_is_better)
    steps = _steps([(x_axis.at(x), y_axis.at(y)) for x, y in best], right) if len(best) > 1 else []
    if steps:
        canvas.path(steps, "front")
    taken = [_around((x_axis.at(spot.x), y_axis.at(spot.y)), 7) for spot in spots]
    taken += [_around(place, 3, to) for place, to in pairwise(steps)]
    for spot in spots:
        canvas.mark(x_axis.at(spot.x), y_axis.at(spot.y), spot.mark, _style(spot), 5.5)
    if listed:
        _list(canvas, sorted(spots, key=lambda spot: (spot.x, spot.y)), right + 16)
        return canvas.svg(height)
    places = [(x_axis.at(spot.x), y_axis.at(spot.y)) for spot in spots]
    for i, spot in enumerate(spots):
        others = places[:i] + places[i + 1 :]
        _label(canvas, spot, *places[i], others, taken, (left, 16, total, y_axis.start))
    return canvas.svg(height)


def front(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[tuple[float, float]]:
    """Points of which none has less x and a better y, by x."""
    sign = -1.0 if higher_is_better else 1.0
    out: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not out or sign * y < sign * out[-1][1]:
            out.append((x, y))
    return out


def _steps(places: Sequence[tuple[float, float]], right: float) -> list[tuple[float, float]]:
    out = [places[0]]
    for x, y in places[1:]:
        out += [(x, out[-1][1]), (x, y)]
    return [*out, (right, out[-1][1])]


def _around(start: Place, reach: float, end: Place | None = None) -> Box:
    """What a mark, or a line across or down, covers."""
    (x1, x2), (y1, y2) = (sorted(pair) for pair in zip(start, end or start, strict=True))
    return x1 - reach, y1 - reach, x2 + reach, y2 + reach


def _label(
    canvas: Canvas, spot: Spot, x: float, y: float, others: Sequence[Place], taken: list[Box], area: Box
) -> None:
    """Name and note where they cover the least: beside, above or below the spot.

    From afar a hair leads to it; where another spot is about as near, the mark stands before the name, too.
    """
    room = min(190.0, (area[2] - area[0]) * 0.45)
    name, note = fitted(spot.label, SIZE, room), fitted(spot.note, SMALL, room)
    across, down = max(width(name, SIZE), width(note, SMALL)) + _INDENT, _LINE * (2 if note else 1)
    places = [
        (left, top, left + across, top + down)
        for gap in (10.0, 22.0, 36.0, 52.0)
        for left, top in (
            (x + gap, y - down / 2),
            (x - gap - across, y - down / 2),
            (x - across / 2, y - gap - down),
            (x - across / 2, y + gap),
            (x + gap, y - gap - down),
            (x + gap, y + gap),
            (x - gap - across, y - gap - down),
            (x - gap - across, y + gap),
        )
    ]
    inside = [_moved_into(box, area) for box in places]
    best = min(inside, key=lambda box: sum(_overlap(box, other) for other in taken))
    taken.append(best)
    far = math.dist(_nearest(best, (x, y)), (x, y))
    doubtful = any(math.dist(_nearest(best, other), other) < far + 8 for other in others)
    if far > 14:
        canvas.line(x, y, *_nearest(best, (x, y)), "hair")
    if far > 14 or doubtful:
        canvas.mark(best[0] + 5, best[1] + 7, spot.mark, _style(spot), 3.8)
    start = best[0] + _INDENT if far > 14 or doubtful or best[0] < x else best[0]
    canvas.text(start, best[1] + 11, name, "label")
    if note:
        canvas.text(start, best[1] + 11 + _LINE, note, "tick")


def _nearest(box: Box, place: Place) -> Place:
    return min(max(place[0], box[0]), box[2]), min(max(place[1], box[1]), box[3])


def _list(canvas: Canvas, spots: Sequence[Spot], left: float) -> None:
    """All names below each other, from left to right as the marks are."""
    for i, spot in enumerate(spots):
        room = canvas.width - left - _INDENT
        note = spot.note if canvas.width == WIDE else ""
        name = fitted(spot.label, SIZE, room - (width(note, SMALL) + 8 if note else 0))
        canvas.mark(left + 5, 36 + i * _SPACING, spot.mark, _style(spot), 3.8)
        canvas.text(left + _INDENT, 40 + i * _SPACING, name, "label", more=note)


def _style(spot: Spot) -> str:
    return "mark" if spot.filled else "mark hollow"


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _moved_into(box: Box, area: Box) -> Box:
    dx = max(area[0] - box[0], 0.0) - max(box[2] - area[2], 0.0)
    dy = max(area[1] - box[1], 0.0) - max(box[3] - area[3], 0.0)
    return box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy
