"""What a method takes: memory by component, speed, and what the plan had said about both."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from halfbyte.compare.page.document import Block, Cell, Column, Drawing, Figure, Key, Paragraph, Section, Table
from halfbyte.compare.page.rows import Row, points, stacks, told
from halfbyte.compare.page.text import DASH, NBSP, NOT_MEASURED, number
from halfbyte.compare.page.view import MEMORY, SECONDS, SPEED, STEP, Scaled, View
from halfbyte.compare.schema import Figure as Measured
from halfbyte.compare.schema import Metric, Range, Unit, Variant

_Predicted = tuple[Literal["peak_memory_bytes", "seconds"], Unit, str]
_PREDICTED: tuple[_Predicted, ...] = (("peak_memory_bytes", "bytes", "Peak memory"), ("seconds", "seconds", "Time"))
_PARTS = 8
"""Components that a bar shows apart; the smallest of more are drawn as one."""


def memory(view: View) -> Section:
    """Bars of components with the measured peak marked."""
    figures = [variant.figures.get(MEMORY) for variant in view.variants]
    if not any(figures) and not any(variant.components for variant in view.variants):
        return Section("memory", "Memory", [Paragraph(f"Memory was {NOT_MEASURED}.")])
    names = _components(view.variants)
    sums = [sum(variant.components.values()) for variant in view.variants]
    scaled = view.scaled("bytes", [*figures, *(total for total in sums if total)])
    rows = [_stack(view, variant, names, scaled) for variant in view.variants]
    title = f"peak memory, {scaled.scale.suffix}"
    drawing = Drawing(
        "Memory at the peak, by component",
        f"One bar for each method, its components stacked; a line marks the measured peak. {told(rows)}",
        [stacks(rows, title, wide=True), stacks(rows, title)],
    )
    legend = [Key(f"k{i}", chr(ord("A") + i), text) for i, text in enumerate(_legend(names))]
    text = (
        f"{_source(view.variants)} The line with the arrow is the measured peak: the process's largest resident set, "
        "as the operating system counts it."
    )
    figure = Figure("Memory at the peak, by component", [drawing], _memory_table(view, names, scaled), legend)
    return Section("memory", "Memory", [Paragraph(text), figure])


def _source(variants: Sequence[Variant]) -> str:
    """Where the bars come from, in a sentence or two."""
    counted = "the tensors that the runs held, counted, and what is left of the process's peak at the end of training."
    planned = "the components at the moment of the peak, as the plan counts them."
    found = {variant.components_measured for variant in variants if variant.components}
    if found == {True}:
        return f"Bars are {counted}"
    if found == {False}:
        return f"Bars are {planned}"
    return f"Bars are {counted} Where not every run counted them, they are {planned}"


def _components(variants: Sequence[Variant]) -> list[str]:
    """Every component's name, the largest first."""
    sizes: dict[str, float] = {}
    for variant in variants:
        for name, size in variant.components.items():
            sizes[name] = max(sizes.get(name, 0), size)
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def _legend(names: Sequence[str]) -> list[str]:
    shown = names if len(names) <= _PARTS else [*names[: _PARTS - 1], "other components"]
    return [name.replace("_", " ") for name in shown]


def _stack(view: View, variant: Variant, names: Sequence[str], scaled: Scaled) -> Row:
    sizes = [max(variant.components.get(name, 0), 0) / scaled.scale.factor for name in names]
    if len(sizes) > _PARTS:
        sizes = [*sizes[: _PARTS - 1], sum(sizes[_PARTS - 1 :])]
    row = _row(view, variant, variant.figures.get(MEMORY), scaled)
    return replace(row, parts=[part for part in enumerate(sizes) if part[1]])


def _row(view: View, variant: Variant, figure: Measured | None, scaled: Scaled) -> Row:
    mark = view.mark(variant.key)
    if figure is None:
        return Row(variant.label, NOT_MEASURED, mark)
    interval = scaled.interval(figure.low, figure.high)
    low, high, words = scaled.down(figure.low), scaled.down(figure.high), scaled.number(figure.mean)
    seeds = [value / scaled.scale.factor for value in figure.values] if figure.n > 1 else []
    return Row(variant.label, words, mark, scaled.down(figure.mean), low, high, seeds, more=interval)


def _memory_table(view: View, names: Sequence[str], scaled: Scaled) -> Table:
    columns = [Column("Method"), Column("Measured peak", numeric=True), Column("Sum of components", numeric=True)]
    columns += [Column(name.replace("_", " "), numeric=True) for name in names] + [Column("Components")]
    rows = []
    for variant in view.variants:
        parts = [
            Cell(scaled.optional(variant.components.get(name, 0 if variant.components else None))) for name in names
        ]
        total = sum(variant.components.values()) if variant.components else None
        row = [view.name(variant), view.cell(variant.figures.get(MEMORY), scaled), Cell(scaled.optional(total))]
        planned = f"planned, {variant.peak_phase}" if variant.components else "not known"
        rows.append([*row, *parts, Cell("counted" if variant.components_measured else planned)])
    return Table(f"Memory at the peak, by component, in {scaled.scale.suffix}", columns, rows)


