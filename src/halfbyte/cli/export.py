"""`halfbyte export`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags, with_option_flags
from halfbyte.export.export import ExportOptions

app = typer.Typer(add_completion=False)


@app.command()
@with_option_flags("exporting", ExportOptions)
@with_config_flags(("run", "model", "quantization"), leave_out=("model", "memory", "adapter_path", "output_dir"))
def export(
    flags: dict[str, Any],
    options: dict[str, Any],
    target: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or a model with --adapter.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="An adapter for the model.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", "-d", help="Rows to compare on instead of those that the run held out.")
    ] = None,
    json: screen.JsonFlag = False,
) -> None:
    """Write a trained model as another program serves it, and compare it there with what was trained.

    Exits 1 where the comparison fails; the files are kept.

    Example: halfbyte export runs/2026-11-22-gemma-qlora --to gguf --quantization q8_0,q4_k_m
    """
    from halfbyte.run.config import options_from_flags
    from halfbyte.run.exporting import export_target
    from halfbyte.run.target import find

    chosen = options_from_flags(ExportOptions, options)
    with screen.progress() as on_event:
        report = export_target(find(target, adapter, **flags), output, chosen, data, on_event)
    if json:
        screen.print_json(report.to_json() | {"path": str(report.path), "bytes": report.nbytes})
    else:
        say = screen.console().print
        say(f"wrote {report.path}: {screen.gigabytes(report.nbytes)}", soft_wrap=True)
        for one in report.exported:
            for line in report.results[one.file].lines():
                say(f"{one.file}: {line}" if len(report.exported) > 1 else line, soft_wrap=True, markup=False)
        for note in report.notes:
            say(f"note: {note}", soft_wrap=True, markup=False)
        for command in dict.fromkeys(one.command for one in report.exported):
            say(f"serve it: {command}", soft_wrap=True, markup=False)
    if report.passed is False:
        raise typer.Exit(1)
