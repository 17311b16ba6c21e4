"""`halfbyte compare`"""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags, with_option_flags
from halfbyte.compare.options import NOT_SHARED, CompareOptions

app = typer.Typer(add_completion=False)


@app.command()
@with_option_flags("comparison", CompareOptions, leave_out=("variants", "output"))
@with_config_flags(leave_out=NOT_SHARED)
def compare(
    flags: dict[str, Any],
    options: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(help="A YAML file; flags win over it.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the report and the cells [default: comparison].")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its cost, and stop.")] = False,
    claims: Annotated[
        bool, typer.Option("--claims", help="Hold other people's claims against the reports below --output.")
    ] = False,
    pack: Annotated[
        Path | None,
        typer.Option("--pack", help="Write the report and the runs' small files, without this machine's paths, here."),
    ] = None,
    json: screen.JsonFlag = False,
) -> None:
    """Run several methods with several seeds on the same rows, and write one report: which to use, and what it costs.

    Example: halfbyte compare -m Qwen/Qwen3-0.6B -d rows.jsonl --methods lora,qlora --seeds 3 -o report
    """
    from halfbyte.compare.compare import compare
    from halfbyte.compare.options import load_request

    if output is not None:
        options["output"] = output
    request = load_request(config, flags, options)
    if claims:
        _claims(request.options.output, json)
        return
    if pack is not None:
        _pack(request.options.output, pack, json)
        return
    command = shlex.join(["halfbyte", *sys.argv[1:]]) if sys.argv[1:2] == ["compare"] else "halfbyte compare"
    listener = None if json else _Listener()
    result = compare(request, listener or (lambda event: None), dry_run, command)
    if json:
        screen.print_json({"path": str(result.path), "plan": result.plan, "report": result.report})
    elif result.report is not None:
        screen.console().print(result.report["sentence"], soft_wrap=True, markup=False)
        screen.console().print(f"report: {result.path / 'report.html'}", soft_wrap=True, markup=False)
    if result.failed:
        text = f"{len(result.failed)} failed: the same command tries again; {result.path / 'logs'} has what was printed"
        screen.console(stderr=True).print(text, style="yellow", soft_wrap=True, markup=False)
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _pack(root: Path, out: Path, json: bool) -> None:
    from halfbyte.compare.pack import pack

    files = pack(root, out)
    if json:
        screen.print_json([str(file) for file in files])
    else:
        size = screen.gigabytes(sum(file.stat().st_size for file in files))
        screen.console().print(f"{len(files)} files, {size}: {out}", soft_wrap=True, markup=False)


def _claims(root: Path, json: bool) -> None:
    from halfbyte.compare.claims import judge_all

    verdicts = judge_all([root])
    if json:
        screen.print_json([verdict.as_dict() for verdict in verdicts])
        return
    rows = [(str(v.claim), v.verdict, v.sentence) for v in verdicts]
    screen.console().print(screen.table((">claim", "verdict", "what was measured"), rows))


class _Listener:
    """Shows the plan, and each cell as it begins and ends."""

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "planned":
            self._planned(event)
        elif event["event"] == "cell":
            self._cell(event)
        elif event["event"] == "note":
            screen.console(stderr=True).print(event["message"], style="yellow", soft_wrap=True, markup=False)

    def _planned(self, event: dict[str, Any]) -> None:
        out, plan, design = screen.console(stderr=True), event["plan"], event["design"]
        rows = []
        for planned in design.variants:
            estimate = planned.plan
            shown = ("?", "?")
            if estimate is not None:
                peak, seconds = estimate["peak_memory_bytes"], estimate["seconds"]
                shown = (
                    f"{screen.gigabytes(peak['p50'])} (up to {screen.gigabytes(peak['p95'])})",
                    f"{screen.duration(seconds['p50'])} (up to {screen.duration(seconds['p95'])})",
                )
            rows.append((planned.key, "no" if planned.skipped else "yes", *shown))
        out.print(screen.table(("variant", "fits", ">peak memory", ">time of a run"), rows))
        for key, reason in plan["skipped"].items():
            out.print(f"{key} is not run: {reason}", style="yellow", soft_wrap=True, markup=False)
        seconds, cost = plan["seconds"], plan["cost"]
        work, count = design.variants[0].work, len(design.seeds)

        def counted(runs: int) -> str:
            return f"{runs} run{'s are' if runs > 1 else ' is'}"

        left = ""
        if event["finished"] or event["accepted"]:
            left = f", {screen.duration(event['seconds_left'])} left" if event["left"] else ", no run is left"
        out.print(
            f"{count} seed{'s' * (count > 1)}, {work.steps} updates of {work.rows_per_update} rows, "
            f"{work.supervised_tokens:,} supervised tokens a run; in all {screen.duration(seconds['p50'])} (up to "
            f"{screen.duration(seconds['p95'])})"
            + (f", {cost['amount']:.2f} {cost['currency']}" if cost is not None else "")
            + (f"; not in it: {', '.join(plan['without'])}" if plan["without"] else "")
            + (f"; {counted(event['finished'])} there already" if event["finished"] else "")
            + (f"; {counted(event['accepted'])} accepted from elsewhere" if event["accepted"] else "")
            + left,
            soft_wrap=True,
            markup=False,
        )

    def _cell(self, event: dict[str, Any]) -> None:
        cell, status = event["cell"], event["status"]
        said = {"train": "begins", "again": f"once more: {event.get('message')}", "done": "done"}
        text = said.get(status, status)
        if status == "failed":
            text = f"failed: {event['message']}"
        counted = f" ({event['done']} of {event['in_all']})" if status == "done" else ""
        name = f"{cell.variant}, seed {cell.seed}" + (", learning-rate search" if cell.kind == "tune" else "")
        style = "yellow" if status in ("failed", "again") else None
        screen.console(stderr=True).print(f"{name}: {text}{counted}", style=style, soft_wrap=True, markup=False)
