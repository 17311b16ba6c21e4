"""Published peaks: copied exactly, predicted row by row, fitted on at most half; the page is what the code makes."""

import json
import statistics
from collections import Counter
from functools import reduce
from pathlib import Path

import pytest

from halfbyte.plan import anchors, published, stacks
from halfbyte.plan.anchors import crossing, line_through

PAGE = Path(__file__).parents[2] / "docs" / "published-memory.md"
ROWS = anchors.rows()


def test_the_page_is_what_the_code_makes() -> None:
    assert PAGE.read_text() == published.page(), "python -m halfbyte.plan.published > docs/published-memory.md"


@pytest.mark.shared
def test_every_figure_is_the_shared_files_and_none_is_left_out(shared: Path) -> None:
    blocks = {b["id"]: b for b in json.loads((shared / "anchors/memory_published.json").read_text())["blocks"]}

    def leaves(value: object, at: str) -> list[str]:
        if isinstance(value, dict):
            return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{at} > {key}")]
        if isinstance(value, list):
            return [leaf for index, inner in enumerate(value) for leaf in leaves(inner, f"{at} > {index}")]
        return [at]

    def at(path: str) -> object:
        def step(value, key):  # type: ignore[no-untyped-def]
            return value[int(key)] if isinstance(value, list) else value[key]

        return reduce(step, path.split(" > "), blocks)

    figures = [
        leaf
        for name, block in blocks.items()
        for part in ("rows", "llama3.3_70b")
        for leaf in leaves(block.get(part, {}), f"{name} > {part}")
        if " > vram_gb > " not in leaf
    ]
    assert sorted(row.at for row in ROWS) == sorted(figures)
    for row in ROWS:
        assert at(row.at) == row.published, row.at
        if row.unit == "tokens":
            name, part, _, index = row.at.split(" > ")
            assert at(f"{name} > {part} > vram_gb > {index}") == row.card


def test_at_most_half_of_each_stacks_rows_calibrate_in_a_fixed_order() -> None:
    of, calibrating = Counter(row.stack for row in ROWS), Counter(row.stack for row in ROWS if row.calibrates)
    assert all(2 * calibrating[name] <= count for name, count in of.items())
    assert 2 * sum(calibrating.values()) <= len(ROWS)
    for name in of:
        figures = [row for row in ROWS if row.stack == name and row.published is not None]
        assert [row.calibrates for row in figures] == [index % 2 == 1 for index in range(len(figures))]


@pytest.mark.parametrize("name", sorted({row.stack for row in ROWS}))
def test_a_stacks_factor_is_what_its_calibrating_rows_give(name: str) -> None:
    fitted = anchors.fit(name, [row for row in ROWS if row.calibrates])
    assert stacks.find(name).activation_factor == fitted, "write the fitted factor into stacks.yaml"


def test_held_out_rows_are_predicted() -> None:
    held_out = [r for r in anchors.results() if not r.row.calibrates]
    errors = [abs(r.bytes_error) for r in held_out if r.bytes_error is not None]
    assert len(errors) > 27
    assert statistics.median(errors) < 0.05
    assert sum(error < 0.10 for error in errors) >= 0.85 * len(errors)


def test_where_nothing_fitted_nothing_is_predicted_to_fit() -> None:
    none = [r for r in anchors.results() if r.row.published is None]
    assert len(none) == 2
    assert all(r.agrees for r in none)


def test_points_on_a_line_are_found_and_one_off_the_line_is_not() -> None:
    assert line_through([(12, 932), (16, 2551), (80, 28454)]) == pytest.approx((404.735, -3924.8), rel=1e-3)
    assert line_through([(12, 932), (16, 2560), (80, 28454)]) is None


def test_rounded_points_that_no_line_goes_through_are_found() -> None:
    assert crossing([(0, 1), (1, 2), (2, 3)], rounding=1) is None
    # A slope of at least 4 over the first step, and at most 1 over the second.
    assert crossing([(0, 0), (1, 5), (2, 5)], rounding=1) == ((0, 1), (1, 2))