def speed(view: View) -> Section:
    """Small charts of everything that takes time or money, and their table."""
    metrics = view.measured([SPEED, STEP, SECONDS, "warmup_seconds", "energy_joules", "cost"])
    if not metrics:
        return Section("speed", "Speed and cost", [Paragraph(f"Speed was {NOT_MEASURED}.")])
    drawings = [_small(view, metric) for metric in metrics]
    columns = [Column("Method")]
    columns += [Column(view.column(metric).scale.titled(metric.label), numeric=True) for metric in metrics]
    rows = [
        [view.name(variant)] + [view.cell(variant.figures.get(metric.key), view.column(metric)) for metric in metrics]
        for variant in view.variants
    ]
    text = "Each mark is a mean, the bar its 95 % interval, the small dots the seeds."
    if len(view.report.settings.seeds) == 1:
        text = "One seed: the marks are single runs, and nothing says how far another would be from them."
    figure = Figure("Speed and what it costs", drawings, Table("Speed and what it costs", columns, rows))
    return Section("speed", "Speed and cost", [Paragraph(text), figure])


def _small(view: View, metric: Metric) -> Drawing:
    scaled = view.column(metric)
    rows = [_row(view, variant, variant.figures.get(metric.key), scaled) for variant in view.variants]
    title = scaled.scale.titled(metric.label)
    described = f"A mark for each method. {metric.better.capitalize()} is better. {told(rows)}"
    return Drawing(f"{title} ({metric.better} is better)", described, [points(rows, title, zero=True)])


def predicted(view: View) -> Section:
    """The plan's bands with what was measured in them."""
    blocks: list[Block] = []
    said = _plan(view)
    if said:
        blocks.append(Paragraph(said))
    drawings, columns, cells = [], [Column("Method")], [[view.name(variant)] for variant in view.variants]
    for key, unit, label in _PREDICTED:
        ranges = [variant.predicted.get(key) for variant in view.variants]
        if not any(ranges):
            continue
        figures = [variant.figures.get(key) for variant in view.variants]
        ends = [end for at in ranges if at is not None for end in (at.p50, at.p95)]
        scaled = view.scaled(unit, [*ends, *(figure.mean for figure in figures if figure)])
        title = scaled.scale.titled(label)
        rows = [_band(view, *row, scaled) for row in zip(view.variants, ranges, figures, strict=True)]
        described = (
            f"A band from the expected value to the one that holds 19 times of 20, and the measured mean. {told(rows)}"
        )
        drawings.append(Drawing(f"{title}: predicted and measured", described, [points(rows, title)]))
        suffix = f", {scaled.scale.suffix}"
        columns += [
            Column(f"{label}{text}", numeric=True)
            for text in (f" expected{suffix}", f" at most{suffix}", f" measured{suffix}")
        ]
        columns.append(Column(f"{label}, measured by expected", numeric=True))
        for row, at, figure in zip(cells, ranges, figures, strict=True):
            row += _compared(at, figure, scaled)
    if not drawings:
        return Section("predicted", "Predicted and measured", [*blocks, Paragraph("Nothing was predicted.")])
    caption = "Peak memory and time, predicted and measured"
    table = Table(caption, columns, cells)
    blocks.append(
        Paragraph(
            "Bands run from the plan's expected value to the one that it gives as holding 19 times of 20; "
            "marks are what was measured."
        )
    )
    blocks.append(Figure(caption, drawings, table))
    return Section("predicted", "Predicted and measured", blocks)


def _plan(view: View) -> str:
    plan = view.report.plan
    if plan is None or plan.seconds is None:
        return ""
    scaled = view.scaled("seconds", [plan.seconds.p50, plan.seconds.p95])
    expected, most = scaled.text(plan.seconds.p50), scaled.text(plan.seconds.p95)
    text = f"Before the first run, the plan for all of them said {expected}, at most {most}"
    if plan.cost is not None:
        text += f", and a cost of {number(plan.cost.amount, 2)}{NBSP}{plan.cost.currency}"
    if plan.without:
        text += f", without {' and '.join(plan.without)}"
    return text + "."


def _band(view: View, variant: Variant, at: Range | None, figure: Measured | None, scaled: Scaled) -> Row:
    mark, factor = view.mark(variant.key), scaled.scale.factor
    band = None if at is None else (at.p50 / factor, max(at.p95, at.p50) / factor)
    if figure is None:
        return Row(variant.label, NOT_MEASURED, mark, band=band)
    more = "" if at is None else f"expected {scaled.number(at.p50)}"
    return Row(variant.label, scaled.number(figure.mean), mark, figure.mean / factor, band=band, more=more)


def _compared(at: Range | None, figure: Measured | None, scaled: Scaled) -> list[Cell]:
    ratio = number(figure.mean / at.p50, 2) if figure is not None and at is not None and at.p50 > 0 else DASH
    said = [Cell(DASH)] * 2 if at is None else [Cell(scaled.number(at.p50)), Cell(scaled.number(at.p95))]
    return [*said, Cell(scaled.optional(figure.mean if figure else None)), Cell(ratio)]
