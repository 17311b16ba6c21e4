"""`halfbyte data check`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Look at training rows as the model will see them.")


@app.callback()
def data() -> None:
    """Look at training rows as the model will see them."""


@app.command()
@with_config_flags(("model", "data"), leave_out=("dtype", "device"))
def check(
    flags: dict[str, Any],
    rows: Annotated[str | None, typer.Argument(metavar="DATA", help="The rows: as --data.")] = None,
    config: Annotated[Path | None, typer.Option("--config", help="A YAML config; flags win over it.")] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Rows to show token by token.")] = 3,
    json: screen.JsonFlag = False,
) -> None:
    """What the rows become: template, tokens, which of them are supervised, lengths, and what looks wrong.

    Example: halfbyte data check rows.jsonl --model Qwen/Qwen3-0.6B
    """
    from halfbyte.data import render_check
    from halfbyte.run.config import load_config
    from halfbyte.run.planning import survey

    given = {**flags, "data": rows} if rows is not None else flags
    found = survey(load_config(config, given))
    assert found.prepared is not None
    if json:
        screen.print_json({**found.prepared.audit.as_dict(), "fingerprint": found.prepared.fingerprint})
    else:
        render_check(found.prepared, found.tokenizer, screen.console(), show)
