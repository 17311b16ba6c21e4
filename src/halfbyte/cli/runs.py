"""`halfbyte runs`"""

from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli import screen

app = typer.Typer(add_completion=False)


@app.command()
def runs(
    root: Annotated[Path, typer.Argument(help="The folder that holds runs.")] = Path("runs"),
    json: screen.JsonFlag = False,
) -> None:
    """List runs, the newest first: what they are, how far they came, how good they are.

    Example: halfbyte runs
    """
    from halfbyte.run.folder import list_runs

    found = list_runs(root)
    if json:
        screen.print_json([run.as_dict() for run in found])
        return
    if not found:
        screen.console().print(f"no runs in {root}: `halfbyte train` makes one", soft_wrap=True)
        return
    rows = [
        (
            str(run.path),
            run.status,
            run.model,
            run.method,
            f"{run.step}/{run.total_steps or '?'}",
            f"{run.eval_loss:.4f}" if run.eval_loss is not None else "",
            screen.duration(run.seconds) if run.seconds is not None else "",
            (run.started or "")[:16].replace("T", " "),
        )
        for run in found
    ]
    names = ("run", "status", "model", "method", ">step", ">held-out loss", ">time", "started (UTC)")
    screen.console().print(screen.table(names, rows))
