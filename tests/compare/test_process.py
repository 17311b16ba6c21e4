"""Which cells run together, and what is told of a worker that ended."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.compare import process as processes
from halfbyte.compare.design import Cell
from halfbyte.compare.process import Active, Stage, _fits, _message, run_cells
from halfbyte.run.config import RunConfig


def ended(log: Path, before: str, own: str) -> Any:
    log.write_text(before + own)
    process: Any = subprocess.CompletedProcess([], 1)
    cell: Any = None
    return Active(cell, "train", process, log, len(before.encode()), None)


def test_a_worker_is_told_by_its_own_lines(tmp_path: Path) -> None:
    """The log of a cell has all its workers: what was mended since is not what went wrong now."""
    before = "failed: the disk became full while ü was written: free some space and try again\n"
    crashed = ended(tmp_path / "log", before, "Traceback (most recent call last):\nValueError: odd\n")
    assert "the end of its output: ValueError: odd" in _message(crashed, 1)
    assert "disk" not in _message(crashed, 1)
    assert _message(ended(tmp_path / "log", before, "failed: no such file\n"), 2) == "no such file"
    assert "the end of its output: nothing" in _message(ended(tmp_path / "log", before, ""), 1)
    assert _message(ended(tmp_path / "log", before, ""), -9) == "it was ended by SIGKILL (out of memory?), 2 times"


def test_a_metric_that_fails_does_not_stop_who_goes_on_from_its_run(tmp_path: Path) -> None:
    config = RunConfig(model="m", data="d", output_dir=tmp_path)
    source = Cell("source", "qlora", 1, config, {}, False)
    after = Cell("after", "switch", 1, config, {}, False, source="source")
    closed = []

    def next_stage(cell: Cell) -> Stage | None:
        return ("metrics", {"config": {}, "asked": {}, "allow_code_execution": False}) if cell is source else None

    outcome = run_cells(
        [source, after], tmp_path, next_stage, lambda cell, _: closed.append(cell.id), 1, 1e12, lambda _: None
    )
    assert outcome.failed.keys() == {"source"}
    assert closed == ["after"]


def cell(name: str, peak: float) -> Cell:
    config = RunConfig(model="m", data="d", output_dir=Path("runs"))
    return Cell(name, name, 1, config, {}, False, peak_p95=peak)


def test_cells_run_together_where_their_planned_memory_fits(tmp_path: Path) -> None:
    process: Any = None
    beside = [Active(cell(name, 3e9), "train", process, tmp_path, 0, None) for name in ("a", "b")]
    assert _fits(cell("c", 4e9), beside, memory=10e9)
    assert not _fits(cell("c", 4.1e9), beside, memory=10e9)
    assert _fits(cell("c", 7e9), beside[:1], memory=10e9)
    assert _fits(cell("alone", 11e9), [], memory=10e9)  # the plan is a guess, and nothing else would be left to try


@pytest.mark.parametrize(("memory", "together"), [(10e9, 2), (5e9, 1)], ids=["enough", "short"])
def test_where_memory_forbids_it_no_cells_run_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: float, together: int
) -> None:
    """Two of three may, by the number of jobs; memory for one alone leaves them one after another, and none out."""

    def start(one: Cell, root: Path, stage: Stage, metered: bool) -> Active:
        """A worker that leaves when it is polled for the second time."""
        process: Any = SimpleNamespace(poll=iter((None, 0)).__next__, stdin=None)
        running.append(one.id)
        most.append(len(running))
        return Active(one, stage[0], process, tmp_path / "log", 0, None)

    def finish(one: Cell, _: Any) -> None:
        running.remove(one.id)

    def next_stage(one: Cell) -> Stage | None:
        return None if one.id in running else ("train", {})

    running: list[str] = []
    most: list[int] = []
    monkeypatch.setattr(processes, "start", start)
    cells = [cell(name, 4e9) for name in "abc"]
    outcome = run_cells(cells, tmp_path, next_stage, finish, 2, memory, lambda _: None)
    assert outcome.failed == {}
    assert len(most) == 3
    assert max(most) == together
