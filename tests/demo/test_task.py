"""The demo's rows: reproducible, strictly disjoint where the module says so, and scored without mercy."""

import json
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

from halfbyte.demo.json_match import json_match
from halfbyte.demo.phrasing import HELD_OUT, TRAIN, Phrasing
from halfbyte.demo.task import (
    DAYS,
    HELD_OUT_ROWS,
    TRAIN_ROWS,
    held_out_rows,
    train_rows,
    write_task,
)

Row = dict[str, Any]
TRAINING, HELD = train_rows(), held_out_rows()


def prompt(row: Row) -> str:
    return str(row["messages"][0]["content"])


def answer(row: Row) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(row["messages"][1]["content"])
    return parsed


def phrases(side: Phrasing) -> set[str]:
    """Every sentence and phrase of a side, without case, punctuation and slots."""
    groups = [
        side.due,
        side.opening,
        side.closing,
        side.greeting,
        side.urgent,
        side.calm,
        side.neutral,
        *side.bodies.values(),
    ]
    plain = str.maketrans("", "", string.punctuation.replace("'", ""))
    return {re.sub(r"\{\w+\}", "_", text).lower().translate(plain).strip() for group in groups for text in group}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second, other = (
        [path.read_bytes() for path in write_task(tmp_path / name, seed=seed)]
        for name, seed in (("a", 42), ("b", 42), ("c", 43))
    )
    assert first == second
    assert first[0] != other[0]
    assert first[1] != other[1]
    assert [json.loads(line) for line in first[0].decode().splitlines()] == TRAINING
    assert [json.loads(line) for line in first[1].decode().splitlines()] == HELD


def test_counts_and_no_row_twice() -> None:
    assert len({prompt(row) for row in TRAINING}) == TRAIN_ROWS
    assert len({prompt(row) for row in HELD}) == HELD_OUT_ROWS
    assert len({prompt(row) for row in TRAINING + HELD}) == TRAIN_ROWS + HELD_OUT_ROWS


def test_no_phrase_is_on_both_sides() -> None:
    assert not phrases(TRAIN) & phrases(HELD_OUT)


def test_names_and_items_are_disjoint_also_word_by_word() -> None:
    assert not set(TRAIN.names) & set(HELD_OUT.names)
    words = [{word for item in side.items for word in item.split()} for side in (TRAIN, HELD_OUT)]
    assert not words[0] & words[1]


def test_an_s_makes_every_item_plural() -> None:
    assert not [
        item for side in (TRAIN, HELD_OUT) for item in side.items if re.search(r"(s|x|z|ch|sh|[^aeo]y|f)$", item)
    ]


def test_dates_are_disjoint() -> None:
    dates = [{answer(row)["due"] for row in rows} - {None, *DAYS} for rows in (TRAINING, HELD)]
    assert all(dates)
    assert not dates[0] & dates[1]


def test_rows_contain_only_their_own_side() -> None:
    """The generator draws from the side that it was given: checked on the rows, not on the tables."""
    for rows, own, other in ((TRAINING, TRAIN, HELD_OUT), (HELD, HELD_OUT, TRAIN)):
        assert {answer(row)["item"] for row in rows} <= set(own.items)
        assert {answer(row)["name"] for row in rows} <= {None, *own.names}
        foreign = {*other.names, *other.items}
        assert not [word for row in rows for word in foreign if re.search(rf"\b{word}s?\b", prompt(row))]


def test_every_value_of_every_field_is_learnt_and_asked() -> None:
    for rows in (TRAINING, HELD):
        for field, values in (
            ("intent", {"order", "return", "repair", "cancel"}),
            ("urgent", {True, False}),
            ("quantity", set(range(1, 13))),
        ):
            counts = Counter(answer(row)[field] for row in rows)
            assert set(counts) == values
            assert min(counts.values()) * len(values) * 4 > len(rows)
    assert {answer(row)["due"] for row in TRAINING} >= {None, *DAYS}


def test_the_answer_can_be_read_from_the_request() -> None:
    """Each copied value stands in the request, and an absent one does not: the task needs no guessing."""
    for row in TRAINING + HELD:
        request, fields = prompt(row), answer(row)
        assert list(fields) == ["intent", "item", "quantity", "due", "urgent", "name"]
        assert re.search(rf"\b{fields['item']}s?\b", request)
        assert fields["due"] is None or re.search(rf"\b{fields['due']}\b", request)
        assert fields["name"] is None or re.search(rf"\b{fields['name']}\b", request)
        names = {*TRAIN.names, *HELD_OUT.names} - {fields["name"]}
        assert not [name for name in names if re.search(rf"\b{name}\b", request)]


def test_completions_are_compact_strict_json() -> None:
    for row in TRAINING + HELD:
        text = row["messages"][1]["content"]
        assert text == json.dumps(json.loads(text), separators=(",", ":"))
        assert json_match(text, text)
