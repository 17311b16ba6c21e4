"""Files, folders and tables: rows with the right origins; errors that name the file."""

import csv
import gzip
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.options import DataSource
from halfbyte.data.reading import read_file, read_source, read_text
from halfbyte.data.records import RawData
from halfbyte.data.tables import read_csv
from halfbyte.errors import UsageError


def lines(data: RawData) -> list[int]:
    return [record.origin.line for record in data.records]


def test_csv_line_numbers_with_newlines_in_quotes() -> None:
    data = read_csv(b'text,label\n"one\ntwo",0\n\nthree,1\n', "f.csv", ",")
    assert [(record.origin.line, record.values) for record in data.records] == [
        (2, {"text": "one\ntwo", "label": "0"}),
        (5, {"text": "three", "label": "1"}),
    ]


def test_csv_rows_of_another_width_are_bad() -> None:
    data = read_csv(b"a,b\n1,2\n1\n1,2,3\n", "f.csv", ",")
    assert [str(bad) for bad in data.bad] == [
        "f.csv:3: 1 field where the header has 2",
        "f.csv:4: 3 fields where the header has 2",
    ]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'a,b\n1,2\n"x,2\n', "f.csv:3: not valid CSV: unexpected end of data (a quote is never closed)"),
        (b"a,a\n1,2\n", "f.csv:1: the column 'a' is named twice"),
        (b"\n\n", "f.csv: the file is empty"),
    ],
)
def test_broken_csv(raw: bytes, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_csv(raw, "f.csv", ",")
    assert message in str(caught.value)


def test_a_csv_field_may_be_long_and_the_limit_is_put_back() -> None:
    before = csv.field_size_limit()
    data = read_csv(b"text\n" + b"x" * 500_000 + b"\n", "f.csv", ",")
    assert len(data.records[0].values["text"]) == 500_000
    assert csv.field_size_limit() == before


cell = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"))


@given(st.lists(st.tuples(cell, cell), min_size=1))
def test_what_csv_writes_is_read(rows: list[tuple[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([("a", "b"), *rows])
    data = read_csv(buffer.getvalue().encode(), "f.csv", ",")
    assert [tuple(record.values.values()) for record in data.records] == rows


def test_tsv_and_gzip(tmp_path: Path) -> None:
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b"a\tb\n1,5\t2\n"))
    assert read_file(tmp_path / "a.tsv.gz", "a").records[0].values == {"a": "1,5", "b": "2"}
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n')[:-4])
    with pytest.raises(UsageError, match="not a whole gzip file"):
        read_file(tmp_path / "b.jsonl.gz", "b")


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": "a"}], "n": 1}, {"messages": None, "n": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    data = read_file(tmp_path / "a.parquet", "a.parquet")
    assert [record.values for record in data.records] == rows
    assert lines(data) == [1, 2]
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UsageError, match=r"^cut: not a whole Parquet file"):
        read_file(tmp_path / "cut.parquet", "cut")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"pip install 'halfbyte\[data\]'"):
        read_file(tmp_path / "a.parquet", "a.parquet")


TEXT = b"one\ntwo\n\n\nthree\r\n \nfour"


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("paragraph", [(1, "one\ntwo"), (5, "three"), (7, "four")]),
        ("line", [(1, "one"), (2, "two"), (5, "three"), (7, "four")]),
        ("document", [(1, "one\ntwo\n\n\nthree\n \nfour")]),
    ],
)
def test_text_files(split: str, expected: list[tuple[int, str]]) -> None:
    data = read_text(TEXT, "f.txt", split)
    assert [(record.origin.line, record.values["text"]) for record in data.records] == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.json", b"[]", "the file holds no rows"),
        ("a.csv", b"a,b\n", "the file holds no rows"),
        ("a.xml", b"<a/>", "unknown kind of file; known are .jsonl"),
    ],
)
def test_files_without_rows(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_source(DataSource(path=str(tmp_path / name)))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert message in str(caught.value)


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "some/where/else", "/nowhere/x"])
def test_a_missing_file(path: str) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        read_source(DataSource(path=path))


def folder(tmp_path: Path, *names: str) -> DataSource:
    for number, name in enumerate(names):
        (tmp_path / name).write_text(f'{{"n": {number}}}\n')
    return DataSource(path=str(tmp_path))


def numbers(data: RawData) -> list[int]:
    return [record.values["n"] for record in data.records]


def test_a_folder_gives_its_training_or_held_out_files(tmp_path: Path) -> None:
    source = folder(tmp_path, "dev.jsonl", "test.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl")
    data = read_source(source)
    assert numbers(data) == [2, 3]
    assert data.records[1].origin.file == str(tmp_path / "train-00001-of-00002.jsonl")
    assert "read train-00000-of-00002.jsonl, train-00001-of-00002.jsonl of 4 data files" in data.notes[0]
    assert numbers(read_source(source, evaluation=True)) == [0]


def test_a_folder_of_unnamed_splits_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("not data")
    assert numbers(read_source(folder(tmp_path, "a.jsonl", "b.jsonl", "testimony.jsonl"))) == [0, 1, 2]


def test_a_folder_that_does_not_say(tmp_path: Path) -> None:
    source = folder(tmp_path, "test.jsonl", "other.jsonl")
    with pytest.raises(UsageError, match="which files are the training rows"):
        read_source(source)


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no data file in this folder"):
        read_source(DataSource(path=str(tmp_path)))
