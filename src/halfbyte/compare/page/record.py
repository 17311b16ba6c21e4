"""What somebody needs who wants to check it or do it again: runs, commands, versions, machine, data."""

from halfbyte.compare.page.document import Block, Bullets, Cell, Column, Command, Facts, Paragraph, Section, Table
from halfbyte.compare.page.overview import SMALLEST, searched
from halfbyte.compare.page.text import clean_lines, plain, scale_for
from halfbyte.compare.page.view import View
from halfbyte.compare.schema import Report

_UNKNOWN = "not known"


def cells(view: View) -> Section:
    """Every run: whose it is, how it ended, where it came from."""
    runs = view.report.cells
    if not runs:
        return Section("runs", "Runs", [Paragraph("No runs are recorded.")])
    done = sum(cell.status == "done" for cell in runs)
    text = f"{done} of {len(runs)} runs are done."
    elsewhere = sum(cell.origin != "this comparison" for cell in runs)
    if elsewhere:
        text += f" {elsewhere} of them came from elsewhere, as the column says."
    scaled = view.scaled("seconds", [cell.seconds for cell in runs])
    columns = [
        Column("Run"),
        Column("Method"),
        Column("Seed", numeric=True),
        Column("Status"),
        Column("Comes from", wide=True),
    ]
    columns += [Column(scaled.scale.titled("Time"), numeric=True), Column("Where it is, and what it said", wide=True)]
    rows = [
        [
            Cell(cell.id),
            Cell(view.label(cell.variant), mark=view.mark(cell.variant)),
            Cell(str(cell.seed)),
            Cell(cell.status),
            Cell(cell.origin),
            Cell(scaled.optional(cell.seconds)),
            Cell(cell.path or _UNKNOWN, note=cell.message or ""),
        ]
        for cell in runs
    ]
    return Section("runs", "Runs", [Paragraph(text), Table("The runs", columns, rows)])


def commands(view: View) -> Section:
    """What to type to get this again."""
    report = view.report
    blocks: list[Block] = [Command("This comparison", report.command)]
    blocks += [Command(f"{variant.label}, its first seed", variant.command) for variant in view.variants]
    shown = {report.command, *(variant.command for variant in view.variants)}
    others = [command for command in report.commands if command not in shown]
    if others:
        blocks.append(Command("The other commands", "\n".join(clean_lines(command) for command in others)))
    return Section("commands", "Commands", blocks)


def conditions(view: View) -> Section:
    """Model, data, machine, versions, settings."""
    report = view.report
    blocks: list[Block] = [
        Facts("Settings", _settings(report)),
        *_learning_rates(view),
        *_data(report),
        Facts("Model", _model(report)),
        Facts("Machine", _machine(report)),
        *_hardware(view),
    ]
    if report.versions:
        blocks.append(
            Facts("Versions", [(name, version or "not installed") for name, version in report.versions.items()])
        )
    return Section("conditions", "Conditions", blocks)


def _known(value: float | str | None) -> str:
    if value is None or value == "":
        return _UNKNOWN
    return value if isinstance(value, str) else plain(value)


def _settings(report: Report) -> list[tuple[str, str]]:
    settings = report.settings
    return [
        ("Seeds", ", ".join(str(seed) for seed in settings.seeds) or "none"),
        ("Steps a run", _known(settings.steps)),
        ("Supervised tokens a run", _known(settings.supervised_tokens)),
        (
            "Learning rates",
            searched(report) if settings.tune_lr else "as given or by default, not searched",
        ),
        ("Runs", "side by side" if settings.side_by_side else "one after another"),
    ]


def _learning_rates(view: View) -> list[Block]:
    tuned = view.report.settings.tune_lr
    if tuned is None:
        return []
    labels = {variant.key: variant.label for variant in view.variants}
    rows = [
        [
            Cell(labels.get(key, key), mark=view.mark(key) if key in labels else None),
            Cell(", ".join(plain(rate) for rate in rates)),
            Cell(plain(tuned.chosen[key]) if key in tuned.chosen else "none"),
        ]
        for key, rates in tuned.grid.items()
    ]
    steps = f", {plain(tuned.steps)} steps each" if tuned.steps is not None else ""
    columns = [Column("Method"), Column("Tried", numeric=True), Column("Chosen", numeric=True)]
    return [Table(f"The search for learning rates{steps}", columns, rows)]


def _data(report: Report) -> list[Block]:
    if not report.data:
        return [Paragraph("The data is not recorded.")]
    columns = [Column("Data")] + [
        Column(name, numeric=True) for name in ("Rows", "Held-out rows", "Tokens", "Supervised tokens")
    ]
    rows = [
        [Cell(data.name)]
        + [Cell(_known(value)) for value in (data.rows, data.eval_rows, data.tokens, data.supervised_tokens)]
        + [Cell(data.fingerprint or _UNKNOWN)]
        for data in report.data
    ]
    return [Table("The data", [*columns, Column("Fingerprint")], rows)]


def _model(report: Report) -> list[tuple[str, str]]:
    model = report.model
    facts = [("Model", model.name), ("Family", _known(model.family)), ("Parameters", _known(model.parameters))]
    facts += [("Data type", _known(model.dtype)), ("Fingerprint", _known(model.fingerprint))]
    if model.quantized_source:
        facts.insert(1, ("Base from a quantized file", model.quantized_source))
    return facts


def _machine(report: Report) -> list[tuple[str, str]]:
    machine = report.machine
    memory = _UNKNOWN
    if machine.memory_bytes is not None:
        memory = scale_for("bytes", [machine.memory_bytes]).text(machine.memory_bytes)
    return [
        ("Processor", _known(machine.processor)),
        ("Cores", _known(machine.cores)),
        ("Memory", memory),
        ("GPU", machine.gpu or "none"),
        ("Instruction sets", ", ".join(machine.instruction_sets) or _UNKNOWN),
        ("System", _known(machine.system)),
    ]


def _hardware(view: View) -> list[Block]:
    """The machines that each method fits, where the first table names the smallest of them only."""
    if all(len(variant.hardware) <= SMALLEST for variant in view.variants):
        return []
    by_machines: dict[str, list[str]] = {}
    for variant in view.variants:
        by_machines.setdefault(", ".join(variant.hardware) or "none named", []).append(view.label(variant.key))
    rows = [[Cell(", ".join(labels)), Cell(machines)] for machines, labels in by_machines.items()]
    title = "Machines of the planner's catalogue that a run fits, the smallest first"
    return [Table(title, [Column("Method"), Column("Machines", wide=True)], rows)]


def remarks(view: View) -> Section:
    """Warnings, the report's notes, and each method's."""
    notes = [*view.report.notes, *(f"{variant.label}: {note}" for variant in view.variants for note in variant.notes)]
    blocks: list[Block] = []
    if view.report.warnings:
        blocks.append(Bullets(view.report.warnings, warning=True))
    if notes:
        blocks.append(Bullets(notes))
    return Section("notes", "Notes and warnings", blocks or [Paragraph("None.")])
