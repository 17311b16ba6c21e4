"""`halfbyte chat`"""

from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_config_flags, with_option_flags
from halfbyte.errors import UsageError
from halfbyte.evaluate.sampling import GenerateOptions

app = typer.Typer(add_completion=False)


@app.command()
@with_option_flags("sampling", GenerateOptions)
@with_config_flags(("run", "model"), leave_out=("model", "memory", "adapter_path"))
def chat(
    flags: dict[str, Any],
    options: dict[str, Any],
    target: Annotated[str, typer.Argument(help="A run's folder, an adapter's folder, or a model.")],
    adapter: Annotated[str | None, typer.Option("--adapter", help="An adapter for the model.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")] = False,
) -> None:
    """Talk to a model; /help lists what can be done beside asking. Ctrl-D leaves.

    Example: halfbyte chat runs/2026-11-22-gemma-qlora --temperature 0.7
    """
    from halfbyte.run.config import options_from_flags
    from halfbyte.run.target import chat_session, find, open_target

    session = chat_session(
        open_target(find(target, adapter, **flags)), options_from_flags(GenerateOptions, options), system
    )
    for line in screen.lines("you> ", quiet=json):
        try:
            said = session.command(line)
            if said is None:
                answer = session.send(line, None if json else screen.write)
                screen.end_answer({"question": line, "text": answer.text, "finish_reason": answer.finish_reason}, json)
            else:
                typer.echo(said)
        except UsageError as error:
            typer.echo(f"halfbyte: {error}", err=True)
        except KeyboardInterrupt:
            typer.echo("")
