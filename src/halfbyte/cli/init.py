"""`halfbyte init`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags

app = typer.Typer(add_completion=False)


@app.command()
@with_config_flags()
def init(
    flags: dict[str, Any],
    file: Annotated[Path, typer.Argument(help="The file to write; - prints it.")] = Path("halfbyte.yaml"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    json: screen.JsonFlag = False,
) -> None:
    """Write a commented YAML config: what you give is set, every other option is there with its default.

    Example: halfbyte init run.yaml --model Qwen/Qwen3-0.6B --data rows.jsonl
    """
    from halfbyte.run.config import write_template

    text = write_template(None if str(file) == "-" else file, flags, overwrite)
    if json:
        screen.print_json({"file": str(file), "text": text})
    elif str(file) == "-":
        typer.echo(text, nl=False)
    else:
        screen.console().print(f"wrote {file}; next: halfbyte train {file}", soft_wrap=True)
