"""The demo's metric forgives nothing that a program reading the JSON would trip over."""

from pathlib import Path

import pytest

from halfbyte.demo import json_match as module
from halfbyte.demo.json_match import json_match
from halfbyte.evaluate.metrics import load_metric

EXPECTED = '{"intent":"order","item":"desk lamp","quantity":3,"due":null,"urgent":true,"name":"Maria"}'


@pytest.mark.parametrize(
    "same",
    [
        EXPECTED,
        f" {EXPECTED}\n",
        EXPECTED.replace(":", ": ").replace(",", ", "),
        '{"name":"Maria","intent":"order","item":"desk lamp","quantity":3,"due":null,"urgent":true}',
        EXPECTED.replace("Maria", "\\u004daria"),
    ],
)
def test_equal_objects_are_correct(same: str) -> None:
    assert json_match(same, EXPECTED)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "null",
        "[]",
        EXPECTED[:-1],
        EXPECTED + "}",
        EXPECTED + EXPECTED,
        f"```json\n{EXPECTED}\n```",
        f"Sure! {EXPECTED}",
        EXPECTED.replace("3", '"3"'),
        EXPECTED.replace("3", "3.0"),
        EXPECTED.replace("3", "NaN"),
        EXPECTED.replace("null", '"null"'),
        EXPECTED.replace("true", "1"),
        EXPECTED.replace('"', "'"),
        EXPECTED.replace("Maria", "maria"),
        EXPECTED.replace(',"name":"Maria"', ""),
        EXPECTED.replace("}", ',"note":null}'),
        EXPECTED.replace("}", ',"name":"Maria"}'),
        "[" * 100_000,
    ],
)
def test_anything_else_is_wrong(wrong: str) -> None:
    assert not json_match(wrong, EXPECTED)


def test_true_is_not_one() -> None:
    assert not json_match('{"quantity":true}', '{"quantity":1}')


def test_it_loads_as_a_users_own_metric() -> None:
    """As the demo itself does: the file by its path, with nothing of halfbyte around it."""
    metric = load_metric(f"{Path(str(module.__file__))}:json_match")
    assert metric.score(EXPECTED, EXPECTED, "row 1") == 1
    assert metric.score("no", EXPECTED, "row 1") == 0
