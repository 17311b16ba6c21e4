"""`halfbyte resume`"""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli import screen

app = typer.Typer(add_completion=False)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="Go on up to this step.")] = None,
    json: screen.JsonFlag = False,
) -> None:
    """Continue a run that was stopped, bit for bit, or extend a complete one.

    Example: halfbyte resume runs/2026-11-22-gemma-qlora --max-steps 500
    """
    from halfbyte.cli.reporter import Reporter
    from halfbyte.run.run import resume

    with Reporter(quiet=json) as reporter:
        result = resume(run, reporter, max_steps)
    if json:
        screen.print_json({"run": str(result.path), **result.result})
    elif not reporter.finished:
        screen.console().print(f"{run} is complete already: --max-steps extends it")
