"""The elementwise pieces of a decoder layer on the CPU, forward and backward, each one pass over memory.

bfloat16 and float32, statistics and arithmetic in float32, one rounding at the end. Everything here needs the native
library and takes tensors for which `available` is true; who calls has a way without. Norm weights are float32 and are
what a norm multiplies with (Gemma's with its one added); sums over rows come back in float32.

Shape letters: N rows, D features, T tokens, I intermediate features, H heads, E features of a head, F rotated pairs.
"""

import ctypes

import torch
from torch import Tensor

from halfbyte.ops import native, pool
from halfbyte.ops.native import FLOAT, INT, INT64, POINTER, pointer

native.declare(
    {
        # dtype, rows, width, x, inner, outer stride, inner stride, h, post, pre, eps, s, y, rstd of h, rstd of s
        "hb_norm": [INT, INT64, INT64, POINTER, *[INT64] * 3, *[POINTER] * 3, FLOAT, *[POINTER] * 4],
        # dtype, rows, width, dy, ds, s, inner, outer stride, inner stride, h, pre, post, rstd of s, rstd of h, dx, dh,
        # dweights
        "hb_norm_backward": [INT, INT64, INT64, *[POINTER] * 3, *[INT64] * 3, *[POINTER] * 8],
        # dtype, rows, width, gate_up, stride, activation, out
        "hb_gate": [INT, INT64, INT64, POINTER, INT64, INT, POINTER],
        # dtype, rows, width, gate_up, stride, dout, activation, dgate_up
        "hb_gate_backward": [INT, INT64, INT64, POINTER, INT64, POINTER, INT, POINTER],
        # dtype, tokens, heads, features, half, from, its token and head stride, cos, sin, float tables, inverse,
        # weight, eps, rstd, to, its token stride
        "hb_heads": [
            *[INT, *[INT64] * 4, POINTER, INT64, INT64, POINTER, POINTER, INT, INT, POINTER, FLOAT],
            *[POINTER, POINTER, INT64],
        ],
        # dtype, tokens, heads, features, half, dy, its token and head stride, cos, sin, float tables, weight, x, its
        # token stride, rstd, dx, its token stride, dweight
        "hb_heads_backward": [
            *[INT, *[INT64] * 4, POINTER, INT64, INT64, POINTER, POINTER, INT, POINTER, POINTER, INT64],
            *[POINTER, POINTER, INT64, POINTER],
        ],
        # dtype, rows, width, x, scale, bias, out
        "hb_columns": [INT, INT64, INT64, *[POINTER] * 4],
        # dtype, rows, width, dy, kept, scale, dx, products
        "hb_columns_backward": [INT, INT64, INT64, *[POINTER] * 5],
    }
)

_ACTIVATION = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def available(x: Tensor) -> bool:
    """Whether these functions take x: a dense bfloat16 or float32 tensor on the CPU, and there is a native library."""
    served = x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu"
    return served and native.library() is not None


def _library() -> ctypes.CDLL:
    library = native.library()
    assert library is not None, "asked before with `available`"
    return library


def _check(x: Tensor, shape: tuple[int, ...], like: Tensor, name: str, contiguous: bool = True) -> None:
    if x.dtype != like.dtype or x.device != like.device or tuple(x.shape) != shape:
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)} on {x.device}, not {like.dtype} {list(shape)}")
    if contiguous and not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous: its strides are {list(x.stride())}")


def _check_float(x: Tensor, shape: tuple[int, ...], name: str) -> None:
    if x.dtype != torch.float32 or tuple(x.shape) != shape or not x.is_contiguous():
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, not contiguous float32 {list(shape)}")


def _check_served(x: Tensor) -> None:
    if not available(x):
        raise ValueError(f"no native kernel for {x.dtype} on {x.device}")


def _rows(x: Tensor) -> tuple[int, int, int, int, int]:
    """(rows, features, rows of a group, stride between groups, stride inside) of [N, D] or [T, H, D]."""
    _check_served(x)
    if x.ndim not in (2, 3) or (x.stride(-1) != 1 and x.shape[-1] > 1):
        raise ValueError(f"rows are [N, D] or [T, H, D] with a contiguous last dimension, not {list(x.shape)}")
    inner, inner_stride = (1, 0) if x.ndim == 2 else (max(x.shape[1], 1), x.stride(1))
    return x.shape[:-1].numel(), x.shape[-1], inner, x.stride(0), inner_stride


