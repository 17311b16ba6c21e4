"""`halfbyte demo`"""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli import screen

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Folder of the demo's run.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo.")] = False,
    json: screen.JsonFlag = False,
) -> None:
    """The whole way on a small real model: plan, train, evaluate, save, reload, and what to do next.

    Example: halfbyte demo
    """
    from halfbyte.demo.demo import run_demo

    report = run_demo(output_dir, overwrite=overwrite, quiet=json)
    if json:
        screen.print_json(report.as_dict())
