"""Macro-F1, and the figures of always the same answer, against values by hand."""

import json
import math
from pathlib import Path

import pytest

from halfbyte.data import DataOptions, prepare
from halfbyte.evaluate.classify import most_frequent
from halfbyte.evaluate.metrics import macro_f1
from tests.evaluate.conftest import byte_tokenizer


def test_macro_f1_of_a_confusion() -> None:
    """a: 2 right of 3 said and 2 there, b: 1 of 2 and 2, c: never said, d: said once and never there."""
    references = ["a", "a", "b", "b", "c", "c"]
    predictions = ["a", "a", "b", "a", "b", "d"]
    by_hand = (2 * 2 / (3 + 2) + 2 * 1 / (2 + 2) + 0 + 0) / 4
    assert macro_f1(predictions, references) == pytest.approx(by_hand)
    assert macro_f1(references, references) == 1.0
    assert macro_f1(["x"], ["y"]) == 0.0


def test_macro_f1_has_no_value_for_nothing() -> None:
    with pytest.raises(ValueError, match="no rows"):
        macro_f1([], [])
    with pytest.raises(ValueError, match="1 predictions against 2"):
        macro_f1(["a"], ["a", "b"])


def test_always_the_same_answer(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate("aaab")]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare(DataOptions(data=str(file), task="classification", eval_split=0), byte_tokenizer(), seed=0)
    result = most_frequent(found.train, ["a", "b", "never"])
    assert result.metrics == {"accuracy": 0.75, "macro_f1": pytest.approx((2 * 3 / (4 + 3)) / 2)}
    assert result.loss == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert result.supervised_tokens == 4
    assert [row.prediction for row in result.rows] == ["a"] * 4
