"""A run as it happens, on a terminal or in plain lines. It knows events and nothing else.

    with Progress(console) as progress: train(model, plan, run, [progress])
    for event in follow(run): progress(event)                       what `halfbyte watch` does

`train.time_left.TimeLeft` is the estimate that is shown, `follow` the generator of events of a run that another process
writes.
"""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from halfbyte.train.events import Event, parse_events
from halfbyte.train.run_directory import EVENTS, running
from halfbyte.train.time_left import TimeLeft


class Progress:
    """A listener of events. On a terminal one live line with a bar; elsewhere plain lines, at most one in
    `plain_seconds` (by the events' own time), and every evaluation, warning and end."""

    name = "the progress display"

    def __init__(self, console: Console | None = None, plain_seconds: float = 10.0) -> None:
        self.console = console or Console(stderr=True)
        self.plain_seconds = plain_seconds
        self.left = TimeLeft()
        self._live: Live | None = None
        self._last_line = float("-inf")
        self._step: Event | None = None

    def __call__(self, event: Event) -> None:
        self.left.take(event)
        kind = event["event"]
        if kind == "end":
            self.close()
        if kind == "step":
            self._step = event
            self._show_step(event)
        elif (line := describe(event)) is not None:
            if kind in ("start", "resume", "rehearsal") and self.left.seconds:
                line += f"; about {duration(self.left.seconds)} to go"
            self._print(line, style="yellow" if kind == "warning" else None)

    def _show_step(self, event: Event) -> None:
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, refresh_per_second=4, transient=False)
                self._live.start()
            self._live.update(self._line(event))
        elif event["time"] - self._last_line >= self.plain_seconds or event["step"] == self.left.total_steps:
            self._last_line = event["time"]
            self._print(f"step {event['step']}/{self.left.total_steps}  " + "  ".join(self._figures(event)))

    def _line(self, event: Event) -> Group:
        """The live display: a bar, and the figures under it."""
        total = max(1, self.left.total_steps)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(
            Text(f"step {event['step']}/{total}"),
            ProgressBar(total=total, completed=event["step"], width=max(10, min(40, self.console.width - 40))),
            Text(f"{100 * event['step'] / total:.0f} %"),
        )
        return Group(grid, Text("  ".join(self._figures(event)), overflow="ellipsis", no_wrap=True))

    def _figures(self, event: Event) -> list[str]:
        figures = [f"loss {event['loss']:.4f}"]
        rate, left = self.left.tokens_per_second, self.left.seconds
        if rate is not None:
            figures.append(f"{rate:,.0f} tokens/s")
        figures.append(f"{event['memory_bytes'] / 1e9:.2f} GB")
        if event.get("device_memory_bytes"):
            figures.append(f"GPU {event['device_memory_bytes'] / 1e9:.2f} GB")
        if left is not None and event["step"] < self.left.total_steps:
            figures.append(f"{duration(left)} left")
        return figures

    def _print(self, line: str, style: str | None = None) -> None:
        self.console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def describe(event: Event) -> str | None:
    """One plain line for an event that is not a step; None for those that need none."""
    kind, step = event["event"], event.get("step")
    if kind == "start":
        return f"training {event['trainable_parameters']:,} parameters for {event['total_steps']} steps"
    if kind == "resume":
        return f"resuming after step {step} of {event['total_steps']}"
    if kind == "eval":
        known = ("event", "time", "step", "seconds", "loss", "supervised_tokens", "best")
        more = "".join(f", {k} {_number(v)}" for k, v in event.items() if k not in known and v is not None)
        best = " (the best so far)" if event.get("best") else ""
        return f"evaluation at step {step}: loss {_number(event['loss'])}{best}{more}"
    if kind == "rehearsal":
        return f"rehearsed the longest batches and a save in {duration(event['seconds'])}: {_peak(event)}"
    if kind == "warning":
        return f"warning: {event['message']}"
    if kind == "end":
        status = str(event["status"]).replace("_", " ")
        return f"{status} after step {step} of {event['total_steps']}: {_summary(event)}"
    return None


def _summary(event: Event) -> str:
    parts = [duration(event["seconds"])]
    if event.get("tokens_per_second"):
        parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    for key in ("final_loss", "eval_loss"):
        if event.get(key) is not None:
            parts.append(f"{key.replace('final_', '').replace('_', ' ')} {event[key]:.4f}")
    return ", ".join([*parts, _peak(event)])


def _peak(event: Event) -> str:
    return f"peak memory {event['peak_memory_bytes'] / 1e9:.2f} GB"


def _number(value: Any) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 05 min, 2 d 4 h: as exact as an estimate deserves, and therefore steady."""
    if seconds < 90:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def follow(
    run: Path,
    poll_seconds: float = 0.5,
    sleep: Callable[[float], None] = time.sleep,
    wait_for_start: bool = False,
) -> Iterator[Event]:
    """The events of a run: those that are there, then each as it is written, until the run is no longer alive.

    A resumed run replaces the file by one without the events that it repeats; what was yielded already is not yielded
    again, and `resume` tells the reader to which step the run went back. With `wait_for_start`, a run that does not
    live yet is waited for; without it, what is there is given and the end is reached.
    """
    tail = _Tail(run / EVENTS)
    started = not wait_for_start
    while True:
        alive = running(run) is not None
        started = started or alive
        yield from tail.read()
        if started and not alive:
            return
        sleep(poll_seconds)


class _Tail:
    """Reads what is new in an events.jsonl, through its replacement by a resumed run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode: int | None = None
        self._offset = 0
        self._lines: list[int] = []  # a hash of each line given out

    def read(self) -> list[Event]:
        """The whole lines that were not given out before."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            inode = os.fstat(file.fileno()).st_ino
            same = inode == self._inode
            file.seek(self._offset if same else 0)
            data = file.read()
        data = data[: data.rfind(b"\n") + 1]
        lines = data.splitlines(keepends=True)
        known = 0
        if not same:
            self._inode, self._offset = inode, 0
            while known < min(len(lines), len(self._lines)) and hash(lines[known]) == self._lines[known]:
                known += 1
            del self._lines[known:]
        self._offset += len(data)
        self._lines += [hash(line) for line in lines[known:]]
        return parse_events(b"".join(lines[known:]), self.path)
