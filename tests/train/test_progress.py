"""What is shown of a run: steady estimates, plain lines, the live display, following another process."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from halfbyte.train.events import EventLog, drop_after
from halfbyte.train.lock import Lock
from halfbyte.train.progress import Progress, describe, duration, follow

from . import tiny

START = {"event": "start", "time": 0.0, "step": 0, "total_steps": 500, "total_tokens": None, "trainable_parameters": 9}


def step(number: int, tokens: int = 1000, seconds: float = 1.0, **more: Any) -> dict[str, Any]:
    fields = {"event": "step", "time": number * seconds, "step": number, "tokens": tokens, "seconds": seconds}
    return {**fields, "loss": 1.0, "memory_bytes": 2_000_000_000, **more}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (11100, "3 h 05 min"), (190_000, "2 d 4 h")],
)
def test_durations_are_as_exact_as_they_deserve(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def show(events: list[dict[str, Any]], terminal: bool) -> str:
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=100, legacy_windows=False)
    with Progress(console) as progress:
        for event in events:
            progress(event)
    return output.getvalue()


EVENTS = [
    START,
    *[step(number, seconds=4.0) for number in range(1, 8)],
    {"event": "eval", "time": 29.0, "step": 7, "seconds": 1.0, "loss": 0.5, "best": True, "accuracy": 0.75},
    {"event": "warning", "time": 30.0, "step": 7, "message": "something [odd]"},
    {"event": "checkpoint", "time": 30.0, "step": 7, "seconds": 0.5, "path": "checkpoint-7", "bytes": 3},
    {"event": "end", "time": 31.0, "step": 7, "total_steps": 500, "status": "interrupted", "seconds": 29.5}
    | {"tokens_per_second": 250.0, "final_loss": 1.0, "eval_loss": 0.5, "peak_memory_bytes": 2_100_000_000},
]


def test_plain_lines() -> None:
    assert show(EVENTS, terminal=False).splitlines() == [
        "training 9 parameters for 500 steps",
        "step 1/500  loss 1.0000  250 tokens/s  2.00 GB  33 min left",
        "step 4/500  loss 1.0000  250 tokens/s  2.00 GB  33 min left",
        "step 7/500  loss 1.0000  250 tokens/s  2.00 GB  33 min left",
        "evaluation at step 7: loss 0.5000 (the best so far), accuracy 0.7500",
        "warning: something [odd]",
        "interrupted after step 7 of 500: 30 s, 250 tokens/s, loss 1.0000, eval loss 0.5000, peak memory 2.10 GB",
    ]


def test_what_was_predicted_is_said_at_the_start_and_after_a_rehearsal() -> None:
    start = {**START, "total_tokens": 5000, "predicted": {"seconds": {"train": 600.0}, "probed": False}}
    rehearsal = {"event": "rehearsal", "time": 1.0, "step": 0, "seconds": 8.0, "peak_memory_bytes": 2_000_000_000}
    rehearsal |= {"predicted": {"seconds": {"train": 1200.0}, "probed": True}, "memory_limit_bytes": None}
    lines = show([start, rehearsal], terminal=False).splitlines()
    assert lines[0] == "training 9 parameters for 500 steps; about 10 min to go"
    assert lines[1].endswith("; about 20 min to go")


def test_the_live_display_ends_with_the_last_state() -> None:
    output = show(EVENTS, terminal=True)
    assert "step 7/500" in output
    assert "1 %" in output
    assert "evaluation at step 7" in output
    assert output.endswith("peak memory 2.10 GB\n")
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1


def test_every_event_of_a_real_run_can_be_shown(tmp_path: Path) -> None:
    output = io.StringIO()
    with Progress(Console(file=output, width=120)) as progress:
        tiny.run(tmp_path / "run", steps=4, eval_steps=2, listeners=(progress,))
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("training 6,656 parameters for 4 steps")
    assert lines[-1].startswith("completed after step 4 of 4: ")
    assert describe({**START, "event": "resume", "step": 3}) == "resuming after step 3 of 500"


def test_follow_gives_each_event_once_also_through_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lock = Lock(tmp_path / "run.lock")
    lock.acquire()
    log = EventLog(path)
    log.emit("start", step=0)
    moments = 0

    def sleep(seconds: float) -> None:
        """What the other process does while the follower waits."""
        nonlocal moments, log
        moments += 1
        if moments == 1:
            log.emit("step", step=1)
            log.emit("step", step=2)
            with path.open("a") as file:
                file.write('{"event": "st')
        elif moments == 2:
            log.close()
            drop_after(path, 1)
            log = EventLog(path)
            log.emit("resume", step=1)
            log.emit("step", step=2, again=True)
            log.emit("step", step=3)
        else:
            log.emit("end", step=3)
            log.close()
            lock.release()

    seen = [(event["event"], event["step"]) for event in follow(tmp_path, sleep=sleep)]
    expected = "start 0, step 1, step 2, resume 1, step 2, step 3, end 3"
    assert ", ".join(f"{kind} {number}" for kind, number in seen) == expected


def test_follow_a_run_that_is_over_or_not_there(tmp_path: Path) -> None:
    assert list(follow(tmp_path)) == []
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "end", "time": 1, "step": 2}) + "\n")
    assert [event["event"] for event in follow(tmp_path)] == ["end"]
