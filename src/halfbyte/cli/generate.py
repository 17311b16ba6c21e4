"""`halfbyte generate`"""

from pathlib import Path
from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags, with_option_flags
from halfbyte.evaluate.sampling import GenerateOptions

app = typer.Typer(add_completion=False)


@app.command()
@with_option_flags("sampling", GenerateOptions)
@with_config_flags(("run", "model"), leave_out=("model", "memory", "adapter_path"))
def generate(
    flags: dict[str, Any],
    options: dict[str, Any],
    target: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or a model.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="What to ask.")] = None,
    file: Annotated[Path | None, typer.Option("--prompts", help="A file with a prompt a line; - reads stdin.")] = None,
    raw: Annotated[
        bool | None,
        typer.Option("--raw/--chat", help="Continue the text as it is, or answer it as a conversation's turn."),
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", help="An adapter for the model.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Switch the adapter off.")] = False,
    json: screen.JsonFlag = False,
) -> None:
    """Complete prompts, greedily unless told otherwise.

    Example: halfbyte generate runs/2026-11-22-gemma-qlora "cancel the two chairs, please" --max-new-tokens 60
    """
    from halfbyte.run.config import options_from_flags
    from halfbyte.run.target import find, generate_texts, open_target, read_prompts

    asked = [*(prompts or []), *(read_prompts(file) if file is not None else [])]
    chosen = options_from_flags(GenerateOptions, options)
    answers = generate_texts(open_target(find(target, adapter, **flags)), asked, chosen, raw, base)
    if json:
        screen.print_json([
            {"prompt": prompt, "text": a.text, "finish_reason": a.finish_reason, "tokens": len(a.tokens)}
            for prompt, a in zip(asked, answers, strict=True)
        ])  # fmt: skip
    else:
        for answer in answers:
            typer.echo(screen.printable(answer.text))
