"""The elementwise pieces of a decoder layer, with hand-written gradients that save little.

Statistics in float32, one rounding at the end. On the CPU native kernels do each in one pass over memory
(`ops.elementwise`); elsewhere, and in float16, torch does.

Shape letters: T tokens, D features, I intermediate features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from halfbyte.ops import elementwise


def norm_scale(weight: Tensor, plus_one: bool) -> Tensor:
    """What a norm multiplies with, in float32; `plus_one`: Gemma stores w - 1."""
    return weight.float() + 1.0 if plus_one else weight.float()


def _has_native_rows(x: Tensor) -> bool:
    return x.ndim in (2, 3) and x.stride(-1) == 1 and elementwise.available(x)


class _RmsNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension. Saves x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        ctx.plus_one = plus_one
        scale = norm_scale(weight, plus_one)
        if _has_native_rows(x):
            y, rstd = elementwise.rms_norm(x, scale, eps)
            ctx.save_for_backward(x, weight, rstd)
            return y
        x32 = x.float()
        rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        scale, sums = norm_scale(weight, ctx.plus_one), ctx.needs_input_grad[1]
        if rstd.ndim < x.ndim:  # forward was native
            grad, dscale = elementwise.rms_norm_backward(grads[0].contiguous(), x, scale, rstd, sums=sums)
            return grad, None if dscale is None else dscale.to(weight.dtype), None, None
        dy = grads[0].float()
        normed = x.float() * rstd  # not in place: in float32, .float() is the saved tensor itself
        dweight = None
        if sums:
            dweight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            g = dy * scale
            mean = (g * normed).mean(-1, keepdim=True)
            dx = g.sub_(normed.mul_(mean)).mul_(rstd).to(x.dtype)
        return dx, dweight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """Root-mean-square normalisation (arXiv 1910.07467) over the last dimension; `plus_one`: Gemma stores w - 1."""
    result: Tensor = _RmsNorm.apply(x, weight, eps, plus_one)  # type: ignore[no-untyped-call]
    return result


class _ResidualNorm(torch.autograd.Function):
    """(x, h) -> (s, y) of `residual_norm`, natively: the residual stream's gradient is summed where its norm's is made.

    Saves s (which the next block holds anyway); where h has a norm of its own h, and x instead of s, which is one pass
    over both away; and one number a row and norm.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h: Tensor | None, post: Tensor | None, pre: Tensor | None, eps: float, plus_one: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.plus_one = eps, plus_one
        post_scale, pre_scale = (None if w is None else norm_scale(w, plus_one) for w in (post, pre))
        if h is None:
            assert pre_scale is not None
            y, rstd_s = elementwise.rms_norm(x, pre_scale, eps)
            ctx.save_for_backward(x, None, None, pre, None, rstd_s)
            return x, y
        s, y_or_none, rstd_h, rstd = elementwise.add_rms_norm(x, h.contiguous(), post_scale, pre_scale, eps)
        kept = None if pre is None else s if post is None else x
        ctx.save_for_backward(kept, h if post is not None else None, post, pre, rstd_h, rstd)
        return s, y_or_none

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        s, h, post, pre, rstd_h, rstd_s = ctx.saved_tensors
        ds, dy = (None if g is None else g.contiguous() for g in grads)
        if ds is None and dy is None:
            return (None,) * 6
        post_scale, pre_scale = (None if w is None else norm_scale(w, ctx.plus_one) for w in (post, pre))
        needs_post, needs_pre = ctx.needs_input_grad[2:4]
        dx, dh, dpre, dpost = ds, None, None, None
        if post_scale is not None:
            if s is not None:
                s = elementwise.add_rms_norm(s, h.contiguous(), post_scale, None, ctx.eps)[0]
            dx, dh, sums = elementwise.sandwich_backward(
                ds, dy, h if s is None else s, h, post_scale, pre_scale, rstd_h, rstd_s, needs_post or needs_pre
            )
            if sums is not None:
                dpre, dpost = sums[0], sums[1]
        elif dy is not None and pre_scale is not None:
            dx, dpre = elementwise.rms_norm_backward(dy, s, pre_scale, rstd_s, ds, needs_pre)
        if post is None and ctx.needs_input_grad[1]:
            dh = dx
        dpost = dpost.to(post.dtype) if needs_post and dpost is not None else None
        dpre = dpre.to(pre.dtype) if needs_pre and dpre is not None else None
        return dx, dh, dpost, dpre, None, None


def residual_norm(
    x_TD: Tensor, h_TD: Tensor | None, post_D: Tensor | None, pre_D: Tensor, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """The residual stream between two blocks: (s = x + h, y = norm(s)), the next block's input and what it is added to.

    h      output of the block before; None where there is none, then s is x
    post   Gemma 2's and 3's norm of h before it is added
    """
    if _has_native_rows(x_TD):
        result: tuple[Tensor, Tensor] = _ResidualNorm.apply(x_TD, h_TD, post_D, pre_D, eps, plus_one)  # type: ignore[no-untyped-call]
        return result
    s = x_TD if h_TD is None else residual_add(x_TD, h_TD, post_D, eps, plus_one)
    return s, rms_norm(s, pre_D, eps, plus_one)


def residual_add(x_TD: Tensor, h_TD: Tensor, post_D: Tensor | None, eps: float, plus_one: bool) -> Tensor:
    """x + h, or x + norm(h) where the block has a norm behind it."""
    if post_D is None:
        return x_TD + h_TD
    if _has_native_rows(x_TD):
        result: tuple[Tensor, None] = _ResidualNorm.apply(x_TD, h_TD, post_D, None, eps, plus_one)  # type: ignore[no-untyped-call]
        return result[0]
    return x_TD + rms_norm(h_TD, post_D, eps, plus_one)


def _activate(gate: Tensor, kind: str) -> Tensor:
    if kind == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")


def _activate_grad(dy: Tensor, gate: Tensor, kind: str) -> Tensor:
    aten = torch.ops.aten
    grad: Tensor
    if kind == "silu":
        grad = aten.silu_backward(dy, gate)
    else:
        grad = aten.gelu_backward(dy, gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return grad


class _GatedUnit(torch.autograd.Function):
    """h = act(gate) * up, from gate and up side by side. Saves its input only; the gradient is one tensor again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kind: str, overwrite: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kind, ctx.overwrite = kind, overwrite
        ctx.native = gate_up.ndim == 2 and _has_native_rows(gate_up)
        if ctx.native:
            return elementwise.gated_unit(gate_up, kind)
        gate, up = gate_up.chunk(2, -1)
        return _activate(gate, kind).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        dh = grads[0]
        if ctx.native:
            overwrite = ctx.overwrite and gate_up.is_contiguous()
            out = elementwise.gated_unit_backward(dh.contiguous(), gate_up, ctx.kind, gate_up if overwrite else None)
            if overwrite:
                increment_version(gate_up)  # a second backward is refused instead of wrong
            return out.detach(), None, None
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, -1)
        torch.mul(dh, _activate(gate, ctx.kind), out=dup)
        dgate.copy_(_activate_grad(dh * up, gate, ctx.kind))
        return out, None, None


def gated_unit(gate_up_T2I: Tensor, kind: str, overwrite: bool = False) -> Tensor:
    """SwiGLU or GeGLU (arXiv 2002.05202): act(gate) * up, [T, 2I] -> [T, I].

    overwrite  nobody else reads `gate_up`, so its gradient may take its memory: the largest activation of a layer
    """
    result: Tensor = _GatedUnit.apply(gate_up_T2I, kind, overwrite)  # type: ignore[no-untyped-call]
    return result
