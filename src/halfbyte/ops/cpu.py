"""The block formats on the CPU: the C++ kernels of `csrc/`, or the reference where there are none."""

import torch
from torch import Tensor

from halfbyte.ops import levels, native, reference, schema
from halfbyte.ops.native import INT, INT64, POINTER

native.declare(
    {
        # codes, absmax, table, blocksize, start, count, out, dtype, nested absmax, offset, table, blocksize
        "hb_dequantize": [*[POINTER] * 3, *[INT64] * 3, POINTER, INT, *[POINTER] * 3, INT64],
        # x, dtype, count, midpoints, order, blocksize, codes, absmax
        "hb_quantize": [POINTER, INT, INT64, POINTER, POINTER, INT64, POINTER, POINTER],
        # x, dtype, count, first ranks, midpoints, blocksize, codes, absmax
        "hb_quantize_dynamic": [POINTER, INT, INT64, POINTER, POINTER, INT64, POINTER, POINTER],
        # codes, absmax, table, blocksize, count, out
        "hb_dequantize_dynamic": [POINTER, POINTER, POINTER, INT64, INT64, POINTER],
    }
)


def _dequantize_blockwise_out(
    codes: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    out: Tensor,
    start: int = 0,
    table: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_table: Tensor | None = None,
    nested_blocksize: int = 256,
) -> None:
    arguments = (codes, absmax, quant_type, blocksize, out, start, table)
    nested = (nested_absmax, nested_offset, nested_table, nested_blocksize)
    schema.check_out(*arguments, *nested)
    library = native.library()
    if library is None:
        reference.dequantize_blockwise_out(*arguments, *nested)
        return
    if table is None and quant_type != "int8":
        table = levels.levels(quant_type)
    if nested_table is None:
        nested_table = levels.dynamic_map()
    library.hb_dequantize(
        codes.data_ptr(),
        absmax.data_ptr(),
        None if quant_type == "int8" else native.pointer(table),
        blocksize,
        start,
        out.numel(),
        out.data_ptr(),
        native.DTYPE[out.dtype],
        native.pointer(nested_absmax),
        native.pointer(nested_offset),
        nested_table.data_ptr(),
        nested_blocksize,
    )


def _quantize_blockwise(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    schema.check_format(quant_type, blocksize)
    schema.check_input(x)
    library = native.library()
    if library is None:
        return reference.quantize_blockwise(x, quant_type, blocksize)
    x, count = x.contiguous(), x.numel()
    codes = torch.empty(count if quant_type == "int8" else (count + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty((count + blocksize - 1) // blocksize, dtype=torch.float32)
    middles, order = (None, None) if quant_type == "int8" else levels.ordering(quant_type)
    library.hb_quantize(
        x.data_ptr(),
        native.DTYPE[x.dtype],
        count,
        native.pointer(middles),
        native.pointer(order),
        blocksize,
        codes.data_ptr(),
        absmax.data_ptr(),
    )
    reference.refuse_non_finite(x, absmax)
    return codes, absmax


def _quantize_dynamic(x: Tensor, blocksize: int, signed: bool = True) -> tuple[Tensor, Tensor]:
    schema.check_blocksize(blocksize)
    schema.check_input(x)
    library = native.library()
    if library is None:
        return reference.quantize_dynamic(x, blocksize, signed)
    x, count = x.contiguous(), x.numel()
    codes = torch.empty(count, dtype=torch.uint8)
    absmax = torch.empty((count + blocksize - 1) // blocksize, dtype=torch.float32)
    first, middles = levels.dynamic_search(signed)
    library.hb_quantize_dynamic(
        x.data_ptr(),
        native.DTYPE[x.dtype],
        count,
        first.data_ptr(),
        middles.data_ptr(),
        blocksize,
        codes.data_ptr(),
        absmax.data_ptr(),
    )
    reference.refuse_non_finite(x, absmax)
    return codes, absmax


def _dequantize_dynamic(codes: Tensor, absmax: Tensor, blocksize: int, table: Tensor) -> Tensor:
    schema.check_dynamic(codes, absmax, blocksize, table)
    library = native.library()
    if library is None:
        return reference.dequantize_dynamic(codes, absmax, blocksize, table)
    out = torch.empty(codes.numel(), dtype=torch.float32)
    library.hb_dequantize_dynamic(
        codes.data_ptr(), absmax.data_ptr(), table.data_ptr(), blocksize, codes.numel(), out.data_ptr()
    )
    return out


schema.library.impl("quantize_blockwise", _quantize_blockwise, "CPU")
schema.library.impl("dequantize_blockwise_out", _dequantize_blockwise_out, "CPU")
schema.library.impl("quantize_dynamic", _quantize_dynamic, "CPU")
schema.library.impl("dequantize_dynamic", _dequantize_dynamic, "CPU")