# -- norms ------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(y = x / sqrt(mean(x^2) + eps) * weight, contiguous; 1 / sqrt(mean(x^2) + eps) float32, a number a row).

    RMSNorm (arXiv 1910.07467). x is [N, D] or [T, H, D] with any strides but a contiguous last dimension: the heads
    inside a fused query-key-value buffer need no copy.
    """
    count, width, *strides = _rows(x)
    _check_float(weight_D, (width,), "weight")
    y = pool.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    _library().hb_norm(
        native.DTYPE[x.dtype], count, width, x.data_ptr(), *strides, None, None, weight_D.data_ptr(), eps,
        None, y.data_ptr(), None, rstd.data_ptr(),
    )  # fmt: skip
    return y, rstd


def add_rms_norm(
    x_ND: Tensor, h_ND: Tensor, post_D: Tensor | None, pre_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(s = x + h, y = norm(s) * pre, rstd of h, rstd of s); with `post` (Gemma 2 and 3), s = x + norm(h) * post.

    y and the rstd of s are None without `pre`, the rstd of h without `post`. y is the norm of s as it was rounded.
    """
    count, width, *strides = _rows(x_ND)
    _check(h_ND, tuple(x_ND.shape), x_ND, "h")
    if x_ND.ndim != 2:
        raise ValueError(f"x is [N, D], not {list(x_ND.shape)}")
    for name, weight in (("post", post_D), ("pre", pre_D)):
        if weight is not None:
            _check_float(weight, (width,), name)
    s = pool.empty_like(h_ND)
    y = None if pre_D is None else pool.empty_like(h_ND)
    rstd_h = None if post_D is None else torch.empty(count, dtype=torch.float32)
    rstd_s = None if pre_D is None else torch.empty(count, dtype=torch.float32)
    _library().hb_norm(
        native.DTYPE[x_ND.dtype], count, width, x_ND.data_ptr(), *strides, h_ND.data_ptr(), pointer(post_D),
        pointer(pre_D), eps, s.data_ptr(), pointer(y), pointer(rstd_h), pointer(rstd_s),
    )  # fmt: skip
    return s, y, rstd_h, rstd_s


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight_D: Tensor, rstd: Tensor, ds: Tensor | None = None, sums: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight float32 [D] or None without `sums`) of `rms_norm`, plus what reaches x on another way, `ds`."""
    count, width, *strides = _rows(x)
    _check(dy, tuple(x.shape), x, "dy")
    _check_float(weight_D, (width,), "weight")
    _check_float(rstd, tuple(x.shape[:-1]), "rstd")
    if ds is not None:
        _check(ds, tuple(x.shape), x, "ds")
    dx = pool.empty_like(x)
    dweights = torch.empty(2, width) if sums else None
    _library().hb_norm_backward(
        native.DTYPE[x.dtype], count, width, dy.data_ptr(), pointer(ds), x.data_ptr(), *strides, None,
        weight_D.data_ptr(), None, rstd.data_ptr(), None, dx.data_ptr(), None, pointer(dweights),
    )  # fmt: skip
    return dx, None if dweights is None else dweights[0]


def sandwich_backward(
    ds_ND: Tensor | None,
    dy_ND: Tensor | None,
    s_ND: Tensor,
    h_ND: Tensor,
    post_D: Tensor,
    pre_D: Tensor | None,
    rstd_h: Tensor,
    rstd_s: Tensor | None,
    sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dh, [dpre, dpost] float32 [2, D] or None without `sums`) of `add_rms_norm` with `post`.

    ds and dy are the gradients of s and y, not both None; without dy, dx is ds itself.
    """
    count, width, *strides = _rows(s_ND)
    grads = [g for g in (ds_ND, dy_ND) if g is not None]
    for name, grad in (("ds", ds_ND), ("dy", dy_ND), ("h", h_ND)):
        if grad is not None:
            _check(grad, tuple(s_ND.shape), s_ND, name)
    if not grads or (dy_ND is not None and (pre_D is None or rstd_s is None)):
        raise ValueError("there is ds, or dy with the weight and rstd of its norm")
    _check_float(post_D, (width,), "post")
    _check_float(rstd_h, (count,), "rstd_h")
    if dy_ND is not None and pre_D is not None and rstd_s is not None:
        _check_float(pre_D, (width,), "pre")
        _check_float(rstd_s, (count,), "rstd_s")
    dx, dh = grads[0] if dy_ND is None else pool.empty_like(h_ND), pool.empty_like(h_ND)
    dweights = torch.empty(2, width) if sums else None
    _library().hb_norm_backward(
        native.DTYPE[s_ND.dtype], count, width, pointer(dy_ND), pointer(ds_ND), s_ND.data_ptr(), *strides,
        h_ND.data_ptr(), pointer(pre_D), post_D.data_ptr(), pointer(rstd_s), rstd_h.data_ptr(), dx.data_ptr(),
        dh.data_ptr(), pointer(dweights),
    )  # fmt: skip
    return dx, dh, dweights


