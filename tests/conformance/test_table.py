"""The table of docs/bitsandbytes.md names every test of this folder, and no others, with their numbers of cases."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "bitsandbytes.md"


def rows() -> list[list[str]]:
    lines = PAGE.read_text(encoding="utf-8").split("## bitsandbytes' own test cases")[1].splitlines()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    return found[1:]


def claimed() -> dict[str, str]:
    """Our tests of the table -> the cell with their number of cases."""
    return {row[2]: row[3] for row in rows() if row[2]}


def test_every_row_has_five_cells_and_either_a_test_or_a_reason() -> None:
    for original, cases, ours, number, why in rows():
        assert bool(ours) == bool(number)
        assert ours or "not applicable" in why
        assert cases == "" or cases.replace(",", "").isdigit()
        assert original or ours


def test_every_test_here_is_in_the_table() -> None:
    tests = {
        f"{path.stem}::{node.name}"
        for path in HERE.glob("test_*.py")
        if path != Path(__file__)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert tests == set(claimed())


@pytest.mark.slow
def test_the_numbers_of_cases_are_those_that_run() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", str(HERE)]
    done = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=True)
    names = re.findall(r"^tests/conformance/(\w+)\.py::(\w+)(\[\S*(?:direct|registered))?", done.stdout, re.MULTILINE)
    found = Counter(f"{file}::{test}" for file, test, _ in names)
    both = {f"{file}::{test}" for file, test, route in names if route}
    for name, cell in claimed().items():
        assert cell == f"{found[name]}{', both' if name in both else ''}", name
