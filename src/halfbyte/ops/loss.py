"""The vocabulary projection and the cross-entropy in one native call: what `linear.cross_entropy` runs on a CPU.

`linear/cross_entropy.py` holds the same arithmetic in PyTorch and is the reference.
"""

import ctypes

import torch
from torch import Tensor

from halfbyte.ops import native, pool
from halfbyte.ops.linear import WeightView, available
from halfbyte.ops.native import DTYPE, INT, INT64, POINTER

native.declare(
    {
        # dtype, rows, hidden, ldh, head, targets, softcap, workspace, nll, grad
        "hb_loss": [INT, INT64, POINTER, INT64, POINTER, POINTER, ctypes.c_double, INT64, POINTER, POINTER],
    }
)

WORKSPACE_BYTES = 67_108_864
"""What the exponentials of a stretch of the vocabulary may take, for up to 2,048 rows at once."""


def linear_cross_entropy(
    hidden_ND: Tensor, head: WeightView, targets_N: Tensor, softcap: float | None, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """(negative log-likelihood float32 [N], the gradient of its sum by `hidden` [N, D] or None).

    hidden_ND  bfloat16 or float32 with contiguous rows; targets_N: int64, each in [0, V).
    """
    library = native.library()
    if library is None or not available(hidden_ND):
        raise ValueError(f"the engine does not multiply {hidden_ND.dtype} on {hidden_ND.device}")
    if hidden_ND.ndim != 2 or hidden_ND.shape[1] != head.cols:
        raise ValueError(f"hidden states {list(hidden_ND.shape)} do not fit a head of {head.cols} columns")
    count = hidden_ND.shape[0]
    if targets_N.dtype != torch.int64 or targets_N.shape != (count,) or not targets_N.is_cpu:
        raise ValueError(f"targets must be int64 [{count}] on the CPU, not {targets_N.dtype} {list(targets_N.shape)}")
    if count and not 0 <= int(targets_N.min()) <= int(targets_N.max()) < head.rows:
        raise IndexError(f"targets must lie in [0, {head.rows})")
    hidden_ND, targets_N = hidden_ND.contiguous(), targets_N.contiguous()
    nll_N = hidden_ND.new_empty(count, dtype=torch.float32)
    grad_ND = pool.empty_like(hidden_ND) if needs_grad else None
    library.hb_loss(
        DTYPE[hidden_ND.dtype],
        count,
        hidden_ND.data_ptr(),
        hidden_ND.shape[1],
        ctypes.byref(head),
        targets_N.data_ptr(),
        softcap or 0.0,
        WORKSPACE_BYTES,
        nll_N.data_ptr(),
        native.pointer(grad_ND),
    )
    return nll_N, grad_ND
