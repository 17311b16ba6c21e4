"""Hand-written gradients of the elementwise pieces against float64 autograd."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.models.blocks import gated_unit, residual_add, residual_norm, rms_norm
from halfbyte.ops import native


@pytest.fixture(params=["native", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    native.use("reference" if request.param == "torch" else None)
    yield
    native.use(None)


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


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weight)


@pytest.mark.parametrize("has_h", [False, True])
@pytest.mark.parametrize("has_post", [False, True])
@pytest.mark.parametrize("reached", ["s", "y", "both"])
def test_residual_norm(has_h: bool, has_post: bool, reached: str) -> None:
    x, h = torch.randn(6, 20, requires_grad=True), torch.randn(6, 20, requires_grad=True)
    post, pre = torch.randn(20, requires_grad=True), torch.randn(20, requires_grad=True)
    ds, dy = (reached != "y") * torch.randn(6, 20), (reached != "s") * torch.randn(6, 20)
    s, y = residual_norm(x, h if has_h else None, post if has_h and has_post else None, pre, 1e-6, True)
    outs = [(s, ds)] * (reached != "y") + [(y, dy)] * (reached != "s")
    torch.autograd.backward([t for t, _ in outs], [g for _, g in outs])
    x64, h64, post64, pre64 = (t.detach().double().requires_grad_() for t in (x, h, post, pre))
    s64 = x64 + (_norm(h64, post64) if has_post else h64) if has_h else x64
    y64 = _norm(s64, pre64)
    torch.autograd.backward([s64, y64], [ds.double(), dy.double()])
    torch.testing.assert_close(s.double(), s64, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
    for ours, exact in ((x, x64), (h, h64), (post, post64), (pre, pre64)):
        grad = torch.zeros_like(ours) if ours.grad is None else ours.grad
        expected = torch.zeros_like(exact) if exact.grad is None else exact.grad
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("has_post", [False, True])
def test_residual_add(has_post: bool) -> None:
    x, h, post = (torch.randn(shape, requires_grad=True) for shape in ((6, 20), (6, 20), (20,)))
    grad = torch.randn(6, 20)
    s = residual_add(x, h, post if has_post else None, 1e-6, True)
    s.backward(grad)
    x64, h64, post64 = (t.detach().double().requires_grad_() for t in (x, h, post))
    exact = x64 + (_norm(h64, post64) if has_post else h64)
    exact.backward(grad.double())
    torch.testing.assert_close(s.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, grad)
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-4, atol=1e-5)
    if has_post:
        torch.testing.assert_close(post.grad.double(), post64.grad, rtol=1e-4, atol=1e-5)


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


def test_an_overwritten_gate_has_the_same_gradient_once() -> None:
    x, grad = torch.randn(9, 20, requires_grad=True), torch.randn(9, 10)
    gated_unit(x * 1, "silu").backward(grad)
    expected, x.grad = x.grad, None
    y = gated_unit(x * 1, "silu", overwrite=True)
    y.backward(grad, retain_graph=True)
    assert torch.equal(x.grad, expected)
    if native.library() is not None:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(grad)
