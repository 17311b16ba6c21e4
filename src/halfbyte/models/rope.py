"""Rotary position embedding: frequencies of every scaling variant, and the rotation.

Su et al. 2021 (RoFormer, arXiv 2104.09864) in the half-split layout of the Hugging Face checkpoints: feature i is
paired with feature i + dim/2. Scaling variants: linear (position interpolation, arXiv 2306.15595), dynamic NTK,
YaRN (arXiv 2309.00071), Llama 3.1's, LongRoPE (arXiv 2402.13753).

Shape letters: T tokens, H heads (of queries, where there are others), K key-value heads, E features of a head,
F = rotated features / 2, S = (H + 2K) E.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from halfbyte.models.blocks import norm_scale, rms_norm
from halfbyte.models.spec import RopeSpec
from halfbyte.ops import elementwise, pool


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


class _Heads(torch.autograd.Function):
    """`heads` natively: one pass over the queries and one over the keys, in place where that is allowed.

    Saves the fused buffer. With norms, q and k are written beside it, as backward needs their inputs; the gradient is
    written into the buffer that the attention's gradients come in, if it is one, else over the saved one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv_TS: Tensor,
        q_norm_E: Tensor | None,
        k_norm_E: Tensor | None,
        cos_TF: Tensor,
        sin_TF: Tensor,
        sizes: tuple[int, int],
        eps: float,
        plus_one: bool,
        overwrite: bool,
        in_place: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.sizes, ctx.plus_one, ctx.overwrite = sizes, plus_one, overwrite
        q, k, v = _split(qkv_TS.detach(), sizes)
        out = (q, k)
        if not in_place:
            both = pool.empty((q.shape[0], q.shape[1] + k.shape[1], q.shape[2]), q.dtype)
            out = both[:, : q.shape[1]], both[:, q.shape[1] :]
        elif not qkv_TS.is_inference():
            increment_version(qkv_TS)
        rstds = []
        for x, to, weight in zip((q, k), out, (q_norm_E, k_norm_E), strict=True):
            scale = None if weight is None else norm_scale(weight, plus_one)
            rstds.append(elementwise.rotate_heads(x, cos_TF, sin_TF, to, scale, eps))
        keep = qkv_TS if overwrite or q_norm_E is not None else None
        ctx.save_for_backward(keep, q_norm_E, k_norm_E, cos_TF, sin_TF, *rstds)
        return (*out, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv_TS, q_norm_E, k_norm_E, cos_TF, sin_TF, *rstds = ctx.saved_tensors
        dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in grads)
        dqkv_TS = _fused(dq, dk, dv) if ctx.overwrite else None
        if dqkv_TS is None and ctx.overwrite:
            dqkv_TS = qkv_TS.detach()
            increment_version(qkv_TS)  # a second backward is refused instead of wrong
        if dqkv_TS is None:
            dqkv_TS = pool.empty((dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2]), dq.dtype)
        *out, out_v = _split(dqkv_TS, ctx.sizes)
        inputs = (None, None) if qkv_TS is None else _split(qkv_TS.detach(), ctx.sizes)[:2]
        dweights: list[Tensor | None] = [None, None]
        for i, (dy, x, weight) in enumerate(zip((dq, dk), inputs, (q_norm_E, k_norm_E), strict=True)):
            if weight is None:
                elementwise.rotate_heads(dy, cos_TF, sin_TF, out[i], inverse=True)
                continue
            assert x is not None
            scale, sums = norm_scale(weight, ctx.plus_one), ctx.needs_input_grad[1 + i]
            dweight = elementwise.rotate_heads_backward(dy, cos_TF, sin_TF, x, scale, rstds[i], out[i], sums)
            dweights[i] = None if dweight is None else dweight.to(weight.dtype)
        if out_v.data_ptr() != dv.data_ptr():
            out_v.copy_(dv)
        return (dqkv_TS, *dweights, *[None] * 7)


def _split(qkv_TS: Tensor, sizes: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The queries [T, H, E], keys and values [T, K, E] of a fused buffer, as views."""
    heads, kv_heads = sizes
    q, k, v = qkv_TS.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    return q, k, v


def _fused(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor | None:
    """The buffer [T, S] that these are the views of, as `_split` makes them; None where they are not."""
    tokens, heads, features = q_THE.shape
    width = (heads + 2 * k_TKE.shape[1]) * features
    place = q_THE.data_ptr()
    for part in (q_THE, k_TKE, v_TKE):
        if part.stride() != (width, features, 1) or part.data_ptr() != place:
            return None
        place += part.shape[1] * features * part.element_size()
    storages = {part.untyped_storage().data_ptr() for part in (q_THE, k_TKE, v_TKE)}
    return q_THE.as_strided((tokens, width), (width, 1)) if len(storages) == 1 else None


def heads(
    qkv_TS: Tensor,
    sizes: tuple[int, int],
    tables: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    plus_one: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, E], keys and values [T, K, E] of one fused projection, ready for attention.

    sizes      (H, K)
    tables     (cos, sin), each [T, F]: queries and keys are rotated
    norms      weights [E] of the norms of every query and key head before the rotation (Qwen 3, Gemma 3), or None
    overwrite  nobody else reads `qkv`, nor the gradients of the results: the results may take its memory, and the
               gradient theirs
    """
    if qkv_TS.is_contiguous() and elementwise.available(qkv_TS):
        q_norm, k_norm = norms or (None, None)
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv_TS, q_norm, k_norm))
        in_place = overwrite and (norms is None or not recorded)  # the norms' gradients need what was there
        result: tuple[Tensor, Tensor, Tensor] = _Heads.apply(  # type: ignore[no-untyped-call]
            qkv_TS, q_norm, k_norm, *tables, sizes, eps, plus_one, overwrite, in_place
        )
        return result
    q, k, v = _split(qkv_TS, sizes)
    if norms is not None:
        q, k = rms_norm(q, norms[0], eps, plus_one), rms_norm(k, norms[1], eps, plus_one)
    return apply_rope(q, *tables), apply_rope(k, *tables), v
