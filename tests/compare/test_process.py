"""What is told of a worker that ended."""

import subprocess
from pathlib import Path
from typing import Any

from halfbyte.compare.process import Active, _message


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
