"""A weight in the blocks of its GGUF file: the base is the file's bytes, and its memory is the file's.

A LoRA trained on it has seen exactly the weights that llama.cpp serves, so nothing is lost between training and
serving. The native engine multiplies with the blocks as they are (`csrc/engine/gguf.inc`); `gguf_decode` is the
reference and what runs elsewhere.
"""

from collections.abc import Callable
from typing import Any, Self

import gguf
import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.ops.linear import GGUF_TYPES, WeightView, decode_rows, gguf_view
from halfbyte.quant.gguf_decode import dequantize_into
from halfbyte.quant.weight import Weight


def is_trainable_on(type_name: str, columns: int) -> bool:
    """Whether a matrix of this block type and width can be a base as it is."""
    return type_name in GGUF_TYPES and columns % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0] == 0


class GgufWeight(Weight):
    """A matrix in one of GGUF's block types.

    data       uint8, flat: the tensor's bytes, row after row in the file's order
    head_rows  rows of a head whose halves the file interleaves (`models.gguf_config.PERMUTED`), 0 where it does not:
               `dequantize` and the engine undo it
    """

    data: Tensor

    def __init__(self, data: Tensor, type_name: str, shape: tuple[int, int], head_rows: int = 0) -> None:
        super().__init__()
        if not is_trainable_on(type_name, shape[1]):
            raise ValueError(f"{type_name} in rows of {shape[1]} is not a base to train on")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
        self.row_bytes = shape[1] // block * size
        if data.dtype != torch.uint8 or data.shape != (shape[0] * self.row_bytes,):
            raise ValueError(f"{shape[0] * self.row_bytes} bytes are needed, not {data.dtype} {list(data.shape)}")
        if head_rows and (shape[0] % head_rows or head_rows % 2):
            raise UsageError(f"{shape[0]} rows are not heads of {head_rows}: the config is of another model")
        self.shape, self.type_name, self.head_rows, self.block_bytes = shape, type_name, head_rows, size
        self._view: tuple[int, WeightView | None] | None = None
        self.register_buffer("data", data)

    @property
    def format(self) -> str:
        return self.type_name.lower()

    @property
    def source_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def native_view(self) -> WeightView | None:
        # The engine multiplies pairs of rows; an odd matrix is decoded and left to torch.
        return None if self.shape[0] % 2 else self._decoded_by()

    def _decoded_by(self) -> WeightView | None:
        if not self.data.is_cpu:
            return None
        key = self.data.data_ptr()
        if self._view is None or self._view[0] != key:
            self._view = key, gguf_view(self.data, self.type_name, self.shape, self.head_rows)
        return self._view[1]

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """As in `Weight`; a fresh tensor without `out`."""
        first, last = self._row_range(rows)
        if out is None:
            out = torch.empty(last - first, self.shape[1], dtype=dtype, device=self.data.device)
        else:
            self._check_out(out, dtype, last - first)
        view = self._decoded_by()
        if view is not None and out.is_contiguous() and decode_rows(view, out, first):
            return out
        whole = slice(first, last)
        self._decode(torch.arange(first, last, device=self.data.device) if self.head_rows else whole, out)
        return out

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(index.numel(), self.shape[1], dtype=dtype, device=self.data.device)
        view = self._decoded_by()
        if view is None or not decode_rows(view, out, index=index.contiguous()):
            self._decode(index, out)
        return out

    def _decode(self, rows: Tensor | slice, out: Tensor) -> None:
        """Rows of the matrix into `out`, by torch."""
        raw = self.data.view(self.shape[0], self.row_bytes)
        if isinstance(rows, Tensor):
            raw = raw.index_select(0, self._stored(rows) if self.head_rows else rows)
        else:
            raw = raw[rows]
        dequantize_into(raw.reshape(-1, self.block_bytes), self.type_name, out)

    def _stored(self, rows: Tensor) -> Tensor:
        """Where the file keeps these rows: p and p + d / 2 of a head of d rows lie at 2p and 2p + 1."""
        in_head, half = rows % self.head_rows, self.head_rows // 2
        return rows - in_head + 2 * (in_head % half) + in_head // half

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}  # addresses are of no use to a copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._view = None
        moved = fn(self.data)
        self._buffers["data"] = moved if moved.dtype == torch.uint8 else self.data.to(moved.device)
        return self
