"""Causal attention over documents laid end to end, and the key-value cache.

No padding and no dense mask over the batch: each document is attended on its own. A sliding window is cut into
query blocks that look at the keys they can see and no others.

Shape letters: T tokens, B documents, L tokens of one document, H query heads, K key-value heads, E head features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from halfbyte.linear import Remake
from halfbyte.ops import attention as native
from halfbyte.ops import pool

SOFTCAP_BLOCK = 256  # query rows of a block where scores are written out


class KVCache:
    """Keys and values of several sequences, preallocated: per layer [B, K, capacity, E].

    `lengths[b]` tokens of sequence b are held. `Decoder.logits(..., cache=...)` appends to it.
    """

    def __init__(
        self, layers: int, batch: int, kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype, device: str
    ) -> None:
        shape = (batch, kv_heads, capacity, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.capacity = capacity
        self.lengths = [0] * batch

    def append(self, layer: int, k_TKE: Tensor, v_TKE: Tensor, new: list[int]) -> None:
        """Write the new tokens of each sequence behind its old ones; `advance` moves the lengths afterwards."""
        keys, values = self.keys[layer], self.values[layer]
        for b, (k, v) in enumerate(zip(k_TKE.split(new), v_TKE.split(new), strict=True)):
            start, stop = self.lengths[b], self.lengths[b] + new[b]
            keys[b, :, start:stop] = k.transpose(0, 1)
            values[b, :, start:stop] = v.transpose(0, 1)

    def advance(self, new: list[int]) -> None:
        self.lengths = [old + n for old, n in zip(self.lengths, new, strict=True)]

    def keep(self, sequences: list[int]) -> None:
        """Drop all sequences but these (finished ones leave the batch)."""
        index = torch.tensor(sequences, dtype=torch.int64, device=self.keys[0].device)
        self.keys = [k.index_select(0, index) for k in self.keys]
        self.values = [v.index_select(0, index) for v in self.values]
        self.lengths = [self.lengths[i] for i in sequences]

    def truncate(self, lengths: list[int]) -> None:
        """Forget the tokens behind `lengths` (to score several continuations of one prompt)."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"cannot truncate a cache of lengths {self.lengths} to {lengths}")
        self.lengths = list(lengths)


