"""DoRA's magnitudes: y = m / ||W + s B A|| * (x (W + s B A)^T) + bias, the norm of every row of the adapted weight.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353; section 4.3: the norm takes no part in
the gradient. The product itself is LoRA's; this module knows the rows' norms and the factor a column.

B A is never made. ||W + s B A||^2 = ||W||^2 + 2 s sum(W A^T o B) + s^2 sum((B A A^T) o B), row by row: the first is
computed once a weight, W A^T is a product with the few rows of A, the rest is [out, r]. The norms hold until A or B is
written to, so that micro-batches, recomputed layers and every token of a generation share them.

Shape letters: T tokens, I input features, O output features, S the summed outputs of a group, r rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.linear.lora import LoraAdapter
from halfbyte.linear.workspace import scratch
from halfbyte.ops import elementwise
from halfbyte.ops.linear import LinearSegment, available, linear_forward
from halfbyte.quant import Weight

PIECE = 1 << 18
"""Elements of a weight that are dequantized at once to measure its rows: a megabyte, which stays in the cache."""
SMALLEST = 1e-12
"""What a factor of zero is computed as, so that the product can be told from its scaled output."""


def divisor(norm: Tensor) -> Tensor:
    """A row's norm to divide by: a row of zeros has no direction and stays what it is."""
    return torch.where(norm > 0, norm, torch.ones_like(norm))


