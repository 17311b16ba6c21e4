"""AdamW over weights whose moments are one byte an element, natively: one pass, and no moment is ever whole in float32.

`optim.adamw` holds the same arithmetic in PyTorch and is the reference; the format is `quantize_dynamic`'s.
"""

import ctypes

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from halfbyte.ops import levels, native
from halfbyte.ops.native import INT64, POINTER

BLOCKSIZE = 256

# count, weights, gradients, moments, numbers
native.declare({"hb_adamw_bytes": [INT64, POINTER, POINTER, POINTER, POINTER]})


class _ByteMoment(ctypes.Structure):
    """`ByteMoment` of csrc/halfbyte.cpp."""

    _fields_ = tuple((name, POINTER) for name in ("codes", "absmax", "table", "first", "midpoints"))


def available(weights: Tensor) -> bool:
    """Whether `adamw_bytes` updates tensors like these."""
    return weights.is_cpu and weights.dtype == torch.float32 and native.library() is not None


def adamw_bytes(
    weights: Tensor,
    gradients: Tensor,
    exp_avg: tuple[Tensor, Tensor],
    exp_avg_sq: tuple[Tensor, Tensor],
    *,
    factor: float,
    betas: tuple[float, float],
    corrections: tuple[float, float],
    learning_rate: float,
    epsilon: float,
    decay: float,
) -> None:
    """Update float32 `weights` [n] in place.

    gradients    float32 [n], multiplied by `factor` first
    exp_avg, exp_avg_sq   (uint8 codes [n], float32 absmax [ceil(n / 256)]); signed and unsigned map
    corrections  1 - beta^step of both moments
    decay        weight decay; the weights are multiplied by 1 - learning_rate * decay
    """
    library = native.library()
    count = weights.numel()
    blocks = -(-count // BLOCKSIZE)
    wanted = [(weights, torch.float32, count), (gradients, torch.float32, count)]
    for codes, absmax in (exp_avg, exp_avg_sq):
        wanted += [(codes, torch.uint8, count), (absmax, torch.float32, blocks)]
    for tensor, dtype, size in wanted:
        if tensor.dtype != dtype or tensor.numel() != size or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(
                f"contiguous {dtype} [{size}] on the CPU is needed, not {tensor.dtype} {list(tensor.shape)}"
            )
    if library is None:
        raise ValueError("there is no native library")
    moments = []
    for (codes, absmax), signed in ((exp_avg, True), (exp_avg_sq, False)):
        parts = (codes, absmax, levels.dynamic_map(signed), *levels.dynamic_search(signed))
        moments.append(_ByteMoment(*(part.data_ptr() for part in parts)))
    numbers = (
        factor,
        *betas,
        learning_rate / corrections[0],
        corrections[1] ** 0.5,
        epsilon,
        1 - learning_rate * decay,
    )
    library.hb_adamw_bytes(
        count,
        weights.data_ptr(),
        gradients.data_ptr(),
        (_ByteMoment * 2)(*moments),
        (ctypes.c_float * len(numbers))(*numbers),
    )
    increment_version(weights)  # written behind torch's back: what was computed from them is no longer theirs
