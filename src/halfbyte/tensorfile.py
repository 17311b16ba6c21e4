"""safetensors files written and read in pieces, so that no tensor has to be in memory whole.

    write_file(path, [Planned, ...])     the header is known from the plan
    TensorFile(path)                     a mapping of name -> tensor that reads one, or a part of it, when it is asked

Format (safetensors' README): 8 bytes of header length, a JSON object of name -> dtype, shape, data_offsets with
`__metadata__`, padded with spaces to 8 bytes, then the tensors' bytes in order without gaps. transformers insists on
the metadata `format: pt`.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte import rawfile

DTYPE_CODES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
_MOST_HEADER = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `rows()` makes it in pieces along its first dimension, in `dtype`.

    read   rows start to stop without making the others, for tensors where that is possible; else None
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[], Iterator[Tensor]]
    read: Callable[[int, int], Tensor] | None = None

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Planned":
        """A tensor that is there."""
        return cls(name, tuple(tensor.shape), tensor.dtype, lambda: iter((tensor,)))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(
    path: Path,
    tensors: Sequence[Planned],
    on_bytes: Callable[[int], None] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Make the tensors one after the other and write them. `on_bytes` hears how many bytes each piece had.

    metadata   further entries of the header's `__metadata__`
    """
    with path.open("wb") as file:
        file.write(_header(tensors, metadata or {}))
        for tensor in tensors:
            written = 0
            for piece in tensor.rows():
                if piece.dtype != tensor.dtype:
                    raise ValueError(f"{tensor.name}: a piece in {piece.dtype} where {tensor.dtype} was planned")
                raw = rawfile.bytes_of(piece.detach().cpu().contiguous())
                file.write(raw)
                written += raw.nbytes
                if on_bytes is not None:
                    on_bytes(raw.nbytes)
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes came, {tensor.nbytes} were planned")


def _header(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    at = 0
    for tensor in tensors:
        end = at + tensor.nbytes
        entries[tensor.name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def largest_items_first(tensors: Sequence[Planned]) -> list[Planned]:
    """In an order in which each tensor begins at a multiple of its own element, which other readers rely on."""
    return sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)


@dataclass(frozen=True)
class _Place:
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file's tensors, each read when it is asked for. The file stays open as long as this lives.

    ValueError for a file that is no such thing; OSError and `rawfile.CutOff` where it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.path = path
        self._places = self._read_header()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # `os` may be gone as the interpreter exits
        if getattr(self, "_fd", -1) >= 0:
            close(self._fd)

    def _read_header(self) -> dict[str, _Place]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        if not 0 < length <= min(_MOST_HEADER, size - 8):
            raise ValueError(f"{self.path} is not a safetensors file")
        entries = json.loads(os.pread(self._fd, length, 8))
        places = {}
        try:
            for name, entry in entries.items():
                if name != "__metadata__":
                    start, stop = entry["data_offsets"]
                    place = _Place(_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + start)
                    if (
                        stop - start != place.numel * place.dtype.itemsize
                        or not 0 <= start <= stop <= size - length - 8
                    ):
                        raise ValueError(f"{self.path}: the bytes of {name} are not where its header says")
                    places[name] = place
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} has a broken header: {error}") from error
        return places

    def layout(self, name: str) -> tuple[torch.Size, torch.dtype]:
        place = self._places[name]
        return torch.Size(place.shape), place.dtype

    def part(self, name: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor, a copy."""
        place = self._places[name]
        if not 0 <= start <= stop <= place.numel:
            raise IndexError(f"{name} has {place.numel} elements, not {start} to {stop}")
        out = torch.empty(stop - start, dtype=place.dtype)
        rawfile.read_into(self._fd, out, place.offset + start * place.dtype.itemsize)
        return out

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return self.part(name, 0, place.numel).view(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def layout_of(tensors: Mapping[str, Tensor], name: str) -> tuple[torch.Size, torch.dtype]:
    """Shape and type of a tensor, without reading it where it lies in a file."""
    if isinstance(tensors, TensorFile):
        return tensors.layout(name)
    return tensors[name].shape, tensors[name].dtype


def part_of(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Elements start..stop of a flattened tensor, reading no others where it lies in a file."""
    if isinstance(tensors, TensorFile):
        return tensors.part(name, start, stop)
    return tensors[name].reshape(-1)[start:stop]
