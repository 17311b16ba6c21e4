"""What `halfbyte plan --accuracy` prints: how good the predictions were on this machine, and what they changed."""

from typing import Any

from halfbyte.cli import screen


def show(found: dict[str, Any]) -> None:
    """`plan.history.accuracy`'s answer as text."""
    out = screen.console()
    if not found["kept"]:
        out.print("the history is switched off (HALFBYTE_HISTORY): nothing is learnt from runs", soft_wrap=True)
        return
    if found["problem"] is not None:
        out.print(f"the history cannot be used: {found['problem']}", style="yellow", soft_wrap=True, markup=False)
        return
    if not found["runs"]:
        others = found["other_runs"]
        other = f" ({others} with another processor, thread count, GPU, torch version or backend)" if others else ""
        out.print(f"no finished run on this machine yet{other}: nothing to compare", soft_wrap=True)
        return
    methods = [*found["methods"].items()]
    rows = [_row(name, errors) for name, errors in methods]
    if len(methods) > 1:
        rows.append(_row("all", found["all"]))
    columns = ("method", ">runs", ">memory off by", ">95 %", ">below p95", ">time off by", ">95 %", ">below p95")
    out.print(screen.table(columns, rows))
    for what, unit in (("memory", screen.gigabytes), ("time", screen.duration)):
        worst = found["worst"][what]
        if worst is not None:
            out.print(
                f"furthest off in {what}: {worst['method_name']} on {worst['family']} "
                f"({worst['parameters'] / 1e6:,.0f}M parameters), {worst['finished'][:10]}: {unit(worst['predicted'])} "
                f"predicted, {unit(worst['measured'])} measured",
                soft_wrap=True,
            )
    before, after = found["shipped"], found["refit"]
    if after is None:
        out.print(
            "none of these runs can be learnt from (another version's formulas predicted them, or they were resumed or "
            "too short): plans use the shipped constants",
            soft_wrap=True,
        )
    else:
        out.print(f"plans are {after['source']}: {_changes(before, after)}", soft_wrap=True)


def _row(name: str, errors: dict[str, Any]) -> tuple[str, ...]:
    cells = [name, str(errors["runs"])]
    for what in ("memory", "time"):
        cells += [_percent(errors[what][key]) for key in ("median", "p95", "within")]
    return tuple(cells)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def _changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The constants that moved, in words."""
    words = {
        "memory_scale": ("memory times {:.2f}", 1.0),
        "memory_spread": ("its p95 {:.0f} % above", 100.0),
        "time_scale": ("time times {:.2f}", 1.0),
        "time_spread": ("its p95 {:.0f} % above", 100.0),
        "probe_spread": ("{:.0f} % after a probe", 100.0),
    }
    parts = []
    for name, (text, unit) in words.items():
        now = text.format(after[name] * unit)
        was = f" (shipped: {before[name] * unit:.{2 if unit == 1.0 else 0}f})"
        parts.append(now + (was if before[name] != after[name] else ""))
    return ", ".join(parts)
