"""`halfbyte merge`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags, with_option_flags
from halfbyte.export.merge import MergeOptions

app = typer.Typer(add_completion=False)


@app.command()
@with_option_flags("merging", MergeOptions)
@with_config_flags(("run", "model", "quantization"), leave_out=("model", "memory", "adapter_path"))
def merge(
    flags: dict[str, Any],
    options: dict[str, Any],
    target: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or a model with --adapter.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    adapter: Annotated[str | None, typer.Option("--adapter", help="An adapter for the model.")] = None,
    json: screen.JsonFlag = False,
) -> None:
    """Write base and adapter as one model folder that transformers loads, and compare it with what was trained.

    Example: halfbyte merge runs/2026-11-22-gemma-qlora merged
    """
    from halfbyte.run.config import options_from_flags
    from halfbyte.run.target import find, merge_target

    report = merge_target(find(target, adapter, **flags), out, options_from_flags(MergeOptions, options))
    if json:
        screen.print_json(report.to_json())
        return
    say = screen.console().print
    say(f"wrote {report.path}: {screen.gigabytes(report.nbytes)} in {report.dtype}, {report.merged} linears merged")
    say(f"merged into {report.base}", soft_wrap=True)
    if report.comparison is not None:
        say(f"compared with the unmerged model: {report.comparison}", soft_wrap=True)
