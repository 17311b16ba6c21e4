"""The container: equal to the gguf package's reader, and one clear line for every kind of damage."""

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import UsageError
from halfbyte.models.gguf_file import GgufFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "small.gguf")


def write(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_int8("a.negative", -3)
    writer.add_uint64("a.large", 1 << 40)
    writer.add_float64("a.double", 0.1)
    writer.add_array("a.words", ["ein", "zwei", "drei ▁"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("one", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("two", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_equals_the_packages_reader(path: Path) -> None:
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if key.startswith("GGUF."):
            continue
        assert (ours.array(key) if isinstance(field.contents(), list) else ours.get(key)) == field.contents()
    assert ours.get("a.words") == 3
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert (mine.offset, mine.nbytes, mine.type_name) == (
            tensor.data_offset,
            tensor.n_bytes,
            tensor.tensor_type.name,
        )
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))


def test_every_cut_is_one_line(path: Path) -> None:
    whole = path.read_bytes()
    end = max(tensor.offset + tensor.nbytes for tensor in GgufFile(path).tensors.values())  # padding may follow
    for length in [0, 1, 3, 4, 8, 20, 23, *range(24, end, 7), end - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError) as caught:
            GgufFile(path)
        assert "small.gguf" in str(caught.value)
        assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 1 << 32), changes=st.integers(1, 6))
def test_damaged_bytes_never_escape(tmp_path_factory: pytest.TempPathFactory, seed: int, changes: int) -> None:
    """Either it still reads, or it is a UsageError; nothing is allocated beyond the file's size."""
    path = write(tmp_path_factory.mktemp("gguf") / "small.gguf")
    data, chance = bytearray(path.read_bytes()), random.Random(seed)
    for _ in range(changes):
        data[chance.randrange(len(data) - 116)] = chance.randrange(256)
    path.write_bytes(bytes(data))
    try:
        file = GgufFile(path)
        for key in ("a.words", "a.numbers"):
            file.array(key)
    except UsageError:
        pass


def header(version: int = 3, tensors: int = 0, pairs: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04 not a model", "does not start with GGUF"),
        (b"", "not a GGUF file"),
        (header(version=1), "version 1 GGUF file; versions 2 and 3"),
        (header(version=3 << 24), "big-endian"),
        (header(tensors=1 << 60), "claims 1152921504606846976 tensors"),
        (header(pairs=1 << 60), "metadata entries"),
        (header(pairs=1) + text("key") + struct.pack("<I", 99), "unknown type 99"),
        (header(pairs=1) + text("key") + struct.pack("<IIQ", 9, 8, 1 << 61), "strings"),
        (header(pairs=1) + text("key") + struct.pack("<IIQ", 9, 6, 1 << 61), "array elements"),
        (header(pairs=1) + text("key") + struct.pack("<IIQ", 9, 9, 1), "array of type 9"),
        (header(pairs=1) + struct.pack("<Q", 1 << 62) + b"key padded well", "cut off"),
        (header(tensors=1) + text("t") + struct.pack("<I", 1 << 30) + b"0" * 40, "1073741824 dimensions"),
        (header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 4, 999, 0), "ggml type 999"),
        (header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 33, 8, 0), "rows of 33 in blocks of 32"),
        (header(tensors=1) + text("t") + struct.pack("<IQIQ", 1, 1 << 40, 0, 0), "is cut off: tensor t ends"),
        (header(pairs=1) + text("general.alignment") + struct.pack("<II", 4, 0), "not a power of two"),
    ],
)
def test_hostile_headers(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=message) as caught:
        GgufFile(path)
    assert "bad.gguf" in str(caught.value)


def test_a_tensor_listed_twice(tmp_path: Path) -> None:
    row = text("t") + struct.pack("<IQIQ", 1, 1, 0, 0)
    (tmp_path / "bad.gguf").write_bytes(header(tensors=2) + row + row + bytes(64))
    with pytest.raises(UsageError, match="lists tensor t twice"):
        GgufFile(tmp_path / "bad.gguf")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        GgufFile(tmp_path)
