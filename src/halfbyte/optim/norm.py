"""The norm of gradients that may be too large for a copy in float32, which torch makes on a CPU."""

import torch
from torch import Tensor

AT_ONCE = 1 << 22


def norms_of(*gradients: Tensor) -> list[Tensor]:
    """2-norms of the gradients' pieces, float32 scalars summed in float32; a tensor is cut after AT_ONCE elements."""
    pieces = [piece for gradient in gradients for piece in gradient.reshape(-1).split(AT_ONCE)]
    return list(torch._foreach_norm(pieces, 2, dtype=torch.float32)) if pieces else []


def total_norm(norms: list[Tensor]) -> float:
    """The norm of everything that these are norms of, summed in float64."""
    return float(torch.stack([norm.double() for norm in norms]).norm()) if norms else 0.0
