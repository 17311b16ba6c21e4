"""The operators' one definition: names, signatures, shape checks, fakes, and the reference as their default kernel.

Registered with `Library.define` and `impl` rather than `torch.library.custom_op`, which costs 13 to 37 µs a call
where this costs 2. `cpu.py` and `cuda.py` register faster kernels for their devices; the checks run in each, so
that no kernel reads past the end of a tensor.

None of the operators has a gradient: quantized weights are frozen.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.ops import levels, reference

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# torch.library carries no types; `Any` here keeps that to these two names.
library: Any = torch.library.Library("halfbyte", "DEF")
_register_fake: Any = torch.library.register_fake
_tags = (torch.Tag.pt2_compliant_tag,)
library.define("quantize_blockwise(Tensor x, str quant_type, int blocksize) -> (Tensor, Tensor)", tags=_tags)
library.define(
    "dequantize_blockwise(Tensor codes, Tensor absmax, str quant_type, int blocksize, SymInt[] shape, ScalarType dtype)"
    " -> Tensor",
    tags=_tags,
)
library.define(
    "dequantize_blockwise_out(Tensor codes, Tensor absmax, str quant_type, int blocksize, Tensor(a!) out,"
    " SymInt start=0, Tensor? table=None, Tensor? nested_absmax=None, Tensor? nested_offset=None,"
    " Tensor? nested_table=None, int nested_blocksize=256) -> ()",
    tags=_tags,
)
library.define("quantize_dynamic(Tensor x, int blocksize, bool signed=True) -> (Tensor, Tensor)", tags=_tags)
library.define(
    "dequantize_dynamic(Tensor codes, Tensor absmax, int blocksize, Tensor table) -> Tensor",
    tags=_tags,
)


def check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise UsageError(f"blocksize {blocksize} is not one of {', '.join(map(str, BLOCKSIZES))}")


def check_format(quant_type: str, blocksize: int) -> None:
    """Raise UsageError unless the format and the block size exist."""
    if quant_type not in levels.QUANT_TYPES:
        raise UsageError(f"quant_type {quant_type!r} is not one of {', '.join(levels.QUANT_TYPES)}")
    check_blocksize(blocksize)


def check_input(x: Tensor) -> None:
    """Raise UsageError unless `x` is a 16- or 32-bit float tensor."""
    if x.dtype not in FLOATS:
        raise UsageError(f"cannot quantize {x.dtype}: bfloat16, float16 or float32 is needed")


def check_together(*tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on one device.

    Not a part of the other checks: the CPU kernels cannot be reached otherwise, and comparing costs a microsecond.
    """
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors are on {' and '.join(sorted(map(str, devices)))}, one device is needed")


def check_codes(codes: Tensor, constants: Tensor, per_byte: int, blocksize: int, stop: int) -> None:
    """Raise ValueError unless `codes` and their `constants` are flat, contiguous and reach `stop` values."""
    if codes.dtype != torch.uint8 or codes.dim() != 1 or not codes.is_contiguous():
        raise ValueError(f"codes must be flat contiguous uint8, not {codes.dtype} {list(codes.shape)}")
    if constants.dim() != 1 or not constants.is_contiguous():
        raise ValueError(f"constants must be flat and contiguous, not {list(constants.shape)}")
    if codes.numel() * per_byte < stop or constants.numel() * blocksize < stop:
        raise ValueError(
            f"{codes.numel()} bytes of codes and {constants.numel()} constants of blocks of {blocksize} "
            f"do not reach {stop} values"
        )


def check_table(table: Tensor | None, size: int) -> None:
    """Raise ValueError unless an optional table holds `size` contiguous float32 levels."""
    if table is not None and (table.dtype != torch.float32 or table.shape != (size,) or not table.is_contiguous()):
        raise ValueError(f"a table must be contiguous float32 [{size}], not {table.dtype} {list(table.shape)}")


def check_out(
    codes: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    out: Tensor,
    start: int,
    table: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    nested_table: Tensor | None,
    nested_blocksize: int,
) -> None:
    """The checks of `dequantize_blockwise_out`, in the order of its arguments."""
    check_format(quant_type, blocksize)
    if out.dtype not in FLOATS or not out.is_contiguous():
        raise ValueError(f"out must be contiguous bfloat16, float16 or float32, not {out.dtype} {out.stride()}")
    if start < 0:
        raise ValueError(f"start {start} is below 0")
    check_codes(codes, absmax, 1 if quant_type == "int8" else 2, blocksize, start + out.numel())
    check_table(table, 16)
    if nested_absmax is None:
        if absmax.dtype != torch.float32:
            raise ValueError(f"absmax must be float32, not {absmax.dtype}")
        return
    check_blocksize(nested_blocksize)
    check_codes(absmax, nested_absmax, 1, nested_blocksize, absmax.numel())
    check_table(nested_table, 256)
    if nested_offset is None or nested_offset.numel() != 1:
        raise ValueError("nested constants need a nested_offset of one element")
    if nested_absmax.dtype != torch.float32 or nested_offset.dtype != torch.float32:
        raise ValueError(f"nested constants must be float32, not {nested_absmax.dtype} and {nested_offset.dtype}")


