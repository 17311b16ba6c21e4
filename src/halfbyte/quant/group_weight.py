"""A weight in the codes of its GPTQ or AWQ file: a frozen base whose values are the ones that are served.

    W[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g])     with g the group of input i

The product has at most 20 significant bits (8 of a code less a zero point and its sign, 11 of a float16), so float32
holds it exactly and each type that is asked for is rounded to once. That is what the public loaders multiply with in
float16 (GPTQModel 7.7, `TorchLinear._dequantize_from_codes`: the codes are cast to the scales' type and multiplied in
it); a loader in bfloat16 first rounds the scales to it, which loses up to 2^-9 of a value that we keep.

The files lay codes input-major, in words along the inputs (GPTQ) or the outputs (AWQ). Here they are turned once, when
the file is read, so that the native engine reads row after row (`csrc/engine/group.inc`): no code, scale or zero point
changes, and with act-order the columns stay where they are.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from halfbyte.ops.linear import WeightView, decode_rows, group_view
from halfbyte.quant.group_codes import GroupCodes
from halfbyte.quant.weight import Weight

_CHUNK = 1 << 20
"""Values that torch decodes at once."""


def held_bytes(shape: tuple[int, int], groups: int, bits: int, act_order: bool) -> int:
    """What a `GroupWeight` of these sizes holds."""
    return shape[0] * (shape[1] * bits // 8 + 4 * groups) + (4 * shape[1] if act_order else 0)


class GroupWeight(Weight):
    """A matrix [O, I] in integer codes of 4 or 8 bits.

    codes      uint8, flat: row after row; of 4 bits two a byte, the first in the high half
    constants  int32 [O, G]: the bits of a float16 scale, and above them the zero point
    group_of   int32 [I], the group of every column (act-order); None: groups are runs of `group_size`
    method     "gptq" or "awq", for `format`
    dtype      what the model was before: the type that a merge writes

    The buffers keep their types whatever `.to(dtype)` is asked.
    """

    codes: Tensor
    constants: Tensor
    group_of: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        constants: Tensor,
        bits: int,
        shape: tuple[int, int],
        group_size: int,
        group_of: Tensor | None = None,
        *,
        method: str = "gptq",
        dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__()
        if codes.dtype != torch.uint8 or codes.dim() != 1 or codes.numel() * 8 != shape[0] * shape[1] * bits:
            raise ValueError(f"{list(shape)} in {bits} bits are not {codes.dtype} {list(codes.shape)}")
        self.shape, self.bits, self.group_size = shape, bits, group_size
        self.method, self.dtype = method, dtype
        self._view: tuple[int, WeightView | None] | None = None
        self.register_buffer("codes", codes)
        self.register_buffer("constants", constants)
        self.register_buffer("group_of", group_of)

    @classmethod
    def from_codes(cls, found: GroupCodes, method: str, dtype: torch.dtype = torch.float16) -> Self:
        """What a file holds (`gptq_format.unpack`, `awq_format.unpack`), turned; ValueError for an odd width."""
        rows, columns = found.shape
        if found.bits == 4 and columns % 2:
            raise ValueError(f"{columns} columns of 4 bits are not whole bytes")
        codes_IO = found.codes
        if found.bits == 4:
            codes_IO = (codes_IO[0::2] << 4) | codes_IO[1::2]
        codes = codes_IO.t().contiguous().view(-1)
        halves = found.scales.t().contiguous().view(torch.int16).int() & 0xFFFF
        constants = halves | found.zeros.t().contiguous().int() << 16
        size = int((found.group_of == 0).sum())
        in_runs = size > 0 and torch.equal(found.group_of, torch.arange(columns, dtype=torch.int32) // size)
        group_of = None if in_runs else found.group_of
        shape = (rows, columns)
        return cls(codes, constants, found.bits, shape, size or columns, group_of, method=method, dtype=dtype)

    @property
    def constants_nbytes(self) -> int:
        return self.nbytes - self.codes.nbytes

    @property
    def format(self) -> str:
        return f"{self.method}-{self.bits}bit"

    @property
    def source_dtype(self) -> torch.dtype:
        return self.dtype

    def native_view(self) -> WeightView | None:
        # The engine multiplies pairs of rows; an odd matrix is decoded and left to torch.
        return None if self.shape[0] % 2 or not all(self.shape) else self._decoded_by()

    def _decoded_by(self) -> WeightView | None:
        key = self.codes.data_ptr()
        if self._view is None or self._view[0] != key:
            view = group_view(self.codes, self.constants, self.bits, self.shape, self.group_size, self.group_of)
            self._view = key, view
        return self._view[1]

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None, rows: slice | None = None) -> Tensor:
        """As in `Weight`; a fresh tensor without `out`."""
        first, last = self._row_range(rows)
        if out is None:
            out = torch.empty(last - first, self.shape[1], dtype=dtype, device=self.codes.device)
        else:
            self._check_out(out, dtype, last - first)
        view = self._decoded_by()
        if view is not None and out.is_contiguous() and decode_rows(view, out, first):
            return out
        step = max(1, _CHUNK // max(self.shape[1], 1))
        for row in range(first, last, step):
            stop = min(row + step, last)
            out[row - first : stop - first] = self._decode(slice(row, stop))
        return out

    def look_up(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(index.numel(), self.shape[1], dtype=dtype, device=self.codes.device)
        view = self._decoded_by()
        if view is None or not decode_rows(view, out, index=index.contiguous()):
            out.copy_(self._decode(index))
        return out

    def _decode(self, rows: Tensor | slice) -> Tensor:
        """Rows of the matrix by torch, float32."""
        codes, constants = self.codes.view(self.shape[0], -1)[rows], self.constants[rows]
        if self.bits == 4:
            codes = torch.stack([codes >> 4, codes & 15], -1).flatten(1)
        scales = constants.to(torch.int16).view(torch.float16).float()
        zeros = (constants >> 16).float()
        group = self.group_of
        if group is None:
            group = torch.arange(self.shape[1], device=codes.device) // self.group_size
        group = group.long()
        return (codes.float() - zeros.index_select(1, group)) * scales.index_select(1, group)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}  # addresses are of no use to a copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._view = None
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self
