"""events.jsonl: what happened in a run, one JSON object a line, in the order in which it happened.

Everything that shows a run reads this file. Every line has `event` and `time` (seconds since 1970); the events are

    start       schema_version, step (0), total_steps, steps_per_epoch, total_tokens (or null), pid, ...; for the time
                left predicted ({"seconds": {phase: seconds}, "probed"}, or null), eval_every (0: never, null: at the
                end), save_steps, save_minutes, final_evaluations (after the last step)
    resume      the same with the checkpoint's step; dropped_events
    step        step, seconds, tokens, supervised_tokens, loss, learning_rate, grad_norm, memory_bytes,
                peak_memory_bytes
    eval        step, seconds, loss, supervised_tokens, best (is it the best so far), further metrics
    rehearsal   seconds, peak_memory_bytes, memory_limit_bytes (or null), tried, probes: each tokens, supervised_tokens
                and seconds of a micro-batch; optimizer_seconds, evaluation (a probe) or null; predicted, as in start.
                Before the first step
    checkpoint  step, seconds, path (inside the run), bytes
    warning     step, message
    end         step, status (completed | stopped_early | interrupted | failed), seconds, tokens, ...

In a `step`, seconds, tokens and supervised_tokens are sums over the updates since the previous `step` event (one update
unless logging_steps says otherwise), seconds without evaluation and saving; loss is the mean over their supervised
tokens; learning_rate and grad_norm (before clipping) are the last update's; memory_bytes is the process's resident set
at that moment (VmRSS) and peak_memory_bytes its peak (VmHWM). On a GPU device_memory_bytes is torch's peak allocation.
With `task: dpo` loss is the mean over pairs of answers, and `step` and `eval` have more such means: rewards/chosen,
rewards/rejected, rewards/margins, rewards/accuracies, logps/chosen, logps/rejected.

Each line is written at once, so a killed process loses none, and synced to the disk with each checkpoint. A
resumed run drops the lines after its checkpoint (and a torn last line), so each step is there once; the file is then
replaced by a new one, which is how a reader that follows it notices.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError
from halfbyte.files import write_atomic

SCHEMA_VERSION = 1

Event = dict[str, Any]
Listener = Callable[[Event], None]


class EventLog:
    """The one writer of an events.jsonl. Listeners are told of every event after it is in the file."""

    def __init__(self, path: Path, listeners: Iterable[Listener] = ()) -> None:
        self.path = path
        self._listeners = list(listeners)
        # Unbuffered: one write a line, and nothing left that a full disk would refuse later.
        self._file = path.open("ab", buffering=0)

    def emit(self, event: str, **fields: object) -> Event:
        """Append one event and pass it on. A listener that fails is dropped, and that is an event too."""
        line: Event = {"event": event, "time": round(time.time(), 3), **_jsonable(fields)}
        data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise HalfbyteError(f"{self.path}: cannot write events: {error}") from error
        for listener in list(self._listeners):
            try:
                listener(line)
            except Exception as error:
                self._listeners.remove(listener)
                name = getattr(listener, "name", type(listener).__name__)
                self.emit("warning", step=fields.get("step"), message=f"{name} failed and gets no more events: {error}")
        return line

    def sync(self) -> None:
        """Onto the disk, so that the lines survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):  # what is not a regular file cannot be synced
                self.sync()
            self._file.close()


def read_events(path: Path) -> list[Event]:
    """All whole events of a file; a last line that is still being written, or was torn by a crash, is left out."""
    return parse_events(path.read_bytes(), path)


def parse_events(data: bytes, path: Path) -> list[Event]:
    """The events of `data`, of which the last line counts only with its line end."""
    events: list[Event] = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict) or "event" not in event:
            raise HalfbyteError(f"{path}:{number}: not an event; the file was changed by something else than halfbyte")
        events.append(event)
    return events


def drop_after(path: Path, step: int) -> int:
    """Keep the events up to the checkpoint of `step` and return how many were dropped.

    Everything from the first event of a later step on goes, and so does a torn last line.
    """
    if not path.exists():
        return 0
    data = path.read_bytes()
    events = parse_events(data, path)
    keep = next((i for i, event in enumerate(events) if (event.get("step") or 0) > step), len(events))
    kept = b"".join(line + b"\n" for line in data.split(b"\n")[:keep])
    if kept != data:
        write_atomic(path, kept)
    return len(events) - keep


def _jsonable(value: object) -> Any:
    """Plain JSON values; infinities and NaN, which JSON has not, become null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return _jsonable(value.item()) if hasattr(value, "item") else str(value)
