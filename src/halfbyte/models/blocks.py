"""The elementwise pieces of a decoder layer, with hand-written gradients that save little.

Statistics in float32, one rounding at the end. Shape letters: T tokens, D features, I intermediate features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _RmsNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension. Saves x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        x32 = x.float()
        rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        scale = weight.float() + 1.0 if plus_one else weight.float()
        ctx.save_for_backward(x, weight, rstd)
        ctx.plus_one = plus_one
        return (x32 * rstd).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        dy = grads[0].float()
        normed = x.float() * rstd  # not in place: in float32, .float() is the saved tensor itself
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * normed).flatten(0, -2).sum(0).to(weight.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            g = dy * (weight.float() + 1.0 if ctx.plus_one else weight.float())
            mean = (g * normed).mean(-1, keepdim=True)
            dx = g.sub_(normed.mul_(mean)).mul_(rstd).to(x.dtype)
        return dx, dweight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """Root-mean-square normalisation (arXiv 1910.07467) over the last dimension; `plus_one`: Gemma stores w - 1."""
    result: Tensor = _RmsNorm.apply(x, weight, eps, plus_one)  # type: ignore[no-untyped-call]
    return result


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
    def forward(ctx: Any, gate_up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kind = kind
        gate, up = gate_up.chunk(2, -1)
        return _activate(gate, kind).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        dh = grads[0]
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        dgate, dup = out.chunk(2, -1)
        torch.mul(dh, _activate(gate, ctx.kind), out=dup)
        dgate.copy_(_activate_grad(dh * up, gate, ctx.kind))
        return out, None


def gated_unit(gate_up_T2I: Tensor, kind: str) -> Tensor:
    """SwiGLU or GeGLU (arXiv 2002.05202): act(gate) * up, [T, 2I] -> [T, I]."""
    result: Tensor = _GatedUnit.apply(gate_up_T2I, kind)  # type: ignore[no-untyped-call]
    return result
