"""Writing GGUF files piece by piece: the header is known from the plan, so no tensor has to be held whole.

The `gguf` package's writer takes a tensor only as one array, and a vocabulary only decoded; here values are bytes (a
source's can be copied as they lie) and tensors come in pieces. Format (ggml's docs/gguf.md, version 3, little-endian):
magic, version, counts, key-value pairs, tensor table, padding to 32 bytes, then each tensor's bytes, padded likewise.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
from torch import Tensor

from halfbyte.files import new_file
from halfbyte.quant.gguf_encode import row_bytes

ALIGNMENT = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9

Fields = dict[str, bytes]
"""Metadata: key -> the value's type number and bytes, as the file has them."""


def uint32(value: int) -> bytes:
    return struct.pack("<II", _UINT32, value)


def float32(value: float) -> bytes:
    return struct.pack("<If", _FLOAT32, value)


def boolean(value: bool) -> bytes:
    return struct.pack("<I?", _BOOL, value)


def string(value: str) -> bytes:
    return struct.pack("<I", _STRING) + _text(value)


def strings(values: Sequence[str]) -> bytes:
    return struct.pack("<IIQ", _ARRAY, _STRING, len(values)) + b"".join(map(_text, values))


def int32s(values: Sequence[int]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}i", _ARRAY, _INT32, len(values), *values)


def float32s(values: Sequence[float]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}f", _ARRAY, _FLOAT32, len(values), *values)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: `pieces()` makes its bytes, uint8, in order. `shape` is torch's."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.shape[-1], self.type_name)


def header(fields: Mapping[str, bytes], entries: Sequence[Entry]) -> bytes:
    """Everything before the tensors' data, padding included."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(fields))]
    parts += [_text(key) + value for key, value in fields.items()]
    offset = 0
    for entry in entries:
        dims = tuple(reversed(entry.shape))
        kind = int(gguf.GGMLQuantizationType[entry.type_name])
        parts.append(_text(entry.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        offset += entry.nbytes + _padding(entry.nbytes)
    text = b"".join(parts)
    return text + bytes(_padding(len(text)))


def write_container(
    path: Path,
    start: bytes,
    entries: Sequence[Entry],
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write `start` (a `header`) and the tensors to `path`, whole: where anything raises, what was there stays.

    `on_bytes` hears how many bytes of tensors each piece had.
    """
    with new_file(path) as part, part.open("wb") as file:
        file.write(start)
        for entry in entries:
            written = 0
            for piece in entry.pieces():
                raw = piece.contiguous().view(-1).numpy()
                file.write(raw.data)
                written += raw.nbytes
                if on_bytes is not None:
                    on_bytes(raw.nbytes)
            if written != entry.nbytes:
                raise ValueError(f"{entry.name}: {written} bytes came, {entry.nbytes} were planned")
            file.write(bytes(_padding(written)))


def _padding(nbytes: int) -> int:
    return -nbytes % ALIGNMENT
