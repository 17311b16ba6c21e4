"""Row formats from columns: one fits, or the error names the choices."""

import pytest

from halfbyte.data.detection import check_columns, detect, rename
from halfbyte.data.records import Origin, Record
from halfbyte.errors import UsageError


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("messages", "messages"),
        ("id messages tools", "messages"),
        ("conversations system", "conversations"),
        ("instruction input output", "alpaca"),
        ("instruction output", "alpaca"),
        ("prompt completion", "prompt_completion"),
        ("text", "text"),
        ("text meta", "text"),
        ("sentence label", "classification"),
        ("text label", "classification"),
        ("sentence1 sentence2 label idx", "classification"),
        ("premise hypothesis label", "classification"),
        ("question sentence label", "classification"),
        ("prompt chosen rejected", "preference"),
        ("chosen rejected", "preference"),
    ],
)
def test_each_format_is_found(columns: str, expected: str) -> None:
    assert detect([frozenset(columns.split())], "f") == expected


def test_the_columns_of_most_rows_decide() -> None:
    rows = [frozenset(["text"])] * 3 + [frozenset(["messages"])] * 2
    assert detect(rows, "f") == "text"


@pytest.mark.parametrize(
    ("columns", "choices"),
    [
        ("instruction input output text", "data_format: alpaca or text"),
        ("prompt chosen rejected messages", "data_format: messages or preference"),
    ],
)
def test_ambiguous_columns_name_the_choices(columns: str, choices: str) -> None:
    with pytest.raises(UsageError, match=choices):
        detect([frozenset(columns.split())], "f.jsonl")


def test_unknown_columns_name_what_was_found_and_how_to_map() -> None:
    with pytest.raises(UsageError, match=r"^f: .* from its columns body, title: map them with columns"):
        detect([frozenset(["title", "body"])], "f")
    with pytest.raises(UsageError, match=r"columns: \{instruction: question, output: answer\}"):
        detect([frozenset(["question", "answer"])], "f")


def test_a_mapping_settles_what_would_be_ambiguous() -> None:
    columns = frozenset(["prompt", "completion", "text"])
    assert detect([columns], "f", frozenset(["prompt", "completion"])) == "prompt_completion"


def test_rename() -> None:
    values: dict[str, object] = {"question": 1, "answer": 2, "prompt": 3, "other": 4}
    assert rename(values, {"prompt": "question", "completion": "answer"}) == {"prompt": 1, "completion": 2, "other": 4}
    assert rename({"a": 1}, {"text": "b"}) == {"a": 1}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"promt": "question"}, "there is no part 'promt': did you mean 'prompt'?"),
        ({"zzz": "question"}, "known are canonical_solution, chosen"),
        ({"prompt": "questoin"}, "no column 'questoin' (for 'prompt'): did you mean 'question'?"),
        ({"prompt": "zzz"}, "it has answer, question"),
    ],
)
def test_wrong_mappings(columns: dict[str, str], message: str) -> None:
    records = [Record(Origin("f", 1), {"question": "", "answer": ""})]
    with pytest.raises(UsageError) as caught:
        check_columns(columns, records, "f")
    assert message in str(caught.value)
