"""`halfbyte train`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags

app = typer.Typer(add_completion=False)


@app.command()
@with_config_flags()
def train(
    flags: dict[str, Any],
    config: Annotated[Path | None, typer.Argument(help="A YAML config; flags win over it.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in --output-dir.")] = False,
    json: screen.JsonFlag = False,
) -> None:
    """Fine-tune a model: plan, train, evaluate base against tuned, save.

    Example: halfbyte train --model Qwen/Qwen3-0.6B --data rows.jsonl
    """
    from halfbyte.cli.reporter import Reporter
    from halfbyte.run.config import load_config
    from halfbyte.run.run import run

    with Reporter(quiet=json) as reporter:
        result = run(load_config(config, flags), reporter, overwrite)
    if json:
        screen.print_json({"run": str(result.path), **result.result})
