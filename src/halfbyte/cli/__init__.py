"""The command line: `halfbyte VERB`. One small file a verb; all logic is in the packages below.

A verb's module is imported when that verb is used, so that `halfbyte --help` answers at once and never loads torch.
Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 does not fit, 4 interrupted and resumable.
"""

import importlib
import importlib.metadata
import os
import sys
from collections.abc import MutableMapping, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from halfbyte.errors import HalfbyteError

VERBS: dict[str, str] = {
    "demo": "The whole way on a small real model: plan, train, evaluate, save, reload.",
    "doctor": "What this machine is and can do, and which backend is chosen.",
    "plan": "Which methods fit, their peak memory and time, and which one to use.",
    "init": "Write a commented YAML config.",
    "data": "Look at training rows as the model will see them.",
    "train": "Fine-tune a model.",
    "resume": "Continue a run that was stopped.",
    "compare": "Several methods, several seeds, one report.",
    "evaluate": "Loss, perplexity and task metrics, base against tuned.",
    "generate": "Complete prompts.",
    "chat": "Talk to a model.",
    "merge": "Write base and adapter as one model folder.",
    "export": "Files that llama.cpp, Ollama, transformers or vLLM serve, compared with what was trained.",
    "push": "Upload an adapter or an exported model to the Hugging Face Hub.",
    "runs": "List runs.",
    "watch": "Follow a run.",
}
"""Verb → one line of help, in the order in which a newcomer meets them. The module of the same name holds `app`."""


def load(verb: str) -> Any:
    """The command of a verb, from its own module."""
    module = importlib.import_module(f"halfbyte.cli.{verb}")
    return typer.main.get_command(module.app)


class LazyGroup(TyperGroup):
    """A group that knows its verbs' names and one-line helps, and imports a verb when it is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in VERBS:
            self.commands[args[0]] = load(args[0])
        return super().resolve_command(ctx, args)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"halfbyte {importlib.metadata.version('halfbyte')}")
        raise typer.Exit


def make_app() -> typer.Typer:
    """The application, with a placeholder for each verb until it is called."""
    app = typer.Typer(
        name="halfbyte",
        cls=LazyGroup,
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        # --learning_rate is --learning-rate: other tools write their flags with underscores.
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda token: token.replace("_", "-"),
        },
    )

    @app.callback(help="Fine-tune language models with LoRA and QLoRA on the hardware that you already have.")
    def root(
        version: bool = typer.Option(
            False, "--version", help="Print the version and leave.", is_eager=True, callback=_print_version
        ),
    ) -> None:
        pass

    for verb, text in VERBS.items():
        app.command(verb, help=text)(lambda: None)
    return app


def wait_without_spinning(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP's threads sleep while they wait, unless the user said otherwise. Must come before torch is loaded.

    libgomp's default is to spin, and on a machine that does anything else beside us a spinning thread holds the core
    that the thread it waits for needs: one busy neighbour made a step 3 to 30 times slower (docs/experiments.md).
    """
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code; what a user did wrong is one line on stderr."""
    wait_without_spinning(os.environ)
    try:
        make_app()(args=None if arguments is None else list(arguments))
    except HalfbyteError as error:
        print(f"halfbyte: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("halfbyte: stopped", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # `halfbyte runs | head`: the reader has left, which is no error; stop Python from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
