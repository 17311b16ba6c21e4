"""Writing safetensors files piece by piece: the header is known from the plan, so no tensor has to be held whole.

Format (safetensors' README): 8 bytes of header length, a JSON object of name -> dtype, shape, data_offsets with
`__metadata__`, padded with spaces to 8 bytes, then the tensors' bytes in order without gaps. transformers insists on
the metadata `format: pt`.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int32: "I32"}


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

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Sequence[Planned], shard_bytes: int) -> dict[str, list[Planned]]:
    """File name -> its tensors, in order; transformers' names. A tensor larger than a shard gets one of its own."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def shard_index(shards: dict[str, list[Planned]]) -> str:
    """The text of model.safetensors.index.json."""
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def write_file(path: Path, tensors: Sequence[Planned], on_bytes: Callable[[int], None] | None = None) -> None:
    """Make the tensors one after the other and write them. `on_bytes` hears how many bytes each piece had."""
    with path.open("wb") as file:
        file.write(_header(tensors))
        for tensor in tensors:
            written = 0
            for piece in tensor.rows():
                if piece.dtype != tensor.dtype:
                    raise ValueError(f"{tensor.name}: a piece in {piece.dtype} where {tensor.dtype} was planned")
                # A view as bytes: numpy knows no bfloat16.
                raw = piece.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                file.write(raw.data)
                written += raw.nbytes
                if on_bytes is not None:
                    on_bytes(raw.nbytes)
            if written != tensor.nbytes:
                raise ValueError(f"{tensor.name}: {written} bytes came, {tensor.nbytes} were planned")


def _header(tensors: Sequence[Planned]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
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