def check_dynamic(codes: Tensor, absmax: Tensor, blocksize: int, table: Tensor) -> None:
    """The checks of `dequantize_dynamic`."""
    check_blocksize(blocksize)
    check_codes(codes, absmax, 1, blocksize, codes.numel())
    check_table(table, 256)
    if absmax.dtype != torch.float32:
        raise ValueError(f"absmax must be float32, not {absmax.dtype}")


def _quantize_blockwise(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    check_format(quant_type, blocksize)
    check_input(x)
    return reference.quantize_blockwise(x, quant_type, blocksize)


def _dequantize_blockwise(
    codes: Tensor, absmax: Tensor, quant_type: str, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    out = torch.empty(tuple(shape), dtype=dtype, device=codes.device)
    torch.ops.halfbyte.dequantize_blockwise_out(codes, absmax, quant_type, blocksize, out)
    return out


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
    check_out(*arguments, *nested)
    check_together(codes, absmax, out, table, *nested[:3])
    reference.dequantize_blockwise_out(*arguments, *nested)


def _quantize_dynamic(x: Tensor, blocksize: int, signed: bool = True) -> tuple[Tensor, Tensor]:
    check_blocksize(blocksize)
    check_input(x)
    return reference.quantize_dynamic(x, blocksize, signed)


def _dequantize_dynamic(codes: Tensor, absmax: Tensor, blocksize: int, table: Tensor) -> Tensor:
    check_dynamic(codes, absmax, blocksize, table)
    check_together(codes, absmax, table)
    return reference.dequantize_dynamic(codes, absmax, blocksize, table)


library.impl("quantize_blockwise", _quantize_blockwise, "CompositeExplicitAutograd")
library.impl("dequantize_blockwise", _dequantize_blockwise, "CompositeExplicitAutograd")
library.impl("dequantize_blockwise_out", _dequantize_blockwise_out, "CompositeExplicitAutograd")
library.impl("quantize_dynamic", _quantize_dynamic, "CompositeExplicitAutograd")
library.impl("dequantize_dynamic", _dequantize_dynamic, "CompositeExplicitAutograd")


def _fake_quantize_blockwise(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    check_format(quant_type, blocksize)
    check_input(x)
    count = x.numel() if quant_type == "int8" else (x.numel() + 1) // 2
    constants = (x.numel() + blocksize - 1) // blocksize
    return x.new_empty(count, dtype=torch.uint8), x.new_empty(constants, dtype=torch.float32)


def _fake_dequantize_blockwise(
    codes: Tensor, absmax: Tensor, quant_type: str, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    out = codes.new_empty(tuple(shape), dtype=dtype)
    check_out(codes, absmax, quant_type, blocksize, out, 0, None, None, None, None, 256)
    check_together(codes, absmax)
    return out


def _fake_dequantize_blockwise_out(
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
    nested = (nested_absmax, nested_offset, nested_table, nested_blocksize)
    check_out(codes, absmax, quant_type, blocksize, out, start, table, *nested)
    check_together(codes, absmax, out, table, *nested[:3])


def _fake_quantize_dynamic(x: Tensor, blocksize: int, signed: bool = True) -> tuple[Tensor, Tensor]:
    check_blocksize(blocksize)
    check_input(x)
    constants = (x.numel() + blocksize - 1) // blocksize
    return x.new_empty(x.numel(), dtype=torch.uint8), x.new_empty(constants, dtype=torch.float32)


def _fake_dequantize_dynamic(codes: Tensor, absmax: Tensor, blocksize: int, table: Tensor) -> Tensor:
    check_dynamic(codes, absmax, blocksize, table)
    check_together(codes, absmax, table)
    return codes.new_empty(codes.shape, dtype=torch.float32)


_register_fake("halfbyte::quantize_blockwise", _fake_quantize_blockwise, lib=library)
_register_fake("halfbyte::dequantize_blockwise", _fake_dequantize_blockwise, lib=library)
_register_fake("halfbyte::dequantize_blockwise_out", _fake_dequantize_blockwise_out, lib=library)
_register_fake("halfbyte::quantize_dynamic", _fake_quantize_dynamic, lib=library)
_register_fake("halfbyte::dequantize_dynamic", _fake_dequantize_dynamic, lib=library)