# -- gated units ------------------------------------------------------------------------------------------------------


def _gate(gate_up_T2I: Tensor, kind: str) -> tuple[int, int, int]:
    """(rows, I, stride between rows)"""
    _check_served(gate_up_T2I)
    if kind not in _ACTIVATION:
        raise ValueError(f"no activation {kind!r}: {', '.join(_ACTIVATION)}")
    if gate_up_T2I.ndim != 2 or gate_up_T2I.shape[1] % 2 or gate_up_T2I.stride(1) != 1:
        raise ValueError(f"gate and up are [T, 2I] with contiguous rows, not {list(gate_up_T2I.shape)}")
    return gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2, gate_up_T2I.stride(0)


def gated_unit(gate_up_T2I: Tensor, kind: str) -> Tensor:
    """act(gate) * up, [T, 2I] -> [T, I] (arXiv 2002.05202). kind: silu, gelu_tanh or gelu (the exact one)."""
    rows, width, stride = _gate(gate_up_T2I, kind)
    out = pool.empty((rows, width), gate_up_T2I.dtype)
    _library().hb_gate(
        native.DTYPE[out.dtype], rows, width, gate_up_T2I.data_ptr(), stride, _ACTIVATION[kind], out.data_ptr()
    )
    return out


def gated_unit_backward(dout_TI: Tensor, gate_up_T2I: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
    """The gradient of gate and up side by side, [T, 2I]; `out` may be `gate_up` itself."""
    rows, width, stride = _gate(gate_up_T2I, kind)
    _check(dout_TI, (rows, width), gate_up_T2I, "dout")
    if out is None:
        out = pool.empty((rows, 2 * width), gate_up_T2I.dtype)
    _check(out, (rows, 2 * width), gate_up_T2I, "out")
    _library().hb_gate_backward(
        native.DTYPE[out.dtype], rows, width, gate_up_T2I.data_ptr(), stride, dout_TI.data_ptr(), _ACTIVATION[kind],
        out.data_ptr(),
    )  # fmt: skip
    return out


# -- heads ------------------------------------------------------------------------------------------------------------


def _heads(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor, out_THE: Tensor) -> tuple[int, int, int, int]:
    """(T, H, E, F)"""
    _check_served(x_THE)
    if x_THE.ndim != 3 or (x_THE.stride(2) != 1 and x_THE.shape[2] > 1):
        raise ValueError(f"heads are [T, H, E] with a contiguous last dimension, not {list(x_THE.shape)}")
    tokens, heads, features = x_THE.shape
    _check(out_THE, (tokens, heads, features), x_THE, "out", contiguous=False)
    if out_THE.stride(2) != 1 or (heads > 1 and out_THE.stride(1) != features):
        raise ValueError(f"the heads of a token lie side by side in `out`; its strides are {list(out_THE.stride())}")
    if cos_TF.shape != sin_TF.shape or cos_TF.dtype != sin_TF.dtype or cos_TF.dtype not in (x_THE.dtype, torch.float32):
        raise ValueError(f"cos and sin are of one shape, in {x_THE.dtype} or float32, not {cos_TF.dtype}")
    if cos_TF.ndim != 2 or cos_TF.shape[0] != tokens or 2 * cos_TF.shape[1] > features:
        raise ValueError(f"cos and sin are [{tokens}, up to {features // 2}], not {list(cos_TF.shape)}")
    if not (cos_TF.is_contiguous() and sin_TF.is_contiguous()):
        raise ValueError("cos and sin are contiguous")
    return tokens, heads, features, cos_TF.shape[1]


def rotate_heads(
    x_THE: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    out_THE: Tensor,
    weight_E: Tensor | None = None,
    eps: float = 0.0,
    inverse: bool = False,
) -> Tensor | None:
    """Norm every head (where there is a weight) and rotate its first 2F features into `out`, which may be x itself.

    Rotary embedding in the half-split layout (arXiv 2104.09864). x may have any strides but a contiguous last
    dimension; in `out` a token's heads lie side by side. inverse: by the opposite angle, which is the gradient.
    Returns the norms' rstd, float32 [T, H], or None without a weight.
    """
    tokens, heads, features, half = _heads(x_THE, cos_TF, sin_TF, out_THE)
    if weight_E is not None:
        _check_float(weight_E, (features,), "weight")
    rstd = None if weight_E is None else torch.empty(tokens, heads, dtype=torch.float32)
    _library().hb_heads(
        native.DTYPE[x_THE.dtype], tokens, heads, features, half, x_THE.data_ptr(), x_THE.stride(0), x_THE.stride(1),
        cos_TF.data_ptr(), sin_TF.data_ptr(), cos_TF.dtype == torch.float32, inverse, pointer(weight_E), eps,
        pointer(rstd), out_THE.data_ptr(), out_THE.stride(0),
    )  # fmt: skip
    return rstd


def rotate_heads_backward(
    dy_THE: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    x_THE: Tensor,
    weight_E: Tensor,
    rstd_TH: Tensor,
    out_THE: Tensor,
    sums: bool = False,
) -> Tensor | None:
    """The gradient of x through norm and rotation into `out`, which may be dy or x; returns dweight with `sums`."""
    tokens, heads, features, half = _heads(dy_THE, cos_TF, sin_TF, out_THE)
    _check(x_THE, (tokens, heads, features), dy_THE, "x", contiguous=False)
    if x_THE.stride(2) != 1 or (heads > 1 and x_THE.stride(1) != features):
        raise ValueError(f"the heads of a token lie side by side in x; its strides are {list(x_THE.stride())}")
    _check_float(weight_E, (features,), "weight")
    _check_float(rstd_TH, (tokens, heads), "rstd")
    dweight = torch.empty(features) if sums else None
    _library().hb_heads_backward(
        native.DTYPE[dy_THE.dtype], tokens, heads, features, half, dy_THE.data_ptr(), dy_THE.stride(0),
        dy_THE.stride(1), cos_TF.data_ptr(), sin_TF.data_ptr(), cos_TF.dtype == torch.float32, weight_E.data_ptr(),
        x_THE.data_ptr(), x_THE.stride(0), rstd_TH.data_ptr(), out_THE.data_ptr(), out_THE.stride(0), pointer(dweight),
    )  # fmt: skip
    return dweight


# -- columns ----------------------------------------------------------------------------------------------------------


def scale_columns(x_TS: Tensor, scale_S: Tensor, bias_S: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x * scale + bias, [T, S]; scale and bias float32 [S]. `out` may be x itself."""
    _check_served(x_TS)
    if x_TS.ndim != 2:
        raise ValueError(f"x is [T, S], not {list(x_TS.shape)}")
    rows, width = x_TS.shape
    _check(x_TS, (rows, width), x_TS, "x")
    for name, vector in (("scale", scale_S), ("bias", bias_S)):
        if vector is not None:
            _check_float(vector, (width,), name)
    out = pool.empty_like(x_TS) if out is None else out
    _check(out, (rows, width), x_TS, "out")
    _library().hb_columns(
        native.DTYPE[x_TS.dtype], rows, width, x_TS.data_ptr(), scale_S.data_ptr(), pointer(bias_S), out.data_ptr()
    )
    return out


def scale_columns_backward(dy_TS: Tensor, kept_TS: Tensor, scale_S: Tensor) -> tuple[Tensor, Tensor]:
    """(dy * scale [T, S], the sums over rows of dy * kept, float32 [S])."""
    _check_served(dy_TS)
    if dy_TS.ndim != 2:
        raise ValueError(f"dy is [T, S], not {list(dy_TS.shape)}")
    rows, width = dy_TS.shape
    _check(dy_TS, (rows, width), dy_TS, "dy")
    _check(kept_TS, (rows, width), dy_TS, "kept")
    _check_float(scale_S, (width,), "scale")
    dx, products = pool.empty_like(dy_TS), torch.empty(width, dtype=torch.float32)
    _library().hb_columns_backward(
        native.DTYPE[dy_TS.dtype], rows, width, dy_TS.data_ptr(), kept_TS.data_ptr(), scale_S.data_ptr(),
        dx.data_ptr(), products.data_ptr(),
    )  # fmt: skip
    return dx, products
