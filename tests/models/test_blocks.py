"""Hand-written gradients of the elementwise pieces against float64 autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.models.blocks import gated_unit, rms_norm


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (5, 3, 8)])
def test_rms_norm(plus_one: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)
    y = rms_norm(x, weight, 1e-6, plus_one)
    grad = torch.randn(shape)
    y.backward(grad)

    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weight))
    scale = w64 + 1 if plus_one else w64
    expected = x64 / (x64.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), w64.grad, rtol=1e-4, atol=1e-5)


def test_rms_norm_of_bf16_rounds_once() -> None:
    x = torch.randn(64, 32).bfloat16()
    weight = torch.randn(32).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    y = rms_norm(x, weight, 1e-6, False)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()


def _act(x: Tensor, kind: str) -> Tensor:
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh", "gelu"])
def test_gated_unit(kind: str) -> None:
    x = torch.randn(9, 20, requires_grad=True)
    y = gated_unit(x, kind)
    grad = torch.randn(9, 10)
    y.backward(grad)
    x64 = x.detach().double().requires_grad_()
    expected = _act(x64[:, :10], kind) * x64[:, 10:]
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
