"""What the demo shows, on a Rich console: colours and tables on a terminal, plain lines elsewhere, nothing if quiet."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

SHOWN_ROWS = 4

Row = Mapping[str, Any]


class Screen:
    """One method for each thing that there is to show."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """A text; what is in it is no markup. A terminal breaks its lines, a file or a pipe keeps it whole."""
        self._console.print(escape(text), highlight=False, soft_wrap=not self._console.is_terminal)

    def title(self, text: str) -> None:
        self._console.print()
        self._console.print(f"[bold]{escape(text)}[/]", highlight=False, soft_wrap=not self._console.is_terminal)

    def task(self, data: Path, held_out: Path) -> None:
        """The two files, and a first row."""
        lines = data.read_text(encoding="utf-8").splitlines()
        rows = len(held_out.read_text(encoding="utf-8").splitlines())
        self.say(
            f"{len(lines)} rows to learn from in {data}, {rows} held out in {held_out}, which share no sentence, name "
            "or item with them. The first one:"
        )
        asked, answer = (message["content"] for message in json.loads(lines[0])["messages"])
        self._pairs([("asked", asked, ""), ("right", answer, "")])

    def plan(self, plan: Mapping[str, Any]) -> None:
        """plan.json: each method's peak memory and time, whether it fits, and the choice."""
        table = _table("method", ">peak memory", ">up to", ">time", ">up to", "fits")
        for row in plan["methods"]:
            memory, seconds = row["peak_memory_bytes"], row["seconds"]
            table.add_row(
                f"[bold]{row['method']}[/]" if row["method"] == plan["method"] else str(row["method"]),
                _gb(memory["p50"]),
                _gb(memory["p95"]),
                _minutes(seconds["p50"]),
                _minutes(seconds["p95"]),
                "yes" if row["fits"] else "no",
            )
        self._console.print(table)
        self.say(f"Chosen: {plan['method']}, because {plan['reason']}.")

    def scores(self, base: Mapping[str, Any], tuned: Mapping[str, Any], metric: str) -> None:
        """Both models' share of rows that are exactly right, with its interval."""
        table = _table("", ">exactly right", ">share", ">95 % interval")
        for name, result in (("base", base), ("tuned", tuned)):
            right = sum(row["scores"][metric] for row in result["rows"])
            low, high = result["intervals"][metric]
            table.add_row(
                name, f"{right:.0f} of {len(result['rows'])}", f"{result[metric]:.1%}", f"{low:.0%} to {high:.0%}"
            )
        self._console.print(table)

    def rows(self, base: Sequence[Row], tuned: Sequence[Row], metric: str, count: int = SHOWN_ROWS) -> None:
        """Some held-out rows with both answers; if the tuned model got any wrong, one of those is among them."""
        pairs = list(zip(base, tuned, strict=True))
        wrong = [pair for pair in pairs if not pair[1]["scores"][metric]][:1]
        right = [pair for pair in pairs if pair[1]["scores"][metric]][: count - len(wrong)]
        for before, after in [*right, *wrong]:
            good = bool(after["scores"][metric])
            lines = [("asked", before["prompt"], ""), ("base", before["prediction"], "red")]
            lines.append(("tuned", after["prediction"], "green" if good else "red"))
            self._console.print()
            self._pairs(lines if good else [*lines, ("right", after["reference"], "")])

    def cost(self, predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> None:
        """The training's memory and time, as planned and as they were."""
        table = _table("training", ">predicted", ">at most", ">measured")
        for name, key, shown in (("peak memory", "peak_memory_bytes", _gb), ("time", "seconds", _minutes)):
            expected = predicted.get(key)
            guesses = [shown(expected[p]) for p in ("p50", "p95")] if expected else ["-", "-"]
            table.add_row(name, *guesses, shown(measured[key]))
        self._console.print(table)

    def commands(self, commands: Sequence[tuple[str, str]]) -> None:
        """Commands to copy: never wrapped."""
        width = max(len(what) for what, _ in commands)
        for what, command in commands:
            self._console.print(f"  {what:<{width}}  [bold]{escape(command)}[/]", highlight=False, soft_wrap=True)

    def _pairs(self, lines: Sequence[tuple[str, str, str]]) -> None:
        """(name, text, style) under each other. A base model runs on over many lines; here it is one text."""
        for name, text, style in lines:
            shown = escape(_printable(" ".join(text.split())) or "(nothing)")
            body = f"[{style}]{shown}[/]" if style else shown
            self._console.print(f"[dim]{name:<5}[/]  {body}", highlight=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _printable(text: str) -> str:
    """A model can say anything, control sequences of the terminal too."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
