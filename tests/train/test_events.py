"""events.jsonl: writing, reading, torn lines, going back to a checkpoint."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.errors import HalfbyteError
from halfbyte.train.events import EventLog, drop_after, read_events


def write(path: Path, count: int) -> EventLog:
    log = EventLog(path)
    log.emit("start", step=0)
    for step in range(1, count + 1):
        log.emit("step", step=step, loss=1 / step)
    return log


def test_each_line_is_there_at_once_and_numbers_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = write(path, 3)
    events = read_events(path)
    assert [event["event"] for event in events] == ["start", "step", "step", "step"]
    assert [event["loss"] for event in events[1:]] == [1.0, 1 / 2, 1 / 3]
    assert all(isinstance(event["time"], float) for event in events)
    log.close()
    log.close()


def test_what_json_has_not_becomes_null(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "e")
    values = {"a": math.inf, "b": np.float32(0.5), "c": {1: (math.nan, 2)}, "d": Path("x"), "e": None, "f": "ü"}
    log.emit("eval", **values)
    log.close()
    line = json.loads((tmp_path / "e").read_text())
    assert {key: line[key] for key in values} == {
        "a": None,
        "b": 0.5,
        "c": {"1": [None, 2]},
        "d": "x",
        "e": None,
        "f": "ü",
    }


def test_a_torn_last_line_is_not_an_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, 2).close()
    whole = path.read_bytes()
    for cut in range(1, 20):
        path.write_bytes(whole[:-cut])
        assert len(read_events(path)) == 2


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "start", "time": 1}\nnonsense\n{"event": "end", "time": 2}\n')
    with pytest.raises(HalfbyteError, match=r"events.jsonl:2: not an event"):
        read_events(path)
    path.write_text("[1]\n")
    with pytest.raises(HalfbyteError, match=r":1: not an event"):
        read_events(path)


def test_going_back_drops_what_comes_after(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = write(path, 5)
    log.emit("warning", step=5, message="late")
    log.close()
    before = path.read_bytes()
    assert drop_after(path, 5) == 0
    assert path.read_bytes() == before
    with path.open("ab") as file:
        file.write(b'{"event": "st')
    assert drop_after(path, 3) == 3
    assert [event["step"] for event in read_events(path)] == [0, 1, 2, 3]
    assert before.startswith(path.read_bytes())
    assert drop_after(tmp_path / "absent", 3) == 0


def test_a_failing_listener_is_dropped_and_said(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []

    class Service:
        name = "the service"

        def __call__(self, event: dict[str, Any]) -> None:
            raise OSError("unreachable")

    log = EventLog(tmp_path / "e", [Service(), heard.append])
    log.emit("step", step=1)
    log.emit("step", step=2)
    log.close()
    events = read_events(tmp_path / "e")
    assert [event["event"] for event in events] == ["step", "warning", "step"]
    assert events[1]["message"] == "the service failed and gets no more events: unreachable"
    assert len(heard) == 3


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this system")
    log = EventLog(full)
    with pytest.raises(HalfbyteError, match=r"/dev/full: cannot write events: .*No space left"):
        log.emit("step", step=1)
    log.close()
