"""Numbers and names as the pages print them."""

import pytest

from halfbyte.compare.page.text import (
    Scale,
    capital,
    clean,
    clean_lines,
    fitted,
    number,
    plain,
    scale_for,
    significant,
    width,
    wrapped,
)  # fmt: skip
from halfbyte.compare.schema import Figure, Unit

THIN = "\u202f"


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (1234567.0, 0, f"1{THIN}234{THIN}567"),
        (-0.004, 2, "0.00"),
        (-1.5, 1, "−1.5"),
        (0.1 + 0.2, 3, "0.300"),
        (1549.0, -2, f"1{THIN}500"),
    ],
)
def test_numbers(value: float, decimals: int, text: str) -> None:
    assert number(value, decimals) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2e-5, "2e-5"),
        (0.0002, "2e-4"),
        (0.5, "0.5"),
        (480_000, f"480{THIN}000"),
        (3.0, "3"),
        (0.31899, "0.319"),
        (-2e-5, "−2e-5"),
    ],
)
def test_single_numbers(value: float, text: str) -> None:
    assert plain(value) == text


@pytest.mark.parametrize(
    ("unit", "values", "scale"),
    [
        ("bytes", [1.2e9, 4.1e9], Scale("GB", 1e9)),
        ("bytes", [15e6, 536e6], Scale("MB", 1e6)),
        ("bytes", [200], Scale("bytes", 1.0)),
        ("bytes", [], Scale("bytes", 1.0)),
        ("seconds", [1.5, 2.2], Scale("s", 1.0)),
        ("seconds", [700.0, 1000.0], Scale("min", 60.0)),
        ("seconds", [0.04], Scale("ms", 1e-3)),
        ("seconds", [9e4], Scale("h", 3600.0)),
        ("share", [0.9], Scale("%", 0.01)),
        ("count", [3_796_992, 268_098_176], Scale("million", 1e6)),
        ("count", [900, 268_098_176], Scale("", 1.0)),
        ("joules", [30_000.0], Scale("kJ", 1e3)),
        ("money", [0.03], Scale("EUR", 1.0)),
    ],
)
def test_units_fit_the_whole_column(unit: Unit, values: list[float], scale: Scale) -> None:
    assert scale_for(unit, values, "EUR") == scale


def test_the_interval_decides_the_digits() -> None:
    scale = Scale("GB", 1e9)
    narrow = Figure(mean=1.23456e9, low=1.2335e9, high=1.2357e9, n=3)
    wide = Figure(mean=1.23456e9, low=1.1e9, high=1.4e9, n=3)
    assert (scale.digits([narrow]), scale.digits([wide])) == (4, 2)
    assert scale.digits([Figure(mean=1.23456e9, n=1)]) == 2
    assert scale.digits([]) == 0
    sharp = Figure(mean=60.87481e6, low=60.87480e6, high=60.87482e6, n=3)
    assert Scale("MB", 1e6).digits([sharp]) == 3
    assert Scale("").digits([Figure(mean=3.0, low=3.0, high=3.0, n=3)]) == 0


def test_same_ends_are_no_interval() -> None:
    assert Scale("").interval(2.0, 2.0, 1) == ""
    assert Scale("").interval(None, 2.0, 1) == ""
    assert Scale("%", 0.01).interval(0.5, 0.75, 0) == "50 to 75"


def test_headings_have_the_unit_once() -> None:
    assert Scale("MB", 1e6).titled("peak memory") == "Peak memory, MB"
    assert Scale("EUR").titled("cost of a run (EUR)") == "Cost of a run (EUR)"
    assert Scale("tokens/s").titled("tokens a second") == "Tokens a second"
    assert capital("mAP at 50") == "mAP at 50"


def test_what_cannot_be_printed_is_shown_to_be_there() -> None:
    assert clean("a\x00b\u202ec\ud800\u200b") == "a�b�c��"
    assert clean("two\r\nlines\tand tabs") == "two lines and tabs"
    assert clean("480\u202f000 µ 模型 👩\u200d💻") == "480\u202f000 µ 模型 👩\u200d💻"
    assert clean_lines("a \\\n\tb\x07") == "a \\\n    b�"


def test_names_are_cut_to_the_room() -> None:
    long = "a name that nobody could want to read on a chart"
    cut = fitted(long, 12, 100)
    assert cut.endswith("…")
    assert width(cut, 12) <= 100
    assert fitted(long, 12, 1000) == long
    assert fitted("模型" * 30, 12, 60).count("模") == 2


def test_lines_are_broken_between_words() -> None:
    lines = wrapped("one two three four five six", 10, 60, 3)
    assert lines[:2] == ["one two", "three four"]
    assert len(wrapped("word " * 50, 10, 60, 3)) == 3
    assert all(width(line, 10) <= 60 for line in wrapped("word " * 50 + "x" * 90, 10, 60, 3))


def test_significant_digits() -> None:
    assert [significant(value, 2) for value in (123.0, 1.5, 0.0123, 0.0)] == [-1, 1, 3, 0]
