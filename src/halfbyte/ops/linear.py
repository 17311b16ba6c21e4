"""Linears that share an input, with their LoRA adapters, in one native call: what `linear.grouped` runs on a CPU.

The weights stay in their block format; panels of them are decoded into the cache and multiplied there, in both
directions. `linear/grouped.py` holds the same arithmetic in PyTorch and is the reference.

Shape letters: T tokens, I input features, O output features of a segment, S their sum, r rank, R summed padded ranks.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.ops import levels, native, pool
from halfbyte.ops.native import DTYPE, INT, INT64, POINTER

native.declare(
    {
        # dtype, tokens, x, ldx, segments, count, y, ldy, low
        "hb_linear_forward": [INT, INT64, POINTER, INT64, POINTER, INT64, POINTER, INT64, POINTER],
        # dtype, tokens, dy, ldy, x, ldx, low, segments, count, dx, lddx
        "hb_linear_backward": [INT, INT64, POINTER, INT64, POINTER, INT64, POINTER, POINTER, INT64, POINTER, INT64],
        # dtype, weight, index, first, count, out
        "hb_decode_rows": [INT, POINTER, POINTER, INT64, INT64, POINTER],
    }
)


class WeightView(ctypes.Structure):
    """`WeightView` of csrc/engine/linear.h: addresses, and in Python the tensors that must live as long as it does.

    A graph may outlive the model that made it.
    """

    held: tuple[Tensor | None, ...]

    _fields_ = (
        ("kind", INT64),
        ("rows", INT64),
        ("cols", INT64),
        ("data", POINTER),
        ("absmax", POINTER),
        ("table", POINTER),
        ("nested_absmax", POINTER),
        ("nested_offset", POINTER),
        ("nested_table", POINTER),
        ("blocksize", INT64),
        ("nested_blocksize", INT64),
        ("head_rows", INT64),
        ("groups", INT64),
        ("group_of", POINTER),
    )


class _SegmentView(ctypes.Structure):
    _fields_ = (
        ("weight", WeightView),
        ("bias", POINTER),
        ("lora_A", POINTER),
        ("lora_B", POINTER),
        ("grad_A", POINTER),
        ("grad_B", POINTER),
        ("rank", INT64),
        ("scaling", ctypes.c_double),
    )


def dense_view(tensor: Tensor) -> WeightView | None:
    """The view of a 16- or 32-bit matrix; None where the engine cannot read it in place."""
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.dtype not in DTYPE or _odd(tensor.shape):
        return None
    view = WeightView(DTYPE[tensor.dtype], tensor.shape[0], tensor.shape[1], tensor.data_ptr())
    view.held = (tensor,)
    return view


def block_view(
    codes: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    shape: tuple[int, int],
    table: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_table: Tensor | None = None,
    nested_blocksize: int = 256,
) -> WeightView | None:
    """The view of a matrix in blocks; None where rows are not whole runs of 32 codes, or not on a CPU."""
    if not codes.is_cpu or _odd(shape) or shape[1] % 32:
        return None
    per_byte = 1 if quant_type == "int8" else 2
    count = shape[0] * shape[1]
    if codes.numel() * per_byte < count or absmax.numel() * blocksize < count:
        raise ValueError(f"{codes.numel()} bytes of codes do not reach {count} values in blocks of {blocksize}")
    if nested_absmax is not None and nested_table is None:
        nested_table = levels.dynamic_map()
    if quant_type != "int8" and table is None:
        table = levels.levels(quant_type)
    view = WeightView(
        4 if quant_type == "int8" else 3,
        shape[0],
        shape[1],
        codes.data_ptr(),
        absmax.data_ptr(),
        native.pointer(None if quant_type == "int8" else table),
        native.pointer(nested_absmax),
        native.pointer(nested_offset),
        native.pointer(nested_table),
        blocksize,
        nested_blocksize,
    )
    view.held = (codes, absmax, table, nested_absmax, nested_offset, nested_table)
    return view


GGUF_TYPES = {"Q4_0": 5, "Q4_1": 6, "Q5_0": 7, "Q5_1": 8, "Q8_0": 9, "Q4_K": 10, "Q5_K": 11, "Q6_K": 12}
"""The block types of GGUF files that the engine reads in place, and their `WeightKind` in csrc/engine/linear.h."""


def gguf_view(data: Tensor, type_name: str, shape: tuple[int, int], head_rows: int = 0) -> WeightView | None:
    """The view of a matrix in a GGUF file's own blocks; None where the engine cannot read it in place.

    data       uint8, the file's bytes of the tensor
    head_rows  rows of a head whose halves the file interleaves (Llama's queries and keys), 0 where it does not
    """
    if not data.is_cpu or not data.is_contiguous() or type_name not in GGUF_TYPES:
        return None
    view = WeightView(GGUF_TYPES[type_name], shape[0], shape[1], data.data_ptr(), head_rows=head_rows)
    view.held = (data,)
    return view


_GROUP_KIND = {4: 13, 8: 14}
"""Bits of GPTQ's and AWQ's codes, and their `WeightKind`."""


def group_view(
    codes: Tensor, constants: Tensor, bits: int, shape: tuple[int, int], group_size: int, group_of: Tensor | None
) -> WeightView | None:
    """The view of a matrix in integer codes; None where the engine cannot read it in place.

    codes       uint8, flat: rows of `bits` a code, the first of two in the high half of a byte
    constants   int32 [rows, groups]: a float16's bits, and above them the zero point
    group_size  columns of a group
    group_of    int32 [cols], each below `groups`: the group of every column (act-order); None: runs of `group_size`
    """
    tensors = (codes, constants) if group_of is None else (codes, constants, group_of)
    if shape[1] % 32 or (group_of is None and group_size % 32 and group_size < shape[1]):
        return None
    if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors):
        return None
    groups = constants.shape[1]
    if codes.numel() * 8 < shape[0] * shape[1] * bits or constants.shape[0] != shape[0]:
        raise ValueError(f"{codes.numel()} bytes and constants {list(constants.shape)} do not reach {list(shape)}")
    if (groups * group_size if group_of is None else len(group_of)) < shape[1]:
        raise ValueError(f"{groups} groups of {group_size} do not reach {shape[1]} columns")
    view = WeightView(
        _GROUP_KIND[bits],
        shape[0],
        shape[1],
        codes.data_ptr(),
        constants.data_ptr(),
        blocksize=group_size,
        groups=groups,
        group_of=native.pointer(group_of),
    )
    view.held = tensors
    return view


def decode_rows(view: WeightView, out: Tensor, first: int = 0, index: Tensor | None = None) -> bool:
    """Rows of a weight into `out` [N, cols]: those of `index` (int64 [N]), or N from `first` on.

    False where there is no native library, or it does not write this dtype.
    """
    library = native.library()
    if library is None or not out.is_cpu or out.dtype not in (torch.bfloat16, torch.float32):
        return False
    if not out.is_contiguous() or out.ndim != 2 or out.shape[1] != view.cols:
        raise ValueError(f"out is {list(out.shape)}, contiguous rows of {view.cols} are needed")
    rows = out.shape[0]
    low, high = (first, first + rows) if index is None else (0, 0)
    if index is not None and rows:
        if index.dtype != torch.int64 or index.shape != (rows,) or not index.is_contiguous():
            raise ValueError(f"an index of {rows} int64 is needed, not {index.dtype} {list(index.shape)}")
        low, high = int(index.min()), int(index.max()) + 1
    if low < 0 or high > view.rows:
        raise IndexError(f"rows {low} … {high - 1} are not all in a weight of {view.rows}")
    if rows:
        library.hb_decode_rows(DTYPE[out.dtype], ctypes.byref(view), native.pointer(index), first, rows, out.data_ptr())
    return True


def _odd(shape: Sequence[int]) -> bool:
    """Two bfloat16 are multiplied at once: odd sizes, and empty ones, are left to torch."""
    return any(size == 0 or size % 2 for size in shape)


@dataclass(frozen=True)
class LinearSegment:
    """One segment of a call. bias: float32 [O]; lora_A [r, I] and lora_B [O, r]: float32, contiguous, or both None."""

    weight: WeightView
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 0.0

    @property
    def rank(self) -> int:
        return 0 if self.lora_A is None else self.lora_A.shape[0]

    @property
    def padded_rank(self) -> int:
        return (self.rank + 1) // 2 * 2


def available(x: Tensor) -> bool:
    """Whether the engine multiplies tensors like `x`."""
    return x.is_cpu and native.multiplies(x.dtype)


def _checked(
    segments: Sequence[LinearSegment], features: int, grads: Sequence[Tensor | None] | None = None
) -> ctypes.Array:  # type: ignore[type-arg]
    views = []
    for i, segment in enumerate(segments):
        rows, cols = segment.weight.rows, segment.weight.cols
        if cols != features:
            raise ValueError(f"a weight of {cols} columns cannot read {features} features")
        wanted = (
            (segment.bias, (rows,)),
            (segment.lora_A, (segment.rank, cols)),
            (segment.lora_B, (rows, segment.rank)),
        )
        for tensor, shape in wanted:
            if tensor is not None and (
                tensor.dtype != torch.float32 or tuple(tensor.shape) != shape or not tensor.is_contiguous()
            ):
                raise ValueError(f"contiguous float32 {list(shape)} is needed, not {tensor.dtype} {list(tensor.shape)}")
        grad_A, grad_B = (None, None) if grads is None else (grads[2 * i], grads[2 * i + 1])
        views.append(
            _SegmentView(
                segment.weight,
                native.pointer(segment.bias),
                native.pointer(segment.lora_A),
                native.pointer(segment.lora_B),
                native.pointer(grad_A),
                native.pointer(grad_B),
                segment.rank,
                segment.scaling,
            )
        )
    return (_SegmentView * len(views))(*views)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """The matrix with contiguous rows, and how far apart they are."""
    if x.ndim != 2:
        raise ValueError(f"a matrix is needed, not {list(x.shape)}")
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        x = x.contiguous()
    return x, x.stride(0)


def linear_forward(x_TI: Tensor, segments: Sequence[LinearSegment]) -> tuple[Tensor, Tensor]:
    """(y [T, S], low [T, R]): the segments' outputs side by side, and x A^T, which `linear_backward` needs.

    Ranks are padded to even numbers in `low`. Sums in float32, one rounding to the type of x at the end.
    """
    library = native.library()
    if library is None or not available(x_TI):
        raise ValueError(f"the engine does not multiply {x_TI.dtype} on {x_TI.device}")
    x_TI, ldx = _rows(x_TI)
    tokens, features = x_TI.shape
    views = _checked(segments, features)
    y_TS = pool.empty((tokens, sum(segment.weight.rows for segment in segments)), x_TI.dtype)
    low_TR = x_TI.new_empty(tokens, sum(segment.padded_rank for segment in segments))
    library.hb_linear_forward(
        DTYPE[x_TI.dtype],
        tokens,
        x_TI.data_ptr(),
        ldx,
        views,
        len(segments),
        y_TS.data_ptr(),
        y_TS.shape[1],
        low_TR.data_ptr(),
    )
    return y_TS, low_TR


def linear_backward(
    dy_TS: Tensor, x_TI: Tensor, low_TR: Tensor, segments: Sequence[LinearSegment], needs_input: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """(dx [T, I] or None, per segment the float32 gradients of lora_A and lora_B, None without an adapter)."""
    library = native.library()
    if library is None or not available(x_TI) or dy_TS.dtype != x_TI.dtype:
        raise ValueError(f"the engine does not multiply {dy_TS.dtype} with {x_TI.dtype} on {x_TI.device}")
    x_TI, ldx = _rows(x_TI)
    dy_TS, ldy = _rows(dy_TS)
    tokens, features = x_TI.shape
    outputs, ranks = sum(s.weight.rows for s in segments), sum(s.padded_rank for s in segments)
    if dy_TS.shape != (tokens, outputs) or low_TR.shape != (tokens, ranks) or not low_TR.is_contiguous():
        raise ValueError(f"gradients {list(dy_TS.shape)} and low {list(low_TR.shape)} do not fit {[tokens, outputs]}")
    grads: list[Tensor | None] = []
    for segment in segments:
        for factor in (segment.lora_A, segment.lora_B):
            grads.append(
                None if factor is None else torch.zeros_like(factor) if tokens == 0 else torch.empty_like(factor)
            )
    dx_TI = pool.empty((tokens, features), x_TI.dtype) if needs_input else None
    if tokens:
        library.hb_linear_backward(
            DTYPE[x_TI.dtype],
            tokens,
            dy_TS.data_ptr(),
            ldy,
            x_TI.data_ptr(),
            ldx,
            low_TR.data_ptr(),
            _checked(segments, features, grads),
            len(segments),
            native.pointer(dx_TI),
            features,
        )
    return dx_TI, grads
