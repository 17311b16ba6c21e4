"""What the demo shows, on a Rich console: colours and tables on a terminal, plain lines elsewhere, nothing if quiet."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halfbyte.demo.score import Answer, Score

SHOWN_ROWS = 4


class Screen:
    """One method for each thing that there is to show."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        """A line of text; what is in it is no markup."""
        self._console.print(escape(text), highlight=False)

    def title(self, text: str) -> None:
        self._console.print()
        self._console.print(f"[bold]{escape(text)}[/]", highlight=False)

    def plan(self, plan: Mapping[str, Any]) -> None:
        """plan.json: each method's peak memory and time, whether it fits, and the choice."""
        table = _table("method", ">peak memory", ">up to", ">time", ">up to", "fits")
        for row in plan["methods"]:
            memory, seconds = row["peak_memory_bytes"], row["seconds"]
            name = f"[bold]{row['method']}[/]" if row["method"] == plan["method"] else str(row["method"])
            fits = "yes" if row["fits"] else "no"
            table.add_row(
                name,
                _gb(memory["p50"]),
                _gb(memory["p95"]),
                _minutes(seconds["p50"]),
                _minutes(seconds["p95"]),
                fits,
            )
        self._console.print(table)
        self.say(f"Chosen: {plan['method']}, because {plan['reason']}.")

    def scores(self, base: Score, tuned: Score) -> None:
        table = _table("", ">exactly right", ">share", ">95 % interval")
        for name, score in (("base", base), ("tuned", tuned)):
            low, high = score.interval
            table.add_row(
                name,
                f"{score.correct} of {len(score.answers)}",
                f"{score.exact_match:.1%}",
                f"{low:.0%} to {high:.0%}",
            )
        self._console.print(table)

    def rows(self, base: Score, tuned: Score, count: int = SHOWN_ROWS) -> None:
        """Some held-out rows with both answers; if the tuned model got any wrong, one of those is among them."""
        pairs = list(zip(base.answers, tuned.answers, strict=True))
        wrong = [pair for pair in pairs if not pair[1].correct][:1]
        right = [pair for pair in pairs if pair[1].correct][: count - len(wrong)]
        for before, after in [*right, *wrong]:
            self._row(before, after)

    def _row(self, before: Answer, after: Answer) -> None:
        self._console.print()
        lines = [("asked", before.request, ""), ("base", before.text, "red"), ("tuned", after.text, "green")]
        if not after.correct:
            lines[2] = ("tuned", after.text, "red")
            lines.append(("right", after.expected, ""))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column(overflow="fold")
        for name, text, style in lines:
            # A base model runs on; one line of it is enough.
            shown = " ".join(text.split()) or "(nothing)"
            grid.add_row(name, f"[{style}]{escape(shown)}[/]" if style else escape(shown))
        self._console.print(grid)

    def outcome(self, facts: Sequence[tuple[str, str, str]]) -> None:
        """What was predicted beside what was measured."""
        table = _table("", ">predicted", ">measured")
        for row in facts:
            table.add_row(*row)
        self._console.print(table)

    def commands(self, commands: Sequence[tuple[str, str]]) -> None:
        width = max(len(what) for what, _ in commands)
        for what, command in commands:
            self._console.print(f"  {what:<{width}}  [bold]{escape(command)}[/]", highlight=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
