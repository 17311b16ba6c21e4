"""Rotary position embedding: frequencies of every scaling variant, and the rotation.

Su et al. 2021 (RoFormer, arXiv 2104.09864) in the half-split layout of the Hugging Face checkpoints: feature i is
paired with feature i + dim/2. Scaling variants: linear (position interpolation, arXiv 2306.15595), dynamic NTK,
YaRN (arXiv 2309.00071), Llama 3.1's, LongRoPE (arXiv 2402.13753).

Shape letters: T tokens, H heads, E features of a head, F = rotated features / 2.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.models.spec import RopeSpec


def _base_frequencies(theta: float, dim: int) -> Tensor:
    inverse: Tensor = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
    return inverse


def frequencies(rope: RopeSpec, length: int) -> tuple[Tensor, float]:
    """(inverse frequencies float32 [F], factor on cos and sin) for a document of `length` tokens.

    Only `dynamic` and `longrope` look at the length.
    """
    p = rope.params
    plain = _base_frequencies(rope.theta, rope.dim)
    if rope.kind == "default":
        return plain, 1.0
    if rope.kind == "linear":
        return plain / p["factor"], 1.0
    if rope.kind == "dynamic":
        stretch = p["factor"] * max(length, rope.max_position) / rope.max_position - (p["factor"] - 1)
        return _base_frequencies(rope.theta * stretch ** (rope.dim / (rope.dim - 2)), rope.dim), 1.0
    if rope.kind == "llama3":
        return _llama3(plain, p), 1.0
    if rope.kind == "yarn":
        return _yarn(rope)
    return _longrope(rope, length)


def _llama3(plain: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long waves slowed by `factor`, short ones kept, a linear blend between."""
    waves = 2 * math.pi / plain
    old, low, high = p["original_max_position_embeddings"], p["low_freq_factor"], p["high_freq_factor"]
    blend = ((old / waves - low) / (high - low)).clamp(0, 1)
    mixed: Tensor = (1 - blend) * plain / p["factor"] + blend * plain
    return mixed


def _yarn(rope: RopeSpec) -> tuple[Tensor, float]:
    """YaRN, section 3: interpolate the slow features, extrapolate the fast ones, a ramp between."""
    p, dim = rope.params, rope.dim
    old, factor = p["original_max_position_embeddings"], p["factor"]

    def corrected(rotations: float) -> float:
        return dim * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = corrected(p.get("beta_fast") or 32), corrected(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    plain = _base_frequencies(rope.theta, dim)

    def mscale(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    attention = p.get("attention_factor")
    if attention is None:
        m, m_all = p.get("mscale"), p.get("mscale_all_dim")
        attention = mscale(factor, m) / mscale(factor, m_all) if m and m_all else mscale(factor)
    return plain / factor * ramp + plain * (1 - ramp), float(attention)


def _longrope(rope: RopeSpec, length: int) -> tuple[Tensor, float]:
    """LongRoPE: per-feature factors, one set up to the original length and one beyond it."""
    p = rope.params
    old = p["original_max_position_embeddings"]
    factor = p.get("factor") or rope.max_position / old
    attention = p.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    stretch = torch.tensor(p["long_factor" if length > old else "short_factor"], dtype=torch.float32)
    powers = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    return 1.0 / (stretch * rope.theta**powers), float(attention)


def table(
    rope: RopeSpec, position_ids: Tensor, totals: list[int], dtype: torch.dtype, new: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [T, F], for the tokens of several documents.

    position_ids  int64 [T], documents end to end
    totals        how long each document is in all, cached tokens included: `dynamic` and `longrope` depend on it
    new           how many tokens of each document are in `position_ids` (default: all of them)
    """
    by_length = rope.kind in ("dynamic", "longrope")
    if not by_length or len(set(totals)) == 1:
        return _table(rope, position_ids, max(totals, default=1), dtype)
    sizes = list(new if new is not None else totals)
    parts = [_table(rope, ids, n, dtype) for ids, n in zip(position_ids.split(sizes), totals, strict=True)]
    return torch.cat([c for c, _ in parts]), torch.cat([s for _, s in parts])


def _table(rope: RopeSpec, position_ids: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inverse, factor = frequencies(rope, length)
    angles = position_ids[:, None].float() * inverse.to(position_ids.device)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def _rotate(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    half = cos_TF.shape[-1]
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    first, second = x_THE[..., :half], x_THE[..., half : 2 * half]
    out = torch.empty(x_THE.shape, dtype=x_THE.dtype, device=x_THE.device)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin)
    if 2 * half < x_THE.shape[-1]:  # partial rotary: the rest passes
        out[..., 2 * half :] = x_THE[..., 2 * half :]
    return out


class _Rope(torch.autograd.Function):
    """A rotation; its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TF, sin_TF)
        return _rotate(x_THE, cos_TF, sin_TF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos_TF, sin_TF = ctx.saved_tensors
        return _rotate(grads[0], cos_TF, -sin_TF), None, None


def apply_rope(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate the first 2F features of every head, [T, H, E] -> [T, H, E]."""
    result: Tensor = _Rope.apply(x_THE, cos_TF, sin_TF)  # type: ignore[no-untyped-call]
    return result
