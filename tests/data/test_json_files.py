"""JSON Lines and JSON: right line numbers, and one clear message for each way of being broken."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.json_files import read_json, read_jsonl
from halfbyte.errors import UsageError


def reasons(raw: bytes) -> dict[int, str]:
    return {bad.line: bad.reason for bad in read_jsonl(raw, "f.jsonl").bad}


def test_lines_are_counted_with_blank_ones_and_windows_endings() -> None:
    data = read_jsonl(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "\xe2\x80\xa8"}\n', "f.jsonl")
    assert [(record.origin.line, record.values) for record in data.records] == [(1, {"a": 1}), (4, {"a": "\u2028"})]
    assert not data.bad


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": 1} {"a": 2}', "not valid JSON (extra data"),
        (b"[1]", "a row must be an object {…}, this is a list"),
        (b"3", "this is a number"),
        (b"null", "this is null"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is given twice"),
        (b'{"a": {"b": 1, "b": 1}}', "the key 'b' is given twice"),
        (b'{"a": NaN}', "NaN is not a JSON value"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON value"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer"),
    ],
)
def test_a_broken_row_is_named_with_its_line(line: bytes, reason: str) -> None:
    found = reasons(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert list(found) == [2]
    assert reason in found[2]


@pytest.mark.parametrize("tail", [b'{"a": "hal', b'{"a": "caf\xc3', b'{"a": 1'])
def test_half_written_last_line(tail: bytes) -> None:
    assert reasons(b'{"a": 1}\n' + tail) == {2: "half-written: the file ends in the middle of this row"}


def test_a_whole_last_line_needs_no_newline() -> None:
    assert len(read_jsonl(b'{"a": 1}\n{"a": 2}', "f.jsonl").records) == 2


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_utf16_is_one_message_not_a_thousand(codec: str, read: object) -> None:
    with pytest.raises(UsageError, match=r"^f\.json.*save it as UTF-8$"):
        read('[{"a": 1}]'.encode(codec), "f.json")  # type: ignore[operator]


def test_json_array_lines() -> None:
    text = '[\n  {"a": 1},\n  {\n    "a": 2\n  }, {"a": 3}\n]\n'
    data = read_json(text.encode(), "f.json")
    assert [(record.origin.line, record.values["a"]) for record in data.records] == [(2, 1), (3, 2), (5, 3)]


def test_json_array_sets_bad_rows_aside() -> None:
    data = read_json(b'[{"a": 1},\n{"a": 1, "a": 2},\n3,\n{"a": NaN},\n{"a": 4}]', "f.json")
    assert [record.values["a"] for record in data.records] == [1, 4]
    assert [(bad.line, bad.reason.split()[0]) for bad in data.bad] == [(2, "the"), (3, "a"), (4, "NaN")]


def test_an_empty_array_has_no_rows() -> None:
    assert read_json(b" [ ]\n", "f.json").records == []


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "f.json: the file is empty"),
        (b'[{"a": 1},\n{"a": "x', "f.json:2: the file ends in the middle of a row"),
        (b'[{"a": 1},\n{"a": 2}', "f.json:2: the file ends in the middle of a row"),
        (b'[{"a": 1},\n', "f.json:2: the file ends"),
        (b'[{"a": 1}\n{"a": 2}]', "f.json:2: not valid JSON (expected ',' or ']' after a row)"),
        (b'[{"a": 1},\n{a: 2}]', "f.json:2: not valid JSON"),
        (b'[{"a": 1}] []', "f.json:1: not valid JSON (text after the list's end)"),
        (b'{"data": [{"a": 1}]}', "this is one object with the keys 'data'"),
        (b'"text"', "must hold a list of objects"),
        (b'[{"a":\n\n"\xff"}]', "f.json:3: not UTF-8 text (byte 0xff)"),
    ],
)
def test_broken_json_files(raw: bytes, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_json(raw, "f.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_lines_named_json_is_noted() -> None:
    data = read_json(b'{"a": 1}\n{"a": 2}\n', "f.json")
    assert [record.origin.line for record in data.records] == [1, 2]
    assert "JSON Lines although it is named .json" in data.notes[0]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(), lambda inner: st.lists(inner, max_size=3)
)


@given(st.lists(st.dictionaries(st.text(), values, max_size=3), min_size=1), st.sampled_from([None, 1]))
def test_what_json_writes_is_read(rows: list[dict[str, object]], indent: int | None) -> None:
    array = read_json(json.dumps(rows, indent=indent).encode(), "f.json")
    lines = read_jsonl("\n".join(map(json.dumps, rows)).encode(), "f.jsonl")
    assert [record.values for record in array.records] == rows == [record.values for record in lines.records]
    assert [record.origin.line for record in lines.records] == list(range(1, len(rows) + 1))
