"""The operators on CUDA: bitsandbytes' kernels for what they know, the reference for the rest.

NF4 and FP4 go to bitsandbytes, and so do the dynamic 8-bit codes of nested constants; INT4, INT8, a file's own levels
and blocks of 32 in 8 bits run as `reference.py` on the card. bitsandbytes is the `cuda` extra; without it everything
runs as the reference, which `backend()` says.

The functions are plain and take fake tensors, so that devices and dtypes are tested where there is no card
(`FakeTensorMode`). They have not been run on a GPU.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from halfbyte.errors import UsageError
from halfbyte.ops import levels, reference, schema
from halfbyte.ops.native import Backend

_KNOWN = ("nf4", "fp4")
_maps: dict[torch.device, Tensor] = {}


@cache
def _bitsandbytes() -> bool:
    """Whether bitsandbytes is there; importing it registers its operators."""
    if find_spec("bitsandbytes") is None:
        return False
    import bitsandbytes  # noqa: F401

    return True


def backend() -> Backend:
    """What runs the CUDA operators, and why."""
    if _bitsandbytes():
        return Backend("bitsandbytes", "the kernels of the installed bitsandbytes", threaded=True)
    return Backend("reference", "bitsandbytes is not installed: pip install 'halfbyte[cuda]'", threaded=True)


def _dynamic_map(device: torch.device) -> Tensor:
    """The signed dynamic map on `device`, copied there once."""
    table = _maps.get(device)
    if table is None:
        table = levels.dynamic_map().to(device)
        if not isinstance(table, FakeTensor):
            _maps[device] = table
    return table


def _refuse_non_finite(x: Tensor) -> None:
    # bitsandbytes' maximum skips NaN, so its absmax cannot tell; a fake tensor has no values to look at.
    if not isinstance(x, FakeTensor) and not torch.isfinite(x).all():
        raise UsageError(
            f"cannot quantize a tensor of shape {list(x.shape)}: it holds NaN or infinite values; "
            "the weights are damaged, get a fresh copy of the checkpoint"
        )


def quantize_blockwise(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_blockwise`; bitsandbytes' kernels may place a value that lies on a midpoint otherwise."""
    schema.check_format(quant_type, blocksize)
    schema.check_input(x)
    if quant_type not in _KNOWN or x.numel() == 0 or not _bitsandbytes():
        return reference.quantize_blockwise(x, quant_type, blocksize)
    _refuse_non_finite(x)
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit(x.contiguous(), blocksize, quant_type, torch.uint8)
    return codes.view(-1), absmax


def quantize_dynamic(x: Tensor, blocksize: int, signed: bool = True) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_dynamic`."""
    schema.check_blocksize(blocksize)
    schema.check_input(x)
    if not signed or blocksize < 64 or x.numel() == 0 or not _bitsandbytes():
        return reference.quantize_dynamic(x, blocksize, signed)
    _refuse_non_finite(x)
    codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x.reshape(-1), _dynamic_map(x.device), blocksize)
    return codes, absmax


def dequantize_dynamic(codes: Tensor, absmax: Tensor, blocksize: int, table: Tensor) -> Tensor:
    """As `reference.dequantize_dynamic`."""
    schema.check_dynamic(codes, absmax, blocksize, table)
    schema.check_together(codes, absmax, table)
    if blocksize < 64 or codes.numel() == 0 or not _bitsandbytes():
        return reference.dequantize_dynamic(codes, absmax, blocksize, table)
    values: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, table, blocksize, torch.float32)
    return values


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
) -> None:
    """As `reference.dequantize_blockwise_out`."""
    nested = (nested_absmax, nested_offset, nested_table, nested_blocksize)
    schema.check_out(codes, absmax, quant_type, blocksize, out, start, table, *nested)
    schema.check_together(codes, absmax, out, table, *nested[:3])
    if out.numel() == 0:
        return
    if nested_absmax is not None:
        assert nested_offset is not None
        steps = _dynamic_map(codes.device) if nested_table is None else nested_table
        absmax = dequantize_dynamic(absmax, nested_absmax, nested_blocksize, steps) + nested_offset
    if quant_type not in _KNOWN or table is not None or not _bitsandbytes():
        reference.dequantize_blockwise_out(codes, absmax, quant_type, blocksize, out, start, table)
        return
    # The kernel begins at a block: where `start` lies inside one, that block's beginning is decoded and dropped.
    first, stop = start // blocksize, start + out.numel()
    skip = start - first * blocksize
    from_byte = first * blocksize // 2
    codes = codes.narrow(0, from_byte, (stop + 1) // 2 - from_byte)
    absmax = absmax.narrow(0, first, -(-stop // blocksize) - first)
    values = out.view(-1) if skip == 0 else out.new_empty(skip + out.numel())
    torch.ops.bitsandbytes.dequantize_4bit.out(
        codes.view(-1, 1), absmax, blocksize, quant_type, values.shape, values.dtype, out=values
    )
    if skip:
        torch.mul(values.narrow(0, skip, out.numel()), 1, out=out.view(-1))


schema.library.impl("quantize_blockwise", quantize_blockwise, "CUDA")
schema.library.impl("quantize_dynamic", quantize_dynamic, "CUDA")
schema.library.impl("dequantize_dynamic", dequantize_dynamic, "CUDA")
schema.library.impl("dequantize_blockwise_out", dequantize_blockwise_out, "CUDA")
