"""Rows: what each format becomes, and a reason for every row that breaks its rules."""

import json
from typing import Any

import pytest

from halfbyte.data.jinja import MARK_BEGIN
from halfbyte.data.options import RowFormat
from halfbyte.data.records import Chat, Completion, Labelled, Origin, Preference, Record, Row, RowError, Text
from halfbyte.data.rows import canonical, normalise

HERE = Origin("f.jsonl", 7)
USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def row(row_format: RowFormat, values: dict[str, Any], system_prompt: str | None = None) -> Row:
    return normalise(Record(HERE, values), row_format, system_prompt)


def chat(row_format: RowFormat, values: dict[str, Any], system_prompt: str | None = None) -> Chat:
    found = row(row_format, values, system_prompt)
    assert isinstance(found, Chat)
    return found


def test_messages() -> None:
    found = chat("messages", {"messages": [USER, ASSISTANT, USER, ASSISTANT], "tools": TOOLS})
    assert found.messages == [USER, ASSISTANT, USER, ASSISTANT]
    assert found.supervise == (False, True, False, True)
    assert found.tools == TOOLS
    assert found.origin == HERE


def test_weights_say_which_turns_are_learned() -> None:
    found = chat("messages", {"messages": [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT | {"weight": 1}]})
    assert found.supervise == (False, False, False, True)
    assert all("weight" not in message for message in found.messages)


def test_text_parts_developer_and_nulls() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "x", "name": None}, {"role": "user", "content": parts}, ASSISTANT]
    assert chat("messages", {"messages": messages}).messages == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "ab"},
        ASSISTANT,
    ]


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, json.dumps({"city": "Paris"})])
def test_tool_calls_have_objects_as_arguments(arguments: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "1", "content": "rain"}
    found = chat("messages", {"messages": [USER, {"role": "assistant", "tool_calls": [call]}, result, ASSISTANT]})
    assert found.messages[1]["content"] == ""
    assert found.messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert found.supervise == (False, True, False, True)


def test_tools_as_a_json_string() -> None:
    assert chat("messages", {"messages": [USER, ASSISTANT], "tools": json.dumps(TOOLS)}).tools == TOOLS


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "hello"},
    ]
    found = chat("conversations", {"conversations": turns, "system": "be kind"})
    roles = [message["role"] for message in found.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert found.supervise == (False, False, True, False, True)
    same = chat("conversations", {"conversations": [USER, ASSISTANT]})
    assert same.messages == [USER, ASSISTANT]


def test_alpaca() -> None:
    values = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "s", "history": [["a", "b"]]}
    assert [message["content"] for message in chat("alpaca", values).messages] == ["s", "a", "b", "Add.\n\n1, 2", "3"]
    bare = chat("alpaca", {"instruction": "Add.", "input": "", "output": "3"})
    assert bare.messages[0]["content"] == "Add."


