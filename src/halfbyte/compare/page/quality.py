"""What a method reaches: convergence, the front of quality and memory, and differences with their intervals."""

from collections.abc import Iterable

from halfbyte.compare.page.document import Cell, Column, Drawing, Figure, Paragraph, Section, Table
from halfbyte.compare.page.rows import Row, points, told
from halfbyte.compare.page.scatter import Spot, scatter
from halfbyte.compare.page.text import DASH, MINUS, NOT_MEASURED, Scale, capital, plain
from halfbyte.compare.page.view import MEMORY, Scaled, View
from halfbyte.compare.schema import Comparison, Convergence, Metric, Pareto, Reached, Unit
from halfbyte.compare.schema import Figure as Measured


def convergence(view: View) -> Section:
    """Tokens and time to each held-out loss."""
    title = "Convergence"
    if not view.report.convergence:
        return Section("convergence", title, [Paragraph(f"When a given loss is reached was {NOT_MEASURED}.")])
    text = (
        "How many supervised tokens, and how much time, a method takes down to a held-out loss, by straight lines "
        "between evaluations. A method that never gets there has no mark."
    )
    if any(row.at_first for target in view.report.convergence for row in target.rows):
        text += " Where a run was there by its first evaluation, that one counts, and it may have been sooner."
    return Section("convergence", title, [Paragraph(text), *_unique_figures(view, view.report.convergence)])


def _unique_figures(view: View, targets: Iterable[Convergence]) -> Iterable[Figure]:
    seen: set[str] = set()
    for target in targets:
        text = plain(target.loss, 4)
        text = repr(target.loss) if text in seen else text
        seen.add(text)
        yield _converged(view, target, text)


def _converged(view: View, target: Convergence, loss: str) -> Figure:
    seeds = len(view.report.settings.seeds)
    caption = f"To a held-out loss of {loss}"
    columns = [Column("Method"), Column("Seeds that reached it", numeric=True)]
    cells = [
        [Cell(view.label(row.variant), mark=view.mark(row.variant)), Cell(f"{row.reached} of {seeds}")]
        for row in target.rows
    ]
    drawings = []
    measured: tuple[tuple[str, Unit, list[Measured | None]], ...] = (
        ("Supervised tokens", "supervised tokens", [row.supervised_tokens for row in target.rows]),
        ("Time", "seconds", [row.seconds for row in target.rows]),
    )
    for name, unit, figures in measured:
        scaled = view.scaled(unit, figures)
        title = scaled.scale.titled(name)
        columns.append(Column(title, numeric=True))
        for cell, row, figure in zip(cells, target.rows, figures, strict=True):
            cell.append(_reached_cell(figure, row, scaled))
        if any(figures):
            rows = [_reached_row(view, row, at, scaled, seeds) for row, at in zip(target.rows, figures, strict=True)]
            described = f"To a held-out loss of {loss}: a mark for each method that reached it. {told(rows)}"
            drawings.append(Drawing(f"{title} (less is better)", described, [points(rows, title, zero=True)]))
    return Figure(caption, drawings, Table(caption, columns, cells))


def _reached_row(view: View, row: Reached, figure: Measured | None, scaled: Scaled, seeds: int) -> Row:
    label, mark = view.label(row.variant), view.mark(row.variant)
    if figure is None:
        return Row(label, NOT_MEASURED if row.reached else "not reached", mark)
    ends = (None, None) if row.at_first else (figure.low, figure.high)  # of upper bounds there is no interval
    more = f"{row.reached} of {seeds} seeds" if row.reached < seeds else scaled.interval(*ends)
    if row.at_first:
        more = f"{more}, at most" if more else "at most"
    low, high = map(scaled.down, ends)
    values = [value / scaled.scale.factor for value in figure.values] if figure.n > 1 else []
    return Row(label, scaled.number(figure.mean), mark, scaled.down(figure.mean), low, high, values, more=more)


def _reached_cell(figure: Measured | None, row: Reached, scaled: Scaled) -> Cell:
    if figure is None:
        return Cell(NOT_MEASURED if row.reached else "not reached")
    note = "at most" if row.at_first else scaled.interval(figure.low, figure.high)
    return Cell(scaled.number(figure.mean), note=note)


def pareto(view: View) -> Section:
    """Who is beaten by nobody in quality, memory and time together."""
    title = "Quality against memory and time"
    figures = [_front(view, front) for front in view.report.pareto if front.points]
    if not figures:
        return Section("pareto", title, [Paragraph(f"Quality against memory was {NOT_MEASURED}.")])
    text = (
        "A filled mark is on the front: no other method is at least as good in quality, memory and time and better in "
        "one of them. The step line is the best quality that each amount of memory buys. With each name is its time."
    )
    return Section("pareto", title, [Paragraph(text), *figures])


