"""Every writer of final files, killed at its file operations, on a full disk and without rights: see tests/kill.py."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.kill_cases import cases

KILL = Path(__file__).with_name("kill.py")
NAMES = [case.name for case in cases()]
SOON = ("file-over", "new-files", "folder-over", "checkpoint", "naive")


@cache
def examine(*words: str) -> dict[str, Any]:
    """The reports by name; one process for all, as it loads torch."""
    done = subprocess.run([sys.executable, KILL, "--json", *words], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("no C compiler here, or not Linux")
    reports = {report["name"]: report for report in map(json.loads, done.stdout.splitlines())}
    assert reports, done.stderr
    return reports


def check(report: dict[str, Any]) -> None:
    print(report["name"], report["operations"], "file operations,", report["points"])
    assert report["problems"] == []
    assert report["points"]["kill"] >= 4
    assert report["points"]["full"] >= 2
    assert report["points"]["denied"] >= 2


@pytest.mark.parametrize("name", [name for name in SOON if name != "naive"])
def test_killed_at_some_of_its_file_operations(name: str) -> None:
    check(examine(*SOON, "--every", "2")[name])


def test_a_naive_writer_is_found_out() -> None:
    problems = "\n".join(examine(*SOON, "--every", "2")["naive"]["problems"])
    assert "a.json is written under its final name" in problems
    assert "b.json is renamed to its place before it is synced" in problems
    assert "a.json: is neither the old one nor the new one" in problems
    assert "folder . is not synced after a rename in it" in problems
    assert "not one line for the user: OSError" in problems


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_at_every_file_operation(name: str) -> None:
    report = examine(name)[name]
    check(report)
    assert report["points"]["kill"] == report["operations"]
