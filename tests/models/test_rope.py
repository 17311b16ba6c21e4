"""Queries, keys and values of a fused buffer, and their gradient, against float64 autograd."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from halfbyte.models import rope
from halfbyte.ops import native

TOKENS, HEADS, KV, FEATURES = 11, 5, 2, 24
SIZES, WIDTH = (HEADS, KV), (HEADS + 2 * KV) * FEATURES


@pytest.fixture(params=["native", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use("reference" if request.param == "torch" else None)
    yield request.param
    native.use(None)


def make(half: int = FEATURES // 2) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(a leaf [T, S], tables, norm weights)"""
    angles = torch.rand(TOKENS, half) * 7
    norms = torch.randn(FEATURES, requires_grad=True), torch.randn(FEATURES, requires_grad=True)
    return torch.randn(TOKENS, WIDTH, requires_grad=True), (angles.cos(), angles.sin()), norms


def reference(
    qkv: Tensor, tables: tuple[Tensor, Tensor], norms: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = (t.double()[:, None] for t in tables)
    half = cos.shape[-1]

    def ready(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 + weight)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)

    q, k, v = qkv.unflatten(1, (HEADS + 2 * KV, FEATURES)).split((HEADS, KV, KV), 1)
    return ready(q, norms and norms[0]), ready(k, norms and norms[1]), v


def fused_grads() -> tuple[list[Tensor], Tensor]:
    """(gradients of q, k and v inside one buffer, the buffer)"""
    buffer = torch.randn(TOKENS, HEADS + 2 * KV, FEATURES)
    return list(buffer.split((HEADS, KV, KV), 1)), buffer


@pytest.mark.parametrize("half", [FEATURES // 2, 7])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("grads_in", ["one buffer", "three", "head first"])
def test_heads_and_their_gradient(half: int, normed: bool, overwrite: bool, grads_in: str) -> None:
    leaf, tables, norms = make(half)
    grads, _ = fused_grads()
    exact64 = [t.detach().double().requires_grad_() for t in (leaf, *norms)]
    exact = reference(exact64[0], tables, (exact64[1], exact64[2]) if normed else None)
    torch.autograd.backward(exact, [g.double() for g in grads])
    if grads_in != "one buffer":
        grads = [g.clone() for g in grads]
    if grads_in == "head first":
        grads = [g.transpose(0, 1).contiguous().transpose(0, 1) for g in grads]

    before = leaf.detach().clone()
    out = rope.heads(leaf * 1, SIZES, tables, norms if normed else None, 1e-6, True, overwrite)
    for ours, theirs in zip(out, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    torch.autograd.backward(out, grads)
    assert torch.equal(leaf.detach(), before)
    torch.testing.assert_close(leaf.grad.double(), exact64[0].grad, rtol=1e-4, atol=2e-5)
    for ours, theirs in zip(norms, exact64[1:], strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("normed", [False, True])
def test_nothing_is_overwritten_unasked(normed: bool) -> None:
    leaf, tables, norms = make()
    grads, buffer = fused_grads()
    before, grads_before = leaf.detach().clone(), buffer.clone()
    out = rope.heads(leaf, SIZES, tables, norms if normed else None, 1e-6)
    kept = [t.detach().clone() for t in out]
    for _ in range(2):
        leaf.grad = None
        torch.autograd.backward(out, grads, retain_graph=True)
    assert torch.equal(leaf.detach(), before)
    assert torch.equal(buffer, grads_before)
    assert all(torch.equal(a, b) for a, b in zip(out, kept, strict=True))


@pytest.mark.parametrize("normed", [False, True])
def test_overwriting_needs_no_memory_without_a_graph(normed: bool, backend: str) -> None:
    leaf, tables, norms = make()
    with torch.no_grad():
        qkv = leaf * 1
        expected = rope.heads(qkv, SIZES, tables, norms if normed else None, 1e-6)
        found = rope.heads(qkv, SIZES, tables, norms if normed else None, 1e-6, overwrite=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if backend == "native" and native.library() is not None:
        assert {t.untyped_storage().data_ptr() for t in found} == {qkv.untyped_storage().data_ptr()}


def test_a_second_backward_over_the_same_memory_is_refused(backend: str) -> None:
    if backend == "torch" or native.library() is None:
        pytest.skip("torch's way keeps its inputs")
    leaf, tables, norms = make()
    grads, _ = fused_grads()
    grads = [g.clone() for g in grads]
    out = rope.heads(leaf * 1, SIZES, tables, norms, 1e-6, overwrite=True)
    torch.autograd.backward(out, grads, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"modified .*inplace"):
        torch.autograd.backward(out, grads)
