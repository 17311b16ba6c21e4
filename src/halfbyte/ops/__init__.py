"""Operators on quantized weights: one definition, a reference in PyTorch, faster kernels a device.

The functions here are thin, typed calls of `torch.ops.halfbyte.*`; `reference.py` says what they compute,
`schema.py` defines and checks them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from halfbyte.ops import cpu as _cpu  # noqa: F401 - registers the CPU kernels
from halfbyte.ops import cuda, levels, native
from halfbyte.ops import elementwise as _elementwise  # noqa: F401 - declares its functions before the library is loaded
from halfbyte.ops.native import Backend
from halfbyte.ops.schema import BLOCKSIZES

__all__ = [
    "BLOCKSIZES",
    "Backend",
    "backend",
    "dequantize_blockwise",
    "dequantize_blockwise_out",
    "dequantize_dynamic",
    "levels",
    "quantize_blockwise",
    "quantize_dynamic",
]


def backend(device: str = "cpu") -> Backend:
    """What runs the operators on `device` (cpu or cuda), and why; said once at the start of a run."""
    return cuda.backend() if device.startswith("cuda") else native.backend()


def quantize_blockwise(x: Tensor, quant_type: str, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize a 16- or 32-bit float tensor of any shape in flat blocks: (codes uint8, absmax float32 [blocks]).

    quant_type: nf4, fp4, e2m1 or int4 (two codes a byte, `[(n + 1) // 2]`) or int8 (`[n]`). blocksize: 32 … 4096.
    Raises UsageError for an unknown format and for NaN or infinite values.
    """
    codes, absmax = torch.ops.halfbyte.quantize_blockwise(x, quant_type, blocksize)
    return codes, absmax


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, quant_type: str, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """A fresh tensor of `shape` and `dtype` (bfloat16, float16, float32) with the values of `codes`."""
    result: Tensor = torch.ops.halfbyte.dequantize_blockwise(codes, absmax, quant_type, blocksize, shape, dtype)
    return result


def dequantize_blockwise_out(
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
) -> Tensor:
    """Write values `start … start + out.numel()` of the flat quantized tensor into the contiguous `out`; return it.

    table: float32 [16], the levels of a file that brought its own; None: the format's. With double quantization,
    `absmax` holds 8-bit codes and `absmax = nested_table[code] * nested_absmax + nested_offset`; nested_table None
    means `levels.dynamic_map()`.
    """
    torch.ops.halfbyte.dequantize_blockwise_out(
        codes,
        absmax,
        quant_type,
        blocksize,
        out,
        start,
        table,
        nested_absmax,
        nested_offset,
        nested_table,
        nested_blocksize,
    )
    return out


def quantize_dynamic(x: Tensor, blocksize: int = 256, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Quantize to the dynamic 8-bit format (of constants and optimizer states): (codes uint8 [n], absmax float32)."""
    codes, absmax = torch.ops.halfbyte.quantize_dynamic(x, blocksize, signed)
    return codes, absmax


def dequantize_dynamic(
    codes: Tensor, absmax: Tensor, blocksize: int = 256, signed: bool = True, table: Tensor | None = None
) -> Tensor:
    """float32 [n] values of dynamic 8-bit codes. table: float32 [256] where a file brought its own levels."""
    if table is None:
        table = levels.dynamic_map(signed).to(codes.device)
    result: Tensor = torch.ops.halfbyte.dequantize_dynamic(codes, absmax, blocksize, table)
    return result
