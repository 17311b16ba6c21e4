"""`halfbyte watch`"""

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from halfbyte.cli import screen

app = typer.Typer(add_completion=False)


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for a run that has not begun yet.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print each event as one line of JSON.")] = False,
) -> None:
    """Follow a run: what happened so far, then each event as it comes, until the run ends.

    Example: halfbyte watch runs/2026-11-22-gemma-qlora
    """
    from halfbyte.run.folder import events_of
    from halfbyte.train.progress import Progress

    events = events_of(run, wait)
    if json:
        for event in events:
            typer.echo(jsonlib.dumps(event, ensure_ascii=False))
        return
    with Progress(screen.console()) as progress:
        for event in events:
            progress(event)
