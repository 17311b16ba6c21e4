"""`halfbyte plan`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags

app = typer.Typer(add_completion=False)


@app.command()
@with_config_flags(leave_out=("report_to", "output_dir"))
def plan(
    flags: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(help="A YAML config; flags win over it.")] = None,
    accuracy: Annotated[
        bool, typer.Option("--accuracy", help="How good past predictions were on this machine.")
    ] = False,
    json: screen.JsonFlag = False,
) -> None:
    """Which methods fit on this machine, their peak memory and time, and which one to use and why. Reads no weights.

    Example: halfbyte plan --model Qwen/Qwen3-0.6B --data rows.jsonl --memory 6GB
    """
    from halfbyte.run.config import load_config
    from halfbyte.run.planning import plan_of

    if accuracy:
        from halfbyte.cli.accuracy import show
        from halfbyte.run.learning import accuracy_here

        found = accuracy_here()
        screen.print_json(found) if json else show(found)
        return

    made = plan_of(load_config(config, flags))
    if json:
        screen.print_json(made.as_dict())
        return
    rows = [
        (
            ("* " if e.method == made.method else "  ") + e.method,
            "yes" if made.fits(e) else "no",
            f"{screen.gigabytes(e.peak)} (up to {screen.gigabytes(e.peak_p95)})",
            f"{screen.duration(e.total_seconds)} (up to {screen.duration(e.seconds_p95)})",
            f"{e.trainable:,}",
            f"{e.batch[0]} x {e.batch[1]}{', recomputed' if e.job.checkpointing else ''}",
        )
        for e in made.estimates
    ]
    out = screen.console()
    out.print(
        screen.table(("method", "fits", ">peak memory", ">time", ">trained parameters", "rows x accumulated"), rows)
    )
    parts = sorted(made.chosen.memory[made.chosen.peak_phase].items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {screen.gigabytes(size)}" for name, size in parts if size >= 1e7)
    out.print(f"{made.method}: {made.reason}", soft_wrap=True)
    out.print(f"its peak is in phase '{made.chosen.peak_phase}': {shown}", soft_wrap=True)
    out.print(f"budget: {screen.gigabytes(made.budget)} ({made.budget_reason})", soft_wrap=True)
    data = made.data
    if data.assumed:
        out.print(f"no --data: {data.rows:,} rows of {data.longest} tokens are assumed", style="yellow", soft_wrap=True)