def test_prompt_completion() -> None:
    assert row("prompt_completion", {"prompt": "a", "completion": "b"}) == Completion(HERE, "a", "b")
    lists = chat("prompt_completion", {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    assert lists.supervise == (False, False, False, True)


def test_text() -> None:
    assert row("text", {"text": "a\n"}) == Text(HERE, "a\n")


@pytest.mark.parametrize(
    ("label", "expected"),
    [(1, 1), (1.0, 1), ("1", 1), (" 0 ", 0), ("positive", "positive"), (True, "true")],
)
def test_labels(label: Any, expected: int | str) -> None:
    assert row("classification", {"sentence": "x", "label": label}) == Labelled(HERE, (("sentence", "x"),), expected)


def test_pairs() -> None:
    found = row("classification", {"premise": "a", "hypothesis": "b", "label": 0, "idx": 3})
    assert found == Labelled(HERE, (("premise", "a"), ("hypothesis", "b")), 0)


def test_preferences() -> None:
    answer = [{"role": "assistant", "content": "good"}]
    worse = [{"role": "assistant", "content": "bad"}]
    expected = Preference(HERE, [USER], answer, worse)
    assert row("preference", {"prompt": "hi", "chosen": "good", "rejected": "bad"}) == expected
    assert row("preference", {"chosen": [USER, *answer], "rejected": [USER, *worse]}) == expected
    assert row("preference", {"prompt": "hi", "chosen": [USER, *answer], "rejected": [USER, *worse]}) == expected


def test_system_prompt_only_where_there_is_none() -> None:
    found = chat("messages", {"messages": [USER, ASSISTANT]}, "be kind")
    assert found.messages[0] == {"role": "system", "content": "be kind"}
    assert found.supervise == (False, False, True)
    own = {"role": "system", "content": "own"}
    assert chat("messages", {"messages": [own, USER, ASSISTANT]}, "be kind").messages[0] == own


BROKEN: list[tuple[RowFormat, dict[str, Any], str]] = [
    ("messages", {}, "'messages' is missing"),
    ("messages", {"messages": None}, "'messages' is null"),
    ("messages", {"messages": "[]"}, "'messages' must be a list of messages, this is a string"),
    ("messages", {"messages": []}, "this is empty"),
    ("messages", {"messages": ["hi"]}, "messages[0] must be an object with role and content"),
    ("messages", {"messages": [{"role": "human", "content": "hi"}]}, "has the role 'human'; known are system"),
    ("messages", {"messages": [{"role": ["user"], "content": "hi"}]}, "has the role ['user']"),
    ("messages", {"messages": [USER]}, "no message of the assistant"),
    ("messages", {"messages": [USER, ASSISTANT | {"weight": 0}]}, "weight 0"),
    ("messages", {"messages": [USER, ASSISTANT | {"weight": 0.5}]}, "weight must be 0 or 1"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": " "}]}, "messages[1]: the assistant's content"),
    ("messages", {"messages": [{"role": "user", "content": 3}, ASSISTANT]}, "content must be a string"),
    ("messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}, ASSISTANT]}, "only text parts"),
    ("messages", {"messages": [USER, ASSISTANT | {"tool_calls": [{"id": 1}]}]}, "has no function name"),
    ("messages", {"messages": [USER, ASSISTANT | {"tool_calls": {}}]}, "tool_calls must be a list"),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        "tool_calls[0].arguments is not valid JSON",
    ),
    ("messages", {"messages": [USER, ASSISTANT], "tools": "weather"}, "tools is not valid JSON"),
    ("messages", {"messages": [USER, ASSISTANT], "tools": ["weather"]}, "tools must be a list of objects"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}, "surrogate"),
    ("messages", {"messages": [USER, {"role": "assistant", "content": MARK_BEGIN}]}, "U+10FFFC"),
    ("conversations", {"conversations": [{"from": "alien", "value": "x"}]}, "is from 'alien'; known are"),
    ("conversations", {"conversations": [{"from": "gpt", "value": None}]}, "the assistant's content is empty"),
    ("conversations", {"conversations": {}}, "must be a list of turns"),
    ("alpaca", {"instruction": "a"}, "'output' is missing (alpaca row)"),
    ("alpaca", {"instruction": "", "output": "b"}, "'instruction' is empty"),
    ("alpaca", {"instruction": "a", "output": "b", "input": 3}, "'input' must be a string, this is the int 3"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["x"]]}, "history[0] must be a pair"),
    ("prompt_completion", {"prompt": "a", "completion": ""}, "'completion' is empty"),
    ("prompt_completion", {"prompt": "a", "completion": float("nan")}, "'completion' must be a string, this is NaN"),
    ("prompt_completion", {"prompt": "a", "completion": [ASSISTANT]}, "must both be strings or both"),
    ("text", {"text": "  \n"}, "'text' is empty"),
    ("classification", {"sentence": "x", "label": -1}, "unlabelled"),
    ("classification", {"sentence": "x", "label": 0.5}, "'label' must be an integer or a word"),
    ("classification", {"sentence": "x", "label": float("nan")}, "this is NaN"),
    ("classification", {"sentence": "x", "label": ""}, "this is empty"),
    ("classification", {"sentence": "x"}, "'label' is missing"),
    ("classification", {"premise": "x", "label": 1}, "'hypothesis' is missing"),
    ("preference", {"chosen": "a", "rejected": "b"}, "there is no prompt"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": "a"}, "are the same"),
    ("preference", {"prompt": "p", "chosen": [ASSISTANT, USER], "rejected": "a"}, "'chosen' does not end with"),
]


@pytest.mark.parametrize(("row_format", "values", "reason"), BROKEN)
def test_broken_rows_say_why(row_format: RowFormat, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        row(row_format, values)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_canonical_ignores_where_a_row_came_from() -> None:
    first = normalise(Record(Origin("a", 1), {"text": "x"}), "text")
    second = normalise(Record(Origin("b", 2), {"text": "x"}), "text")
    assert canonical(first) == canonical(second) != canonical(Completion(HERE, "x", "x"))
    assert canonical(row("preference", {"prompt": "p", "chosen": "a", "rejected": "b"}))
