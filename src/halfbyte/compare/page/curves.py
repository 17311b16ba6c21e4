"""Loss along the runs: the whole way, its second half larger, and by the clock."""

from collections.abc import Callable, Sequence

from halfbyte.compare.page.document import Block, Cell, Column, Drawing, Figure, Paragraph, Section, Svg, Table
from halfbyte.compare.page.lines import Curve, lines, thinned
from halfbyte.compare.page.text import DASH, NOT_MEASURED, number, plain
from halfbyte.compare.page.view import Scaled, View
from halfbyte.compare.schema import Point, Variant

_TABLE_POINTS = 8
"""Points of a curve that its table has; report.json has them all."""
_ENOUGH = 6
"""Points of a curve from which its second half is drawn again by itself."""

Held = Sequence[tuple[Variant, Sequence[Point]]]


def curves(view: View) -> Section:
    """Held-out and training loss, each a figure."""
    held_out = [(variant, variant.curves.eval) for variant in view.variants if variant.curves.eval]
    train = [(variant, variant.curves.train) for variant in view.variants if variant.curves.train]
    blocks: list[Block] = []
    if any(point.low is not None for _, line in held_out + train for point in line):
        blocks.append(Paragraph("Lines are means over the seeds, the bands around them 95 % intervals."))
    if held_out:
        blocks.append(_figure(view, "Held-out loss", held_out))
    if train:
        if any(len(line) > 1 for _, line in train):
            blocks.append(Paragraph("A point of the training loss is the mean of the updates since the point before."))
        blocks.append(_figure(view, "Training loss", train))
    return Section("curves", "Loss curves", blocks or [Paragraph(f"Loss curves were {NOT_MEASURED}.")])


def _figure(view: View, what: str, held: Held) -> Figure:
    tokens = view.scaled("supervised tokens", [line[-1].supervised_tokens for _, line in held])
    timed = [(variant, [point for point in line if point.seconds is not None]) for variant, line in held]
    timed = [(variant, line) for variant, line in timed if line]
    seconds = view.scaled("seconds", [line[-1].seconds for _, line in timed])
    ends = "; ".join(f"{variant.label} ends at {plain(line[-1].mean, 4)}" for variant, line in held)
    described = f"A line for each method, named at its end; lower is better. {ends}."

    def drawn(chosen: Held, x: Callable[[Point], float], scaled: Scaled, axis: str, wide: bool) -> Svg:
        drawn = [_curve(view, variant, line, x, scaled) for variant, line in chosen]
        return lines(drawn, scaled.scale.titled(axis), f"{what} (lower is better)", wide)

    svgs = [drawn(held, _tokens, tokens, "supervised tokens", wide) for wide in (True, False)]
    drawings = [Drawing(f"{what} by supervised tokens", described, svgs)]
    end = max(point.supervised_tokens for _, line in held for point in line)
    later = [(variant, [p for p in line if p.supervised_tokens >= end / 2]) for variant, line in held]
    if all(len(line) * 2 >= _ENOUGH for _, line in later):
        svg = drawn(later, _tokens, tokens, "supervised tokens", False)
        drawings.append(Drawing(f"{what}, the second half", described, [svg]))
    if any(point.seconds for _, line in timed for point in line):
        drawings.append(Drawing(f"{what} by time", described, [drawn(timed, _seconds, seconds, "time", False)]))
    return Figure(what, drawings, _table(view, what, held, tokens, seconds))


def _tokens(point: Point) -> float:
    return point.supervised_tokens


def _seconds(point: Point) -> float:
    return point.seconds or 0.0


def _curve(view: View, variant: Variant, line: Sequence[Point], x: Callable[[Point], float], scaled: Scaled) -> Curve:
    points = [(x(point) / scaled.scale.factor, point.mean, point.low, point.high) for point in line]
    return Curve(variant.label, view.mark(variant.key), points)


def _table(view: View, what: str, held: Held, tokens: Scaled, seconds: Scaled) -> Table:
    most = max(len(line) for _, line in held)
    some = f", {_TABLE_POINTS} of {most} points of a curve (report.json has all)" if most > _TABLE_POINTS else ""
    headings = [tokens.scale.titled("Supervised tokens"), seconds.scale.titled("Time"), what, "95 % interval"]
    rows = [
        [
            view.name(variant),
            Cell(plain(point.supervised_tokens / tokens.scale.factor)),
            Cell(NOT_MEASURED if point.seconds is None else plain(point.seconds / seconds.scale.factor)),
            Cell(number(point.mean, 4)),
            Cell(_interval(point)),
        ]
        for variant, line in held
        for point in (line[i] for i in thinned(len(line), _TABLE_POINTS))
    ]
    columns = [Column("Method"), *(Column(heading, numeric=True) for heading in headings)]
    return Table(f"{what} along the run{some}", columns, rows)


def _interval(point: Point) -> str:
    if point.low is None or point.high is None:
        return DASH
    return f"{number(point.low, 4)} to {number(point.high, 4)}"
