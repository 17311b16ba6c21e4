"""The first page: the sentence, the table to choose by, and every figure."""

from halfbyte.compare.page.document import Block, Cell, Column, Paragraph, Section, Table
from halfbyte.compare.page.text import DASH, NOT_MEASURED, plain
from halfbyte.compare.page.view import MEMORY, SPEED, View
from halfbyte.compare.schema import Metric, Report, Variant

SMALLEST = 3


def facts(view: View) -> list[str]:
    """What the sentence rests on, in a few words each."""
    report = view.report
    seeds, settings = len(report.settings.seeds), report.settings
    out = [report.model.name, ", ".join(data.name for data in report.data)]
    if seeds:
        out.append("one seed: no intervals" if seeds == 1 else f"{seeds} seeds, 95 % intervals over them")
    if settings.supervised_tokens is not None:
        whose = " with the first seed" if seeds > 1 else ""
        out.append(f"{plain(settings.supervised_tokens)} supervised tokens a run{whose}")
    out.append(f"learning rates {searched(report)}")
    if report.model.quantized_source:
        out.append(f"the base came from a quantized file: {report.model.quantized_source}")
    if report.warnings:
        count = len(report.warnings)
        out.append(f"{count} warning{'s' if count > 1 else ''} at the end")
    return [fact for fact in out if fact]


def searched(report: Report) -> str:
    """For whom learning rates were searched."""
    tuned = report.settings.tune_lr
    if tuned is None:
        return "not searched"
    everybody = all(variant.key in tuned.grid for variant in report.variants)
    return f"searched for {'each method' if everybody else 'some methods, as the notes say'}"


def side_by_side(view: View) -> Section:
    """Memory, precision, speed, quality against full, hardware, paged optimizer, double quantization."""
    blocks: list[Block] = []
    if not view.variants:
        blocks.append(Paragraph("No method was compared."))
    else:
        blocks.append(_choice(view))
        blocks.append(Paragraph(_how_to_read(view)))
    everything = _everything(view)
    if everything is not None:
        blocks.append(everything)
    return Section("methods", "Methods", blocks)


def _choice(view: View) -> Table:
    memory, speed, quality = view.metric(MEMORY), view.metric(SPEED), view.quality()
    measured = [metric for metric in (memory, speed, quality) if metric is not None]
    columns = [Column("Method"), Column("Precision")]
    columns += [Column(view.column(metric).scale.titled(metric.label), numeric=True) for metric in measured]
    full = any(variant.against_full for variant in view.variants)
    columns += [Column("Quality against full, %", numeric=True)] if full else []
    columns += [Column("Hardware it fits", wide=True), Column("Paged optimizer"), Column("Double quantization")]
    rows = []
    for variant in view.variants:
        row = [view.name(variant), _precision(variant)]
        row += [view.cell(variant.figures.get(metric.key), view.column(metric)) for metric in measured]
        row += [_against_full(view, variant)] if full else []
        row += [_hardware(variant), Cell(_yes(variant.paged))]
        row.append(Cell(_yes(variant.double_quant) if variant.quant_type or variant.double_quant else DASH))
        rows.append(row)
    return Table("What to choose by", columns, rows)


def _precision(variant: Variant) -> Cell:
    named = None if variant.precision == variant.quant_type else variant.quant_type
    parts = [named, f"blocks of {variant.blocksize}" if variant.blocksize else None]
    return Cell(variant.precision or "not known", note=", ".join(part for part in parts if part))


def _against_full(view: View, variant: Variant) -> Cell:
    if variant.against_full is None:
        return Cell(DASH)
    shares = [other.against_full.share for other in view.variants if other.against_full]
    return view.cell(variant.against_full.share, view.scaled("share", shares))


def _hardware(variant: Variant) -> Cell:
    """The smallest machines of the catalogue that it fits; the conditions name all."""
    names, more = variant.hardware[:SMALLEST], len(variant.hardware) - SMALLEST
    return Cell(", ".join(names) or "none named", note=f"and {more} larger" if more > 0 else "")


def _yes(value: bool | None) -> str:
    return "not known" if value is None else "yes" if value else "no"


def _how_to_read(view: View) -> str:
    text = "1 GB is 10⁹ bytes. "
    if len(view.report.settings.seeds) > 1:
        text += "Figures are means over the seeds; with each stands its 95 % interval. "
    metric = next((variant.against_full.metric for variant in view.variants if variant.against_full), None)
    if metric is not None:
        text += f"Quality against full: {_share_of_full(view.report.metric(metric))}. "
    return text + "What is not there was not measured, and is said so."


def _share_of_full(metric: Metric) -> str:
    if metric.better == "higher":
        return f"{metric.label} as a share of full fine-tuning's"
    return f"of what full fine-tuning took off the untrained model's {metric.label}, the share that the method took off"


def _everything(view: View) -> Table | None:
    metrics = view.measured(metric.key for metric in view.report.metrics)
    if not metrics or not view.variants:
        return None
    baselines = view.report.baselines
    base = any(line.base is not None for line in baselines.values())
    majority = any(line.majority is not None for line in baselines.values())
    columns = [Column("Measured")] + [Column(variant.label, numeric=True) for variant in view.variants]
    columns += [Column("Base, untrained", numeric=True)] if base else []
    columns += [Column("Always the commonest answer", numeric=True)] if majority else []
    return Table("All figures", columns, [_metric_row(view, metric, base, majority) for metric in metrics])


def _metric_row(view: View, metric: Metric, base: bool, majority: bool) -> list[Cell]:
    scaled = view.column(metric)
    row = [Cell(scaled.scale.titled(metric.label), note=f"{metric.better} is better")]
    for variant in view.variants:
        figure = variant.figures.get(metric.key)
        none = "none" if metric.key == "adapter_bytes" and variant.lora_r is None else NOT_MEASURED
        row.append(view.cell(figure, scaled) if figure else Cell(none))
    line = view.report.baselines.get(metric.key)
    if base:
        row.append(Cell(DASH if line is None else scaled.optional(line.base)))
    if majority:
        row.append(Cell(DASH if line is None or line.majority is None else scaled.number(line.majority)))
    return row