@torch.no_grad()
def row_norms(weight: Weight, update: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
    """||W + s B A|| of every row, float32 [O]; update: (A, B, s). Piece by piece in one buffer that is kept.

    Temporaries of ever other sizes would leave gigabytes of holes in the heap (measured on 196 linears).
    """
    out_features, in_features = weight.shape
    step = max(1, PIECE // max(1, in_features))
    device = next((t.device for t in (*weight.parameters(), *weight.buffers())), torch.device("cpu"))
    norms = torch.empty(out_features, device=device)
    for start in range(0, out_features, step):
        stop = min(out_features, start + step)
        piece = scratch((stop - start, in_features), torch.float32, device, "row norms")
        weight.dequantize(torch.float32, out=piece, rows=slice(start, stop))
        if update is not None:
            a_RI, b_OR, scaling = update
            piece.addmm_(b_OR[start:stop].float(), a_RI.float(), alpha=scaling)
        torch.linalg.vector_norm(piece, dim=1, out=norms[start:stop])
    return norms


@torch.no_grad()
def times_factor(weight: Weight, a_RI: Tensor, dtype: torch.dtype) -> Tensor:
    """W A^T, float32 [O, r], computed in `dtype`."""
    a_RI = a_RI.detach().to(dtype)
    view = weight.native_view() if available(a_RI) else None
    if view is not None:
        return linear_forward(a_RI, [LinearSegment(view)])[0].float().t()
    out_features, in_features = weight.shape
    step = max(1, PIECE // max(1, in_features))
    parts = []
    for start in range(0, out_features, step):
        stop = min(out_features, start + step)
        piece = scratch((stop - start, in_features), dtype, a_RI.device, "row norms")
        weight.dequantize(dtype, out=piece, rows=slice(start, stop))
        parts.append((piece @ a_RI.t()).float())
    return torch.cat(parts)


@dataclass(frozen=True)
class _Held:
    """Norms, and what they were computed from: tensors, kept alive so that no other takes their identity."""

    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    settings: tuple[object, ...]
    norm: Tensor

    def is_of(self, tensors: tuple[Tensor, ...], settings: tuple[object, ...]) -> bool:
        same = len(tensors) == len(self.tensors) and all(x is y for x, y in zip(tensors, self.tensors, strict=True))
        return same and self.versions == _versions(tensors) and self.settings == settings


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


class RowNorms:
    """||W + s B A|| of every row of one segment, computed when a factor or the weight has changed."""

    def __init__(self) -> None:
        self._base: tuple[Weight, torch.device, Tensor] | None = None
        self._held: _Held | None = None

    @torch.no_grad()
    def of(self, weight: Weight, adapter: LoraAdapter, dtype: torch.dtype) -> Tensor:
        """float32 [O]; products in `dtype`, which the forward pass uses too."""
        a_RI, b_OR, s = adapter.lora_A, adapter.lora_B, adapter.scaling
        trained, device = weight.trainable_tensor(), adapter.lora_B.device
        tensors = (a_RI, b_OR) if trained is None else (a_RI, b_OR, trained)
        settings = weight, dtype, s, device
        if self._held is not None and self._held.is_of(tensors, settings):
            return self._held.norm
        if trained is not None or self._base is None or self._base[:2] != (weight, device):
            self._base = weight, device, row_norms(weight).square()
        cross = (times_factor(weight, a_RI, dtype) * b_OR).sum(1)
        own = ((b_OR @ (a_RI @ a_RI.t())) * b_OR).sum(1)
        # Rounding may take a row of zeros below zero.
        norm = divisor((self._base[2] + 2 * s * cross + s * s * own).clamp_min(0).sqrt())
        self._held = _Held(tensors, _versions(tensors), settings, norm)
        return norm

    def __deepcopy__(self, memo: dict[int, Any]) -> "RowNorms":
        return RowNorms()

    def __getstate__(self) -> dict[str, Any]:
        return {"_base": None, "_held": None}


class _Magnitude(torch.autograd.Function):
    """y = z * m / norm + bias, by column; the norms are constants. Overwrites z where there is no bias.

    Saves one tensor of z's size: the output, which whoever reads it may keep as well, or z where a bias, which may be
    much larger than the rest, would swallow its digits.
    """

    @staticmethod
    def forward(ctx: Any, z_TS: Tensor, m_S: Tensor, norm_S: Tensor, bias_S: Tensor | None) -> Tensor:
        factor_S = _factor(m_S, norm_S)
        ctx.has_bias = bias_S is not None
        native = z_TS.ndim == 2 and z_TS.is_contiguous() and elementwise.available(z_TS)
        if bias_S is None:
            ctx.mark_dirty(z_TS)
            y_TS = elementwise.scale_columns(z_TS, factor_S, None, z_TS) if native else z_TS.mul_(factor_S)
        elif native:
            y_TS = elementwise.scale_columns(z_TS, factor_S, bias_S.float())
        else:
            y_TS = z_TS * factor_S + bias_S
            y_TS = y_TS.to(z_TS.dtype)
        ctx.save_for_backward(y_TS if bias_S is None else z_TS, m_S, norm_S)
        ctx.bias_dtype = None if bias_S is None else bias_S.dtype
        return y_TS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept_TS, m_S, norm_S = ctx.saved_tensors
        dy_TS, factor_S = grads[0].contiguous(), _factor(m_S, norm_S)
        if elementwise.available(dy_TS) and kept_TS.is_contiguous():
            dz_TS, products_S = elementwise.scale_columns_backward(dy_TS, kept_TS, factor_S)
        else:
            products_S = (dy_TS * kept_TS).sum(0, dtype=torch.float32)
            dz_TS = (dy_TS * factor_S).to(dy_TS.dtype)
        dm_S = products_S / (norm_S if ctx.has_bias else factor_S * norm_S)
        dbias_S = dy_TS.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return dz_TS, dm_S, None, dbias_S


def _factor(m_S: Tensor, norm_S: Tensor) -> Tensor:
    """m / norm, kept away from zero: the gradient of a magnitude of 0 is found in what it scaled."""
    factor = m_S.detach().float() / norm_S
    return torch.where(factor.abs() < SMALLEST, torch.full_like(factor, SMALLEST).copysign(factor), factor)


def scale_rows(z_TS: Tensor, m_S: Tensor, norm_S: Tensor, bias_S: Tensor | None) -> Tensor:
    """The outputs of a group's linears with their magnitudes; m and norm are 1 for those without. z may be consumed."""
    result: Tensor = _Magnitude.apply(z_TS, m_S, norm_S, bias_S)  # type: ignore[no-untyped-call]
    return result
