"""Frozen weights: to everything above this package a weight is a shape and `dequantize()`.

`DenseWeight` holds 16 or 32 bits a value, `BlockWeight` a block format of `halfbyte.ops`. Both are modules with
buffers, so that a model's `.to(device)` and `state_dict()` carry them.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.ops.linear import WeightView, block_view, dense_view
from halfbyte.quant import bnb_format
from halfbyte.quant.options import QuantOptions

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class Weight(nn.Module):
    """A weight matrix `[out_features, in_features]`, however it is stored."""

    shape: tuple[int, int]

    @property
    def format(self) -> str:
        """The storage in a word: "bf16", "nf4", "nf4+dq", …"""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes held, constants included."""
        tensors = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def constants_nbytes(self) -> int:
        """Bytes of `nbytes` that are quantization constants; 0 where they are among the codes, as in GGUF's blocks."""
        return 0

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """The matrix, or only its `rows` (step 1), in `dtype`; into a contiguous `out` where given."""
        raise NotImplementedError

    @property
    def source_dtype(self) -> torch.dtype:
        """The type that the weight had before quantization, and that a merge writes."""
        raise NotImplementedError

    def is_dense_in(self, dtype: torch.dtype) -> bool:
        """Whether `dequantize(dtype)` is the held tensor itself, without work."""
        return False

    def trainable_tensor(self) -> Tensor | None:
        """The parameter that full fine-tuning trains; None for a frozen weight."""
        return None

    def native_view(self) -> WeightView | None:
        """What the native engine needs to read the weight in place; None where it cannot. It holds addresses only."""
        return None

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Single rows, as an embedding does: int64 [N] -> [N, in_features] in `dtype`; nothing else is decoded."""
        raise NotImplementedError

    def _row_range(self, rows: slice | None) -> tuple[int, int]:
        first, last, step = (rows or slice(None)).indices(self.shape[0])
        if step != 1:
            raise ValueError(f"rows of a weight are taken in steps of 1, not {step}")
        return first, max(first, last)

    def _check_out(self, out: Tensor, dtype: torch.dtype, rows: int) -> None:
        if out.dtype != dtype or out.shape != (rows, self.shape[1]):
            raise ValueError(f"out is {out.dtype} {list(out.shape)}, {dtype} {[rows, self.shape[1]]} is needed")

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.format}"


class DenseWeight(Weight):
    """A 16- or 32-bit matrix; a parameter where it is trained (full fine-tuning), a buffer where it is frozen."""

    tensor: Tensor

    def __init__(self, tensor: Tensor, trainable: bool = False) -> None:
        super().__init__()
        if tensor.dtype not in DTYPE_NAMES or tensor.dim() != 2:
            raise ValueError(f"a dense weight is a matrix in 16 or 32 bits, not {tensor.dtype} {list(tensor.shape)}")
        self.shape = (tensor.shape[0], tensor.shape[1])
        if trainable:
            self.tensor = nn.Parameter(tensor.detach())
        else:
            self.register_buffer("tensor", tensor.detach())

    @property
    def format(self) -> str:
        return DTYPE_NAMES[self.tensor.dtype]

    @property
    def source_dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def is_dense_in(self, dtype: torch.dtype) -> bool:
        return self.tensor.dtype == dtype

    def trainable_tensor(self) -> Tensor | None:
        return self.tensor if isinstance(self.tensor, nn.Parameter) else None

    def native_view(self) -> WeightView | None:
        return dense_view(self.tensor)

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return nn.functional.embedding(index, self.tensor).to(dtype)

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """As in `Weight`; without `out` and conversion it is the tensor itself, or a view of its rows: do not write."""
        tensor = self.tensor
        if rows is not None:
            first, last = self._row_range(rows)
            tensor = tensor[first:last]
        if out is None:
            return tensor.to(dtype)
        self._check_out(out, dtype, tensor.shape[0])
        return out.copy_(tensor)


class BlockWeight(Weight):
    """A matrix in one of the block formats of `halfbyte.ops`, its constants float32 or 8-bit (double quantization).

    codes: uint8, flat. absmax: float32 [blocks], or the uint8 codes of the constants beside `nested_absmax`
    (float32 [ceil(blocks / nested_blocksize)]) and `nested_offset` (float32, no dimensions). table [16] and
    nested_table [256]: the levels of a file that brought its own, float32. dtype: what the weight was before, which
    files record.

    The constants stay float32 whatever `.to(dtype)` is asked: rounding them to bf16 would ruin the model.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    table: Tensor | None
    nested_table: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        quant_type: str,
        blocksize: int,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype = torch.bfloat16,
        nested_absmax: Tensor | None = None,
        nested_offset: Tensor | None = None,
        nested_blocksize: int = 256,
        table: Tensor | None = None,
        nested_table: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.quant_type, self.blocksize = (shape[0], shape[1]), quant_type, blocksize
        self.nested_blocksize, self.dtype = nested_blocksize, dtype
        self._view: tuple[int, WeightView | None] | None = None
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.register_buffer("nested_absmax", nested_absmax)
        self.register_buffer("nested_offset", nested_offset)
        self.register_buffer("table", table)
        self.register_buffer("nested_table", nested_table)

    @property
    def constants_nbytes(self) -> int:
        return self.nbytes - self.codes.nbytes

    @property
    def double_quant(self) -> bool:
        """Whether the constants are quantized too."""
        return self.nested_absmax is not None

    @property
    def format(self) -> str:
        return f"{self.quant_type}+dq" if self.double_quant else self.quant_type

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """As in `Weight`; a fresh tensor without `out`. Blocks may span rows."""
        first, last = (0, self.shape[0]) if rows is None else self._row_range(rows)
        if out is None:
            out = torch.empty(last - first, self.shape[1], dtype=dtype, device=self.codes.device)
        else:
            self._check_out(out, dtype, last - first)
        # Asking the dictionary saves six attribute searches of nn.Module, which cost as much as the call itself.
        held: Any = self._buffers
        return ops.dequantize_blockwise_out(
            held["codes"],
            held["absmax"],
            self.quant_type,
            self.blocksize,
            out,
            first * self.shape[1],
            held["table"],
            held["nested_absmax"],
            held["nested_offset"],
            held["nested_table"],
            self.nested_blocksize,
        )

    def native_view(self) -> WeightView | None:
        held: Any = self._buffers
        key = held["codes"].data_ptr()
        if self._view is None or self._view[0] != key:
            view = block_view(
                held["codes"],
                held["absmax"],
                self.quant_type,
                self.blocksize,
                self.shape,
                held["table"],
                held["nested_absmax"],
                held["nested_offset"],
                held["nested_table"],
                self.nested_blocksize,
            )
            self._view = key, view
        return self._view[1]

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(index.numel(), self.shape[1], dtype=dtype, device=self.codes.device)
        if self.shape[1] % self.blocksize:  # blocks span rows
            for place, row in enumerate(index.tolist()):
                self.dequantize(dtype, out[place : place + 1], slice(row, row + 1))
            return out
        codes = self.codes.view(self.shape[0], -1).index_select(0, index).view(-1)
        per_row = self.shape[1] // self.blocksize
        blocks = (index[:, None] * per_row + torch.arange(per_row, device=index.device)).view(-1)
        absmax = self.absmax.index_select(0, blocks)
        if self.nested_absmax is not None:
            assert self.nested_offset is not None
            table = ops.levels.dynamic_map().to(codes.device) if self.nested_table is None else self.nested_table
            scales = self.nested_absmax.index_select(0, blocks // self.nested_blocksize)
            absmax = table.index_select(0, absmax.int()) * scales + self.nested_offset
        return ops.dequantize_blockwise_out(codes, absmax, self.quant_type, self.blocksize, out, table=self.table)

    @property
    def source_dtype(self) -> torch.dtype:
        return self.dtype

    def to_bnb(self, prefix: str) -> dict[str, Tensor]:
        """The tensors of bitsandbytes' 4-bit state dict; `prefix` is the weight's whole name ("….q_proj.weight").

        Raises UsageError for INT4 and INT8, which bitsandbytes' files do not know.
        """
        return bnb_format.pack(
            bnb_format.BnbState(
                codes=self.codes,
                absmax=self.absmax,
                quant_type=self.quant_type,
                blocksize=self.blocksize,
                shape=self.shape,
                dtype=self.dtype,
                nested_absmax=self.nested_absmax,
                nested_offset=self.nested_offset,
                nested_blocksize=self.nested_blocksize,
                table=self.table,
                nested_table=self.nested_table,
            ),
            prefix,
        )

    @classmethod
    def from_bnb(cls, tensors: Mapping[str, Tensor], prefix: str) -> Self:
        """The weight named `prefix` of a bitsandbytes 4-bit state dict; UsageError where it is not whole."""
        return cls(**vars(bnb_format.unpack(tensors, prefix)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}  # addresses are of no use to a copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._view = None
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


def quantize(tensor: Tensor, options: QuantOptions) -> BlockWeight:
    """A matrix in the block format that `options` ask for (`quant_pattern` is the caller's to resolve, by name).

    Raises UsageError where the tensor holds NaN or infinite values.
    """
    if tensor.dim() != 2:
        raise UsageError(f"only matrices are quantized, not a tensor of shape {list(tensor.shape)}")
    codes, absmax = ops.quantize_blockwise(tensor.detach(), options.quant_type, options.blocksize)
    nested_absmax = nested_offset = None
    if options.double_quant:
        # As bitsandbytes: one offset for the whole tensor, and an empty tensor's is 0, where a mean is NaN.
        nested_offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        absmax, nested_absmax = ops.quantize_dynamic(absmax - nested_offset, blocksize=256)
    return BlockWeight(
        codes,
        absmax,
        options.quant_type,
        options.blocksize,
        (tensor.shape[0], tensor.shape[1]),
        dtype=tensor.dtype,
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
    )
