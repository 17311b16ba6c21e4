"""`halfbyte merge`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags, with_option_flags
from halfbyte.errors import UsageError
from halfbyte.export.merge import MergeOptions

app = typer.Typer(add_completion=False)


@app.command()
@with_option_flags("merging", MergeOptions)
@with_config_flags(("run", "model", "quantization"), leave_out=("model", "memory", "adapter_path"))
def merge(
    flags: dict[str, Any],
    options: dict[str, Any],
    target: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or a model with --adapter.")],
    out: Annotated[Path | None, typer.Argument(help="The folder to write; or give --output.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="An adapter for the model, or one more for a run; FOLDER:WEIGHT scales it."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Rows to score on instead of those that the run held out.")
    ] = None,
    json: screen.JsonFlag = False,
) -> None:
    """Write base and adapter as one model folder that transformers loads, and prove that it behaves as trained.

    Example: halfbyte merge runs/2026-11-22-gemma-qlora -o merged
    """
    from halfbyte.export.bases import NotAsTrained
    from halfbyte.export.deltas import parse_adapter
    from halfbyte.run.config import options_from_flags
    from halfbyte.run.target import find, merge_target

    if (out is None) == (output is None):
        both = "" if out is None else f" ({out} and --output {output} were both given)"
        raise UsageError(f"one folder to write is needed{both}: halfbyte merge {target} -o FOLDER")
    chosen = options_from_flags(MergeOptions, options)
    adapters = [parse_adapter(text) for text in adapter or ()]
    say = screen.console().print
    found, folder = find(target, **flags), out or output or Path()
    progress = screen.console(stderr=True).print
    try:
        report = merge_target(found, folder, chosen, adapters=adapters, data=data, on_event=progress)
    except NotAsTrained as error:
        if json:
            screen.print_json(error.table.to_json())
        else:
            say(scores(error.table.to_json()))
        raise
    if json:
        screen.print_json(report.to_json())
        return
    if report.scores is not None:
        say(f"scored against the unmerged model on {report.scores.rows}", soft_wrap=True)
        say(scores(report.scores.to_json()))
    elif report.not_scored:
        say(f"not scored on held-out rows: {report.not_scored}", soft_wrap=True)
    if len(report.adapters) > 1:
        say(f"adapters: {' + '.join(report.adapters)}", soft_wrap=True)
    say(f"wrote {report.path}: {screen.gigabytes(report.nbytes)} in {report.dtype}, {report.merged} linears merged")
    say(f"merged into {report.base}", soft_wrap=True)
    if report.comparison is not None:
        say(f"compared with the unmerged model: {report.comparison}", soft_wrap=True)


def scores(table: dict[str, Any]) -> Any:
    """A score table, as its JSON, for people; the chosen base is marked."""
    names = list(table["unmerged"]["metrics"])
    columns = ("base", ">KL, nats a token (95 %)", ">same top", ">perplexity", *(f">{name}" for name in names),
               ">same answers", ">same tokens", ">time")  # fmt: skip
    rows = []
    for score in (table["unmerged"], *table["candidates"]):
        interval = score["kl_interval"]
        between = f" ({interval[0]:.2g} to {interval[1]:.2g})" if interval and score is not table["unmerged"] else ""
        rows.append(
            (
                f"{score['name']} *" if score["name"] == table["chosen"] else score["name"],
                f"{score['kl']:.3g}{between}",
                f"{score['same_top']:.1%}",
                f"{score['perplexity']:.4f}",
                *(f"{score['metrics'][name]:.4f}" for name in names),
                *("" if score[key] is None else f"{score[key]:.1%}" for key in ("same_answers", "same_tokens")),
                screen.duration(score["seconds"]),
            )
        )
    return screen.table(columns, rows)