def attend(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    remake: Remake | None = None,
) -> Tensor:
    """Causal attention inside each document, [T, H, E] -> [T, H, E]. Differentiable.

    window   keys a query sees, itself included (transformers' convention); None: all before it
    softcap  Gemma 2's capping of the scores, c * tanh(s / c), before the mask
    remake   how to make (q, k, v) again, so that they need not be kept for the gradients
    """
    if native.available(q_THE):
        arguments = (remake, q_THE, k_TKE, v_TKE, lengths, scale, window, softcap)
        result: Tensor = _Attention.apply(*arguments)  # type: ignore[no-untyped-call]
        return result
    if len(lengths) > 1 and len(set(lengths)) == 1:
        batched = (len(lengths), lengths[0])
        q, k, v = q_THE.unflatten(0, batched), k_TKE.unflatten(0, batched), v_TKE.unflatten(0, batched)
        return _document(q, k, v, scale, window, softcap).flatten(0, 1)
    sizes = list(lengths)
    parts = [
        _document(q[None], k[None], v[None], scale, window, softcap)[0]
        for q, k, v in zip(q_THE.split(sizes), k_TKE.split(sizes), v_TKE.split(sizes), strict=True)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _parts(qkv: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    return q, k, v


class _Attention(torch.autograd.Function):
    """The native attention. Saves its inputs, or what they are remade from, its output, a number a query and head."""

    @staticmethod
    def forward(ctx: Any, remake: Remake | None, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        out, lse = native.attention(q, k, v, *options)
        inputs = (q, k, v) if remake is None else tuple(tensor.detach() for tensor in remake.tensors)
        ctx.save_for_backward(out, lse, *inputs)
        ctx.make, ctx.options = None if remake is None else remake.make, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, *inputs = ctx.saved_tensors
        q, k, v = inputs if ctx.make is None else ctx.make(*inputs)
        # Side by side, so that the node before, which had them so, can take them as they lie.
        fused = pool.empty((q.shape[0], q.shape[1] + 2 * k.shape[1], q.shape[2]), q.dtype)
        lengths, scale, window, softcap = ctx.options
        into = _parts(fused, k.shape[1])
        dq, dk, dv = native.attention_backward(grads[0], q, k, v, out, lse, lengths, scale, window, softcap, into)
        return None, dq, dk, dv, None, None, None, None


def _document(
    q_BLHE: Tensor, k_BLKE: Tensor, v_BLKE: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """Equally long documents as a batch, [B, L, H, E] -> [B, L, H, E]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLHE, k_BLKE, v_BLKE))
    length = q.shape[2]
    if softcap is None and (window is None or length <= window):
        return _sdpa(q, k, v, scale, causal=True).transpose(1, 2)
    block = SOFTCAP_BLOCK if softcap is not None else window
    assert block is not None
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = 0 if window is None else max(0, start - window + 1)
        rows = torch.arange(start, stop, device=q.device)[:, None]
        columns = torch.arange(first, stop, device=q.device)[None]
        seen = columns <= rows
        if window is not None:
            seen &= columns > rows - window
        keys, values = k[:, :, first:stop], v[:, :, first:stop]
        outputs.append(_masked(q[:, :, start:stop], keys, values, scale, seen, softcap))
    return torch.cat(outputs, 2).transpose(1, 2)


def _masked(q: Tensor, k: Tensor, v: Tensor, scale: float, seen: Tensor, softcap: float | None) -> Tensor:
    """Attention with an explicit mask of what is seen; scores are written out only where they are soft-capped."""
    if softcap is None:
        return _sdpa(q, k, v, scale, mask=seen)
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    scores = (q @ k.transpose(-1, -2)).float() * scale
    scores = (scores / softcap).tanh() * softcap
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(v.dtype)
    return weights @ v


def _repeat(x_BKLE: Tensor, heads: int) -> Tensor:
    """Grouped queries: each key-value head serves heads / K query heads. A view where it can be one."""
    groups = heads // x_BKLE.shape[1]
    return x_BKLE if groups == 1 else x_BKLE[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    heads = q.shape[1]
    return F.scaled_dot_product_attention(
        q, _repeat(k, heads), _repeat(v, heads), attn_mask=mask, is_causal=causal, scale=scale
    )


def attend_cached(
    q_THE: Tensor,
    cache: KVCache,
    layer: int,
    new: list[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of the new tokens of each sequence over its cache, which already holds them. Inference only."""
    totals = [old + n for old, n in zip(cache.lengths, new, strict=True)]
    if all(n == 1 for n in new):
        return _step(q_THE, cache, layer, totals, scale, window, softcap)
    outputs = []
    for b, q in enumerate(q_THE.split(new)):
        if new[b] == 0:
            continue
        total = totals[b]
        k, v = cache.keys[layer][b : b + 1, :, :total], cache.values[layer][b : b + 1, :, :total]
        if new[b] == total:
            outputs.append(_document(q[None], k.transpose(1, 2), v.transpose(1, 2), scale, window, softcap)[0])
            continue
        rows = torch.arange(total - new[b], total, device=q.device)[:, None]
        columns = torch.arange(total, device=q.device)[None]
        seen = columns <= rows
        if window is not None:
            seen &= columns > rows - window
        outputs.append(_masked(q.transpose(0, 1)[None], k, v, scale, seen, softcap)[0].transpose(0, 1))
    return torch.cat(outputs)


def _step(
    q_BHE: Tensor, cache: KVCache, layer: int, totals: list[int], scale: float, window: int | None, cap: float | None
) -> Tensor:
    """One new token for every sequence: all of them in one call, with a mask over the longest."""
    longest = max(totals)
    first = 0 if window is None else max(0, min(totals) - window)
    k, v = cache.keys[layer][:, :, first:longest], cache.values[layer][:, :, first:longest]
    q = q_BHE[:, :, None]
    columns = torch.arange(first, longest, device=q.device)[None]
    total = torch.tensor(totals, device=q.device)[:, None]
    seen = columns < total
    if window is not None:
        seen &= columns >= total - window
    if bool(seen.all()) and cap is None:
        return _sdpa(q, k, v, scale)[:, :, 0]
    # Slots behind a sequence's end were never written: zero times an unset NaN would still be NaN.
    k = k.masked_fill(~seen[:, None, :, None], 0.0)
    v = v.masked_fill(~seen[:, None, :, None], 0.0)
    return _masked(q, k, v, scale, seen[:, None, None], cap)[:, :, 0]
