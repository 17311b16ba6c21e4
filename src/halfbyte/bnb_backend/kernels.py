"""bitsandbytes' operators on CPU tensors by halfbyte's kernels, equal to bitsandbytes' reference bit for bit.

    quantize_4bit         bitsandbytes has only its reference in PyTorch here
    dequantize_4bit       instead of its kernel, which is wrong where a row is no whole number of blocks (0.50.2)
    dequantize_4bit.out   bitsandbytes has none for a CPU
    gemm_4bit             codes and nested constants in one pass into a buffer that is kept, then the same `linear`

The reference is `bitsandbytes/backends/default`, run eagerly. `gemv_4bit` stays bitsandbytes': in evaluation it reads
weights that were repacked. So do the 8-bit operators: nested constants are 1/64 of a weight.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.ops import dequantize_blockwise_out, quantize_blockwise

_NESTED_BLOCKSIZE = 256  # the only one that gemm_4bit knows; it has no argument for it
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_scratch = threading.local()
_previous: dict[str, Any] = {}


def remember_previous() -> None:
    """Keep bitsandbytes' own quantize_4bit, for what halfbyte refuses. Call before it is overridden."""
    _previous["quantize_4bit"] = torch.library.get_kernel("bitsandbytes::quantize_4bit", "CPU")


def _check_type(quant_type: str) -> None:
    # halfbyte's own INT4 would pass the operator's checks, but is no format of bitsandbytes.
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be nf4 or fp4, not {quant_type!r}")


def _bytes(codes: Tensor) -> Tensor:
    """Flat uint8 of codes in whatever `quant_storage`."""
    return codes.reshape(-1).view(torch.uint8)


def _flat(constants: Tensor) -> Tensor:
    return constants.float().reshape(-1).contiguous()


def dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    out = torch.empty(tuple(shape), dtype=dtype)
    dequantize_4bit_out(A, absmax, blocksize, quant_type, shape, dtype, out)
    return out


def dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    _check_type(quant_type)
    if out.dtype != dtype or tuple(out.shape) != tuple(shape):
        raise ValueError(f"out must be {dtype} {list(shape)}, not {out.dtype} {list(out.shape)}")
    target = out if out.is_contiguous() else torch.empty(tuple(shape), dtype=dtype)
    dequantize_blockwise_out(_bytes(A), _flat(absmax), quant_type, blocksize, target)
    if target is not out:
        out.copy_(target)


def quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    _check_type(quant_type)
    try:
        codes, absmax = quantize_blockwise(A if A.dtype in _FLOATS else A.float(), quant_type, blocksize)
    except UsageError:
        # halfbyte refuses NaN and infinite values; bitsandbytes does something with them, so it does.
        codes, absmax = _ask_previous("quantize_4bit", A, blocksize, quant_type, quant_storage)
        return codes, absmax
    if quant_storage != torch.uint8:
        codes = codes.view(quant_storage)
    return codes[:, None], absmax


def _ask_previous(name: str, *arguments: object) -> Any:
    return _previous[name].call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)


def _workspace(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor in this thread's buffer: a fresh one of a weight's size costs its page faults."""
    needed = shape[0] * shape[1] * dtype.itemsize
    buffer: Tensor | None = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < needed:
        buffer = _scratch.buffer = None  # the old one goes before the new one comes
        with torch.inference_mode(False):
            buffer = _scratch.buffer = torch.empty(needed, dtype=torch.uint8)
    return buffer[:needed].view(dtype).view(tuple(shape))


def gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """A [.., K] times the transpose of B, [N, K] = shapeB. absmax_8bit: codes of the constants, absmax then theirs."""
    _check_type(quant_type)
    # Where a graph is recorded here, and not by bitsandbytes' autograd function, `linear` keeps the weight.
    kept = torch.is_grad_enabled() and A.requires_grad
    weight = torch.empty(tuple(shapeB), dtype=A.dtype) if kept else _workspace(shapeB, A.dtype)
    if absmax_8bit is None:
        dequantize_blockwise_out(_bytes(B), _flat(absmax), quant_type, blocksize, weight)
    else:
        if absmax_code is None or absmax_offset is None:
            raise ValueError("absmax_8bit needs absmax_code and absmax_offset")
        dequantize_blockwise_out(
            _bytes(B),
            absmax_8bit.reshape(-1),
            quant_type,
            blocksize,
            weight,
            nested_absmax=_flat(absmax),
            nested_offset=absmax_offset.float(),
            nested_table=_flat(absmax_code),
            nested_blocksize=_NESTED_BLOCKSIZE,
        )
    return torch.nn.functional.linear(A, weight, bias)


KERNELS: dict[str, Callable[..., Any]] = {
    "quantize_4bit": quantize_4bit,
    "dequantize_4bit": dequantize_4bit,
    "dequantize_4bit.out": dequantize_4bit_out,
    "gemm_4bit": gemm_4bit,
}
