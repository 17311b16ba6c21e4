"""What is told of a worker that ended."""

import subprocess
from pathlib import Path
from typing import Any

from halfbyte.compare.design import Cell
from halfbyte.compare.process import Active, Stage, _message, run_cells
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
