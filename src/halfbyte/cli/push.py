"""`halfbyte push`"""

from typing import Annotated, Any

import typer

from halfbyte.cli import screen
from halfbyte.cli.flags import with_option_flags
from halfbyte.export.push import PushOptions

app = typer.Typer(add_completion=False)


@app.command()
@with_option_flags("uploading", PushOptions)
def push(
    options: dict[str, Any],
    target: Annotated[str, typer.Argument(help="A run, an adapter's folder, an exported folder, or a .gguf file.")],
    repo: Annotated[str, typer.Argument(help="The repository on the Hub: user/name.")],
    json: screen.JsonFlag = False,
) -> None:
    """Upload a run's adapter, or an exported model, to the Hugging Face Hub; private unless --public.

    Example: halfbyte push runs/2026-11-22-gemma-qlora me/gemma-mails
    """
    from halfbyte.export.push import push as upload
    from halfbyte.run.config import options_from_flags
    from halfbyte.run.pushing import collect_target

    chosen = options_from_flags(PushOptions, options)
    model = collect_target(target, repo, chosen)
    say = screen.console(stderr=json).print
    for file in model.uploads:
        say(f"{file.nbytes:>16,} bytes  {file.name}", markup=False)
    what = {"adapter": "an adapter", "model": "a model", "gguf": "a model in GGUF"}[model.kind]
    how = "public" if chosen.public else "private"
    say(f"{what}, {len(model.uploads)} files, {screen.gigabytes(model.nbytes)} to {repo} ({how})", markup=False)
    done = upload(model, repo, chosen)
    if json:
        screen.print_json(done.to_json())
        return
    for note in done.notes:
        say(f"note: {note}", soft_wrap=True, markup=False)
    if done.commit is None:
        say("nothing was sent (--dry-run)")
        return
    say(f"uploaded: {done.url} ({'private' if done.private else 'public'}), commit {done.commit[:12]}", soft_wrap=True)
