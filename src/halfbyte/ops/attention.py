"""Causal attention over documents laid end to end on the CPU: the C++ of `csrc/engine/attention.*`, both directions.

FlashAttention-2 (arXiv 2307.08691) over blocks of queries and keys: nothing of the size of the scores is ever held,
keys that nobody sees are never read, and the result does not depend on the number of threads. Callers ask `available`;
there is no reference here, torch's own attention is that (`models.attention`).

Shape letters: T tokens, H query heads, K key-value heads, E head features. The last dimension must be contiguous, the
others may be strided: slices of one fused query-key-value tensor will do.
"""

import ctypes

import torch
from torch import Tensor

from halfbyte.ops import native, pool
from halfbyte.ops.native import INT, INT64, POINTER

# dtype, shape, numbers, lengths, documents, data, strides, lse
_ARGUMENTS = [INT, *[POINTER] * 3, INT64, *[POINTER] * 3]
native.declare({"hb_attention": _ARGUMENTS, "hb_attention_backward": _ARGUMENTS})


def available(q: Tensor) -> bool:
    """Whether the native engine has attention for tensors like this one."""
    even = q.dtype == torch.float32 or q.shape[-1] % 2 == 0
    return q.device.type == "cpu" and even and q.shape[-1] > 0 and native.multiplies(q.dtype)


def _check(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    if not available(q_THE):
        raise ValueError(f"no native attention for {q_THE.dtype} with {q_THE.shape[-1]} features on {q_THE.device}")
    tokens, heads, features = q_THE.shape
    kv_heads = k_TKE.shape[1]
    if k_TKE.shape != (tokens, kv_heads, features) or v_TKE.shape != k_TKE.shape:
        raise ValueError(f"q {list(q_THE.shape)}, k {list(k_TKE.shape)} and v {list(v_TKE.shape)} do not fit together")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} key-value heads")
    if any(x.dtype != q_THE.dtype or x.device != q_THE.device for x in (k_TKE, v_TKE)):
        raise ValueError("q, k and v differ in dtype or device")
    if sum(lengths) != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"documents of {sum(lengths)} tokens in all, but {tokens} tokens")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys: a query sees at least itself")
    if scale <= 0 or (softcap is not None and softcap <= 0):
        raise ValueError(f"scale {scale} and softcap {softcap} must be positive")


def _check_output(x: Tensor, like: Tensor) -> None:
    if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device or x.stride(-1) != 1:
        raise ValueError(f"a gradient of {list(like.shape)} cannot be written to {list(x.shape)}, strides {x.stride()}")


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(
    name: str,
    tensors: tuple[Tensor, ...],
    lse_HT: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    q, k = tensors[:2]
    tokens, heads, features = q.shape
    if q.numel() == 0:
        return
    shape = (ctypes.c_int64 * 5)(tokens, heads, k.shape[1], features, tokens if window is None else min(window, tokens))
    numbers = (ctypes.c_float * 2)(scale, softcap or 0.0)
    data = (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))
    strides = (ctypes.c_int64 * (2 * len(tensors)))(*(stride for x in tensors for stride in x.stride()[:2]))
    documents = (ctypes.c_int64 * len(lengths))(*lengths)
    function = getattr(native.library(), name)
    function(native.DTYPE[q.dtype], shape, numbers, documents, len(lengths), data, strides, lse_HT.data_ptr())


def attention(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(output [T, H, E], float32 log-sum-exp of the scores [H, T]); the second is what `attention_backward` needs.

    lengths  tokens of each document; they sum to T
    window   keys a query sees, itself included; None: all before it
    softcap  c * tanh(scale * q.k / c) instead of scale * q.k; None: not

    ValueError where `available` says no, and for arguments that do not fit together.
    """
    _check(q_THE, k_TKE, v_TKE, lengths, scale, window, softcap)
    out = pool.empty_like(q_THE)
    lse = torch.empty(q_THE.shape[1], q_THE.shape[0])
    _call("hb_attention", (_rows(q_THE), _rows(k_TKE), _rows(v_TKE), out), lse, lengths, scale, window, softcap)
    return out, lse


def attention_backward(
    dout_THE: Tensor,
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    out_THE: Tensor,
    lse_HT: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the output's, written to `into` (views of one tensor, say) or to new tensors."""
    _check(q_THE, k_TKE, v_TKE, lengths, scale, window, softcap)
    if dout_THE.shape != q_THE.shape or dout_THE.dtype != q_THE.dtype or out_THE.shape != q_THE.shape:
        raise ValueError(f"a gradient {dout_THE.dtype} {list(dout_THE.shape)} for queries {list(q_THE.shape)}")
    if into is None:
        dq, dk, dv = (pool.empty_like(x) for x in (q_THE, k_TKE, v_TKE))
    else:
        dq, dk, dv = into
        for gradient, like in zip(into, (q_THE, k_TKE, v_TKE), strict=True):
            _check_output(gradient, like)
    inputs = (_rows(x) for x in (q_THE, k_TKE, v_TKE, out_THE, dout_THE))
    _call("hb_attention_backward", (*inputs, dq, dk, dv), lse_HT, lengths, scale, window, softcap)
    return dq, dk, dv
