"""A plan in words and tables, 80 columns wide. Every figure is in the JSON too, where nothing is left out."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from halfbyte.cli import screen
from halfbyte.plan.calibration import Interval
from halfbyte.plan.recommend import Estimate, Plan
from halfbyte.run.offer import Where

_PHASE_NAMES = {"merge": "merge, afterwards"}


def show(out: Console, answer: Plan | Where) -> None:
    """What was asked for, the answer and its reason first, then the figures behind it."""
    if isinstance(answer, Plan):
        _show_plan(out, answer)
    else:
        _show_where(out, answer)


def _show_plan(out: Console, plan: Plan) -> None:
    place = plan.machine or ("this machine's GPU" if plan.chosen.job.device == "cuda" else "this machine")
    _line(out, f"{place}: {screen.gigabytes(plan.budget)} of memory ({plan.budget_reason})")
    out.print(_methods(plan))
    out.print()
    _line(out, f"{plan.name}: {plan.reason}", style="bold")
    _show_chosen(out, plan)
    _show_changes(out, plan)
    _show_assumptions(out, plan.assumed)


def _methods(plan: Plan) -> object:
    """Method, verdict, and what it takes: the middle, and what 95 of 100 runs stay below."""
    price = plan.chosen.price
    columns = ["method", "", ">memory", ">P95", ">time", ">P95", *([f">{price.currency}", ">P95"] if price else [])]
    rows = []
    for e in plan.estimates:
        cost = [f"{e.cost.p50:.2f}", f"{e.cost.p95:.2f}"] if e.cost is not None else []
        mark = "* " if e is plan.chosen else "  "
        rows.append([mark + e.name, plan.verdict(e), _gb(e.peak_memory.p50), _gb(e.peak_memory.p95),
                     hours(e.time.p50), hours(e.time.p95), *cost])  # fmt: skip
    return screen.table(columns, rows)


def _show_chosen(out: Console, plan: Plan) -> None:
    e = plan.chosen
    _line(out, f"  layout: {_layout(e)}")
    _line(
        out,
        f"  trains {e.trainable:,} parameters{_adapters(e)} with {e.job.optim}, {e.job.steps:,} updates, "
        f"{e.job.train_tokens:,} tokens",
    )
    disk = e.disk_bytes
    _line(out, f"  disk: {screen.gigabytes(disk.p50)} (up to {screen.gigabytes(disk.p95)}) in the run's folder")
    rows = []
    for phase in e.phases:
        seconds = e.calibration.seconds(e.seconds[phase], e.probed) if phase in e.seconds else None
        memory = e.of_phase(phase)
        took = [hours(seconds.p50), hours(seconds.p95)] if seconds is not None else ["", ""]
        rows.append([f"  {_PHASE_NAMES.get(phase, phase)}", _gb(memory.p50), _gb(memory.p95), *took])
    out.print(screen.table(("  phase", ">memory", ">P95", ">time", ">P95"), rows))
    parts = {name: e.of_component(e.peak_phase, name) for name in e.memory[e.peak_phase]}
    shown = ", ".join(f"{name} {_span(size)}" for name, size in sorted(parts.items(), key=lambda i: -i[1].p50)
                      if size.p50 >= 5e6)  # fmt: skip
    _line(out, f"  at its peak, in phase '{e.peak_phase}': {shown}")


def _layout(e: Estimate) -> str:
    """Which rows are computed together, in words."""
    rows, accumulated = e.batch
    batch = f"{rows} row{'s' if rows > 1 else ''} at once, {accumulated} times an update"
    kept = "recomputed" if e.job.checkpointing else "kept"
    return f"{batch}; activations {kept}; rows {'packed' if e.packing else 'not packed'}; computed in {e.job.dtype}"


def _adapters(e: Estimate) -> str:
    if e.method == "full":
        return ""
    targets = e.job.lora.target_modules
    return f" (rank {e.job.lora.lora_r}, {targets if isinstance(targets, str) else ', '.join(targets)})"


def _show_changes(out: Console, plan: Plan) -> None:
    """What would make the others fit, as one would type it."""
    for name, changes in (plan.changes or {}).items():
        shown = "; ".join(
            f"{change.flags} ({screen.gigabytes(change.peak_p95)}{', ' + change.note if change.note else ''})"
            for change in changes
        )
        _line(out, f"{name} would fit with: {shown}" if shown else f"{name}: nothing that was tried makes it fit")


def _show_assumptions(out: Console, assumed: Sequence[str]) -> None:
    for said in assumed:
        _line(out, said, style="yellow")


def _show_where(out: Console, where: Where) -> None:
    picked = where.picked
    currencies = sorted({plan.chosen.price.currency for plan in where.plans if plan.chosen.price is not None})
    one = len(currencies) == 1
    rows = []
    for plan in where.plans:
        e = plan.chosen
        rows.append([
            ("* " if plan is picked else "  ") + where.name_of(plan), e.name, plan.verdict(e),
            _gb(e.peak_memory.p50), _gb(e.peak_memory.p95), hours(e.time.p50), hours(e.time.p95),
            *(_cost(e, with_currency=not one) if currencies else []),
        ])  # fmt: skip
    priced = [f">{currencies[0] if one else 'cost'}", ">P95"] if currencies else []
    out.print(screen.table(("device", "method", "", ">memory", ">P95", ">time", ">P95", *priced), rows))
    out.print()
    if picked is not None and where.placed is not None:
        _line(out, f"{where.name_of(picked)}: {where.placed.reason}", style="bold")
        _line(out, f"  {picked.name} there: {picked.reason}")
        _show_chosen(out, picked)
    elif where.problem is None:
        _line(out, "--pick cheapest or --pick fastest names one of them")
    _show_assumptions(out, list(dict.fromkeys(said for plan in where.plans for said in plan.assumed)))


def _cost(e: Estimate, with_currency: bool) -> list[str]:
    if e.cost is None or e.price is None:
        return ["", ""]
    unit = f" {e.price.currency}" if with_currency else ""
    return [f"{e.cost.p50:.2f}{unit}", f"{e.cost.p95:.2f}{unit}"]


def hours(seconds: float) -> str:
    """Short enough for a table: `42 s`, `35 min`, `2.5 h`, `3.1 d`."""
    for limit, divisor, unit in ((99.5, 1, "s"), (99.5 * 60, 60, "min"), (99.5 * 3600, 3600, "h")):
        if seconds < limit:
            value = seconds / divisor
            return f"{value:.1f} {unit}" if unit == "h" and value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds / 86400:.1f} d"


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _span(size: Interval) -> str:
    return f"{size.p50 / 1e9:.2f} GB"


def _line(out: Console, text: str, style: str | None = None) -> None:
    out.print(escape(text), style=style)
