"""The chunked vocabulary loss against float64 cross-entropy over whole logits."""

import pytest
import torch
import torch.nn.functional as F

from halfbyte.linear import cross_entropy, linear_cross_entropy, linear_logits
from halfbyte.quant import DenseWeight

N, D, V = 150, 32, 500


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and several panels at test sizes."""
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 40 * V * 4)
    monkeypatch.setattr(cross_entropy, "PANEL_BYTES", 128 * D * 4)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable", [False, True])
def test_loss_and_gradients_equal_float64(softcap: float | None, head_dtype: torch.dtype, trainable: bool) -> None:
    torch.manual_seed(1)
    head = DenseWeight(torch.randn(V, D).to(head_dtype), trainable=trainable)
    hidden = torch.randn(N, D, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    loss = linear_cross_entropy(hidden, head, targets, softcap).sum() * 0.25
    loss.backward()

    hidden64 = hidden.detach().double().requires_grad_()
    weight64 = head.dequantize(torch.float32).detach().double().requires_grad_()
    logits = hidden64 @ weight64.t()
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    expected = F.cross_entropy(logits, targets, reduction="sum") * 0.25
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-4, atol=1e-5)
    weight = head.trainable_tensor()
    if weight is not None:
        bound = 1e-5 if head_dtype == torch.float32 else 2e-2
        torch.testing.assert_close(weight.grad.double(), weight64.grad, rtol=bound, atol=bound)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_equal_float64(softcap: float | None) -> None:
    head = DenseWeight(torch.randn(V, D).bfloat16())
    hidden = torch.randn(7, D)
    expected = hidden.double() @ head.dequantize(torch.float32).double().t()
    if softcap is not None:
        expected = softcap * (expected / softcap).tanh()
    torch.testing.assert_close(linear_logits(hidden, head, softcap).double(), expected, rtol=1e-5, atol=1e-4)


def test_nothing_supervised_is_zero_with_a_zero_gradient() -> None:
    head = DenseWeight(torch.randn(V, D))
    hidden = torch.randn(0, D, requires_grad=True)
    loss = linear_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.int64)).sum()
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == (0, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unequal_row_weights(dtype: torch.dtype) -> None:
    """As preference losses have them: each row's gradient is the one it has in a sum, times its own weight."""
    hidden = torch.randn(5, D).to(dtype).requires_grad_()
    head, targets = DenseWeight(torch.randn(V, D).to(dtype)), torch.tensor([1, 2, 3, 0, 4])
    weights = torch.tensor([1.0, -2.0, 3.0, 0.0, 0.3])
    (of_sum,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets).sum(), hidden)
    (weighted,) = torch.autograd.grad((linear_cross_entropy(hidden, head, targets) * weights).sum(), hidden)
    assert torch.equal(weighted, (of_sum.float() * weights[:, None]).to(dtype))
    if dtype == torch.float32:
        nll = torch.nn.functional.cross_entropy(hidden @ head.dequantize(dtype).T, targets, reduction="none")
        (expected,) = torch.autograd.grad((nll * weights).sum(), hidden)
        torch.testing.assert_close(weighted, expected, rtol=1e-4, atol=1e-5)


def test_a_common_factor_is_not_rounded() -> None:
    """1/3 in bfloat16 is 0.2 % too much, for every row of every batch: the gradient would be biased, not noisy."""
    hidden = torch.randn(64, D).bfloat16().requires_grad_()
    head, targets = DenseWeight(torch.randn(V, D).bfloat16()), torch.arange(64) % V
    (whole,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets).sum(), hidden)
    (third,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets).sum() / 3, hidden)
    assert torch.equal(third, (whole.double() / 3).to(torch.bfloat16))


def test_unequal_row_weights_of_a_trained_head_are_refused_rather_than_wrong() -> None:
    head = DenseWeight(torch.randn(V, D), trainable=True)
    nll = linear_cross_entropy(torch.randn(3, D, requires_grad=True), head, torch.tensor([1, 2, 3]))
    with pytest.raises(RuntimeError, match="sum or a mean"):
        (nll * torch.tensor([1.0, 2.0, 3.0])).sum().backward()


def test_chunks_never_hold_the_logits_of_all_rows() -> None:
    assert cross_entropy.chunk_rows(V) == 40
    assert cross_entropy.chunk_rows(10**9) == 32