def _front(view: View, pareto: Pareto) -> Figure:
    metric = view.report.metric(pareto.quality_metric)
    quality = view.scaled(
        metric.unit,
        [view.report.variant(point.variant).figures.get(metric.key) or point.quality for point in pareto.points],
    )
    memory_metric = view.metric(MEMORY)
    column = view.column(memory_metric) if memory_metric is not None else None
    memory = column or view.scaled("bytes", [point.memory for point in pareto.points])
    seconds = view.scaled("seconds", [point.seconds for point in pareto.points])
    spots = [
        Spot(
            view.label(point.variant),
            "" if point.seconds is None else seconds.text(point.seconds),
            view.mark(point.variant),
            point.memory / memory.scale.factor,
            point.quality / quality.scale.factor,
            point.on_front,
        )
        for point in pareto.points
        if point.memory is not None and point.quality is not None
    ]
    drawings = []
    if spots:
        x_title = f"{memory.scale.titled('peak memory')} (less is better)"
        y_title = f"{quality.scale.titled(metric.label)} ({metric.better} is better)"
        on = ", ".join(view.label(point.variant) for point in pareto.points if point.on_front) or "none"
        svgs = [scatter(spots, x_title, y_title, metric.better == "higher", wide) for wide in (True, False)]
        drawings.append(
            Drawing(
                f"{capital(metric.label)} against peak memory", f"A mark for each method. On the front: {on}.", svgs
            )
        )
    columns = [Column("Method"), Column(quality.scale.titled(metric.label), numeric=True)]
    columns += [
        Column(memory.scale.titled("Peak memory"), numeric=True),
        Column(seconds.scale.titled("Time"), numeric=True),
    ]
    rows = [
        [
            Cell(view.label(point.variant), mark=view.mark(point.variant)),
            *(
                Cell(at.optional(value))
                for at, value in ((quality, point.quality), (memory, point.memory), (seconds, point.seconds))
            ),
            Cell("yes" if point.on_front else "no"),
        ]
        for point in pareto.points
    ]
    caption = f"{capital(metric.label)} against peak memory and time"
    return Figure(caption, drawings, Table(caption, [*columns, Column("On the front")], rows))


def differences(view: View) -> Section:
    """A forest plot for each metric: difference, interval, zero, and what that means in words."""
    title = "Differences"
    comparisons = view.report.comparisons
    if not comparisons:
        why = "there are not two methods" if len(view.variants) < 2 else "too few runs, or none to pair"
        return Section("differences", title, [Paragraph(f"No differences were computed: {why}.")])
    text = (
        "First minus second, with the 95 % interval over pairs of runs with the same seed. Where the "
        "interval holds zero there is no difference found, which is not the same as none: beside it stands how large "
        "one had to be to be seen here."
    )
    metrics = [metric for metric in view.report.metrics if any(c.metric == metric.key for c in comparisons)]
    return Section("differences", title, [Paragraph(text), *(_forest(view, metric) for metric in metrics)])


def _forest(view: View, metric: Metric) -> Figure:
    chosen = [c for c in view.report.comparisons if c.metric == metric.key]
    scale = view.scaled(metric.unit, [c.difference.mean for c in chosen]).scale
    if metric.unit == "share":
        scale = Scale("percentage points", 0.01)
    scaled = Scaled(scale, scale.digits(c.difference for c in chosen))
    rows = [
        Row(
            f"{view.label(c.a)} {MINUS} {view.label(c.b)}",
            _verdict(view, c, scaled),
            None,
            scaled.down(c.difference.mean),
            scaled.down(c.difference.low),
            scaled.down(c.difference.high),
        )
        for c in chosen
    ]
    axis = scaled.scale.titled(f"difference in {metric.label}")
    way = "left of zero the first is better" if metric.better == "lower" else "right of zero the first is better"
    described = "A mark for each pair over its 95 % interval. " + told(rows)
    svgs = [points(rows, f"{axis} ({way})", wide, zero=True) for wide in (True, False)]
    columns = [Column("First and second"), Column(scaled.scale.titled("Difference"), numeric=True)]
    columns += [
        Column("95 % interval", numeric=True),
        Column("Could have been seen", numeric=True),
        Column("Verdict"),
        Column("Paired by"),
        Column("In words", wide=True),
    ]
    cells = [[Cell(row.label), *_compared(view, c, scaled)] for row, c in zip(rows, chosen, strict=True)]
    caption = f"Differences in {metric.label}"
    return Figure(caption, [Drawing(caption, described, svgs)], Table(caption, columns, cells))


def _compared(view: View, c: Comparison, scaled: Scaled) -> list[Cell]:
    interval = scaled.interval(c.difference.low, c.difference.high) or DASH
    detectable = DASH if c.detectable is None else scaled.number(c.detectable)
    texts = [scaled.number(c.difference.mean), interval, detectable, _winner(view, c), c.paired_by, c.sentence]
    return [Cell(text) for text in texts]


def _winner(view: View, c: Comparison) -> str:
    if c.verdict == "no difference found":
        return c.verdict
    return f"{view.label(c.a if c.verdict == 'a better' else c.b)} is better"


def _verdict(view: View, c: Comparison, scaled: Scaled) -> str:
    """A row's words: who is better by how much, or that none was found and how large one had to be."""
    if c.verdict != "no difference found":
        return f"{_winner(view, c)} by {scaled.text(abs(c.difference.mean))}"
    if c.detectable is None:
        return "no difference found"
    return f"no difference found; a difference of {scaled.text(c.detectable)} could have been detected"
