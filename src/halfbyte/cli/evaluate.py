"""`halfbyte evaluate`"""

from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags, with_option_flags
from halfbyte.evaluate.evaluate import EvaluateOptions

app = typer.Typer(add_completion=False)


@app.command()
@with_option_flags("measuring", EvaluateOptions)
@with_config_flags(
    ("run", "model", "data"),
    leave_out=("model", "memory", "adapter_path", "data", "eval_data", "eval_split", "eval_max_rows", "packing"),
)
def evaluate(
    flags: dict[str, Any],
    options: dict[str, Any],
    target: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or a model.")],
    data: Annotated[str | None, typer.Option("--data", help="Rows; by default those that the run held out.")] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="An adapter for the model.")] = None,
    rows: Annotated[bool, typer.Option("--rows", help="With --json: every row's answer too.")] = False,
    json: screen.JsonFlag = False,
) -> None:
    """Loss, perplexity and task metrics with 95 % intervals, base against tuned.

    Example: halfbyte evaluate runs/2026-11-22-gemma-qlora --metrics exact_match
    """
    from halfbyte.run.config import options_from_flags
    from halfbyte.run.target import evaluate_target, find, rows_from

    chosen = options_from_flags(EvaluateOptions, options)
    result = evaluate_target(rows_from(find(target, adapter, **flags), data), chosen)
    if json:
        screen.print_json(result.to_json(rows))
    else:
        screen.console().print(screen.scores(result.to_json()))
