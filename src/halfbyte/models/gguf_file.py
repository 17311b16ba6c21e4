"""The GGUF container: metadata and the table of tensors, read without touching a weight.

The format (ggml's docs/gguf.md, versions 2 and 3, little-endian): magic, version, counts, key-value
pairs, tensor table, padding to the alignment, data. The `gguf` package's reader makes a numpy array
of every vocabulary entry (6 s and hundreds of MB for 150,000 of them); this one walks past arrays
and decodes one when it is asked for. Every length is checked against the file's before anything is
allocated, so that a hostile or half-written file is an error and not a crash.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from halfbyte.errors import UsageError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_PLAIN = {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}


@dataclass(frozen=True)
class GgufTensor:
    """One row of the tensor table; `shape` in torch's order, `offset` from the start of the file."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def quantized(self) -> bool:
        return self.type_name not in _PLAIN


@dataclass(frozen=True)
class _ArrayAt:
    """An array in the file that nobody has asked for yet."""

    offset: int
    element_type: int
    count: int


class GgufFile:
    """`metadata` values by key (arrays through `array`), `tensors` by their GGUF names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata: dict[str, Any] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.size = len(data)
                self._parse(_Cursor(data, path))
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # mmap of an empty file
            raise UsageError(f"{path} is not a GGUF file: {error}") from error

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value; an array's length for arrays."""
        value = self._metadata.get(key, default)
        return value.count if isinstance(value, _ArrayAt) else value

    def need(self, key: str) -> Any:
        """A metadata value without which the file is of no use."""
        value = self.get(key)
        if value is None:
            raise UsageError(f"{self.path} has no {key} in its metadata: convert the model again with llama.cpp")
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._metadata

    def keys_of(self, prefix: str) -> list[str]:
        """The metadata keys that start so, in the file's order."""
        return [key for key in self._metadata if key.startswith(prefix)]

    def raw(self, key: str) -> bytes:
        """A metadata value as it lies in the file, its type number first: to copy what need not be understood."""
        start, stop = self._spans[key]
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def array(self, key: str) -> list[Any]:
        """An array of numbers or strings, decoded now; [] where the key is absent."""
        where = self._metadata.get(key)
        if not isinstance(where, _ArrayAt):
            return []
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, self.path, where.offset)
            if where.element_type == _STRING:
                return [cursor.text() for _ in range(where.count)]
            code = _SCALARS[where.element_type][1]
            return list(cursor.unpack(f"<{where.count}{code}"))

    def _parse(self, cursor: "_Cursor") -> None:
        if cursor.take(4) != b"GGUF":
            raise UsageError(f"{self.path} is not a GGUF file: it does not start with GGUF")
        (version,) = cursor.unpack("<I")
        if version not in (2, 3):
            kind = "big-endian or damaged" if version & 0xFFFF == 0 or version > 99 else f"version {version}"
            raise UsageError(f"{self.path} is a {kind} GGUF file; versions 2 and 3, little-endian, can be read")
        tensor_count, pair_count = cursor.unpack("<QQ")
        cursor.check_count(pair_count, 12, "metadata entries")
        for _ in range(pair_count):
            key = cursor.text()
            start = cursor.position
            (kind,) = cursor.unpack("<I")
            self._metadata[key] = cursor.value(kind)
            self._spans[key] = (start, cursor.position)
        cursor.check_count(tensor_count, 24, "tensors")
        table = [self._table_row(cursor) for _ in range(tensor_count)]
        alignment = self._metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise UsageError(f"{self.path}: general.alignment {alignment!r} is not a power of two; the file is damaged")
        start = -(-cursor.position // alignment) * alignment
        for name, type_name, shape, offset, nbytes in table:
            if name in self.tensors:
                raise UsageError(f"{self.path} lists tensor {name} twice; the file is damaged")
            if start + offset + nbytes > self.size:
                raise UsageError(
                    f"{self.path} is cut off: tensor {name} ends at byte {start + offset + nbytes}, the file at "
                    f"{self.size}; download or copy it again"
                )
            self.tensors[name] = GgufTensor(name, type_name, shape, start + offset, nbytes)

    def _table_row(self, cursor: "_Cursor") -> tuple[str, str, tuple[int, ...], int, int]:
        name = cursor.text()
        (dims,) = cursor.unpack("<I")
        if not 0 < dims <= _MAX_DIMS:
            raise UsageError(f"{self.path}: tensor {name} has {dims} dimensions; the file is damaged")
        shape = tuple(reversed(cursor.unpack(f"<{dims}Q")))
        if 0 in shape:
            raise UsageError(f"{self.path}: tensor {name} is empty, {list(shape)}; the file is damaged")
        type_id, offset = cursor.unpack("<IQ")
        try:
            kind = gguf.GGMLQuantizationType(type_id)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UsageError(
                f"{self.path}: tensor {name} is of ggml type {type_id}, which the installed gguf package does not "
                "know: update it (pip install -U gguf), or use a file in a common type such as Q4_K_M or Q8_0"
            ) from None
        if shape[-1] % block:
            raise UsageError(
                f"{self.path}: tensor {name} has rows of {shape[-1]} in blocks of {block}; the file is damaged"
            )
        elements = 1
        for size in shape:
            elements *= size
        return name, kind.name, shape, offset, elements // block * block_bytes


class _Cursor:
    """A position in the mapped header that refuses to run past the file's end."""

    def __init__(self, data: mmap.mmap, path: Path, position: int = 0) -> None:
        self.data = data
        self.path = path
        self.position = position

    def take(self, count: int) -> bytes:
        self._require(count)
        piece = self.data[self.position : self.position + count]
        self.position += count
        return piece

    def unpack(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(form)
        self._require(size)
        values = struct.unpack_from(form, self.data, self.position)
        self.position += size
        return values

    def text(self) -> str:
        (length,) = self.unpack("<Q")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.path}: text at byte {self.position} is not UTF-8; the file is damaged") from error

    def check_count(self, count: int, least: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold, at `least` bytes each."""
        if count * least > len(self.data) - self.position:
            raise UsageError(f"{self.path} claims {count} {what}, more than fit in it; the file is cut off or damaged")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._skip_array()
        if kind not in _SCALARS:
            raise UsageError(f"{self.path}: metadata of unknown type {kind} before byte {self.position}; damaged file")
        return self.unpack(_SCALARS[kind])[0]

    def _skip_array(self) -> _ArrayAt:
        element_type, count = self.unpack("<IQ")
        where = _ArrayAt(self.position, element_type, count)
        if element_type in _SCALARS:
            size = struct.calcsize(_SCALARS[element_type])
            self.check_count(count, size, "array elements")
            self.position += count * size
        elif element_type == _STRING:
            self.check_count(count, 8, "strings")
            for _ in range(count):
                (length,) = self.unpack("<Q")
                self._require(length)
                self.position += length
        else:
            raise UsageError(f"{self.path}: an array of type {element_type} cannot be read; the file is damaged")
        return where

    def _require(self, count: int) -> None:
        if count > len(self.data) - self.position:
            raise UsageError(
                f"{self.path} is cut off: its header needs {count} bytes at {self.position}, "
                f"the file has {len(self.data)}; download or copy it again"
            )
