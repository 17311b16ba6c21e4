"""What verbs print: tables for people, JSON for machines, and numbers in one way everywhere."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def console(stderr: bool = False) -> Console:
    """A console made when it is used, so that it follows a redirected stdout; a file has room for wide tables."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=max(made.width, 160))


def print_json(value: Any) -> None:
    """One JSON document on stdout, nothing else."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function for (what is being done, done, in all): one line on stderr, nothing where that is no terminal."""
    made = Console(stderr=True, highlight=False)
    if not made.is_terminal:
        yield lambda what, done, total: None
        return
    with made.status("") as status:
        yield lambda what, done, total: status.update(f"{what} {done / max(total, 1):.0%}")


def printable(text: str) -> str:
    """A model's words for a terminal: it can say anything, control sequences too. Into a file or a pipe as they are."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A plain table; columns that hold figures are right-aligned by a `>` in front of their name."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        made.add_column(name.lstrip(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rate(per_second: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if per_second >= factor:
            return f"{per_second / factor:.2f} {prefix}{unit}/s"
    return f"{per_second:.0f} {unit}/s"


def value(item: Any) -> str:
    """A setting's value in words."""
    if isinstance(item, bool):
        return "on" if item else "off"
    if isinstance(item, float):
        return f"{item:g}"
    return ", ".join(map(str, item)) if isinstance(item, list | tuple) else str(item)


def scores(result: dict[str, Any]) -> Table:
    """An evaluation as a table: figures by name, base beside tuned where both are there."""
    base, gains, intervals = result.get("base"), result.get("gains", {}), result["intervals"]
    skipped = ("schema_version", "supervised_tokens", "evaluated_rows", "intervals", "base", "gains", "gain_intervals")
    names = [name for name in result if name not in skipped]

    def with_interval(name: str, value: float, found: dict[str, Any]) -> str:
        low, high = found.get(name, (None, None))
        return f"{value:.4f}" + (f" ({low:.4f} to {high:.4f})" if low is not None else "")

    if base is None:
        rows = [(name, with_interval(name, result[name], intervals)) for name in names]
        return table(("figure", ">value (95 %)"), rows)
    triples = [
        (
            name,
            with_interval(name, base[name], base["intervals"]),
            with_interval(name, result[name], intervals),
            with_interval(name, gains[name], result["gain_intervals"]) if name in gains else "",
        )
        for name in names
    ]
    return table(("figure", ">base (95 %)", ">tuned (95 %)", ">gain (95 %)"), triples)


def lines(prompt: str, quiet: bool) -> Iterator[str]:
    """What the user types, line by line, until the end; empty lines are skipped."""
    while True:
        try:
            line = input("" if quiet or not sys.stdin.isatty() else prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            typer.echo("")
            return
        if line.strip():
            yield line


def write(piece: str) -> None:
    """A piece of an answer, at once."""
    sys.stdout.write(printable(piece))
    sys.stdout.flush()


def end_answer(answer: dict[str, Any], as_json: bool) -> None:
    """What follows an answer that was streamed; with `as_json`, the answer itself on one line."""
    typer.echo(json.dumps(answer, ensure_ascii=False) if as_json else "")
