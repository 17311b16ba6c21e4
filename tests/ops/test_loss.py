"""The native projection with cross-entropy against float64."""

import pytest
import torch
import torch.nn.functional as F

from halfbyte.ops import loss, native
from halfbyte.quant import DenseWeight, QuantOptions, quantize
from tests.ops.test_linear import CASES
from tests.quant.gguf_blocks import random_weight

pytestmark = [
    pytest.mark.skipif(not CASES, reason="no instruction set of this machine multiplies natively"),
    pytest.mark.usefixtures("keep_choice"),
]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 5e-5}  # of the worst row's gradient


def check(rows, width, vocab, dtype, cap=None, sharpness=1.0, quantized=False, gguf=None):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, width).to(dtype)
    values = torch.randn(vocab, width) / width**0.5 * sharpness
    head = quantize(values.bfloat16(), QuantOptions()) if quantized else DenseWeight(values.to(dtype))
    if gguf is not None:
        head = random_weight(gguf, vocab, width)
        values = head.dequantize(torch.float32)
    targets = torch.randint(0, vocab, (rows,))
    easy = rows // 2  # half of the rows know their answer: probabilities near one must not lose their last digits
    targets[:easy] = (hidden[:easy].float() @ values.t()).argmax(1)
    exact_hidden = hidden.double().requires_grad_()
    logits = exact_hidden @ head.dequantize(dtype).double().t()
    if cap:
        logits = (logits / cap).tanh() * cap
    wanted = F.cross_entropy(logits, targets, reduction="none")
    wanted.sum().backward()
    nll, grad = loss.linear_cross_entropy(hidden, head.native_view(), targets, cap, needs_grad=True)
    torch.testing.assert_close(nll.double(), wanted.detach(), rtol=2e-6, atol=5e-6)
    errors = (grad.double() - exact_hidden.grad).norm(dim=1) / exact_hidden.grad.norm(dim=1)
    assert errors.max() < TOLERANCE[dtype], errors.max()
    alone, none = loss.linear_cross_entropy(hidden, head.native_view(), targets, cap, needs_grad=False)
    assert none is None
    assert torch.equal(alone, nll)
    return nll, grad


@pytest.mark.parametrize(("isa", "dtype"), CASES)
@pytest.mark.parametrize(
    ("rows", "width", "vocab"), [(1, 32, 6), (70, 64, 1000), (130, 96, 5002), (65, 320, 258), (200, 640, 770)]
)
def test_against_float64(isa, dtype, rows, width, vocab):
    native.use(isa)
    check(rows, width, vocab, dtype)


@pytest.mark.parametrize(("isa", "dtype"), CASES)
def test_confident_rows_and_soft_caps(isa, dtype):
    native.use(isa)
    check(100, 256, 3000, dtype, sharpness=2.5)
    check(100, 256, 3000, dtype, cap=30.0, sharpness=2.0)
    check(40, 64, 600, dtype, quantized=True)


@pytest.mark.parametrize(("isa", "dtype"), CASES)
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q4_K"])
def test_heads_in_blocks_of_gguf(isa, dtype, kind):
    native.use(isa)
    check(70, 256, 1000, dtype, gguf=kind)


@pytest.mark.parametrize(("isa", "dtype"), CASES)
def test_threads_change_no_bit(isa, dtype):
    native.use(isa)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(check(150, 128, 3000, dtype))
    finally:
        torch.set_num_threads(before)
    for nll, grad in results[1:]:
        assert torch.equal(nll, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize(("isa", "dtype"), CASES)
def test_the_vocabulary_in_stretches(isa, dtype, monkeypatch):
    """Twelve panels of words in stretches of one, three and five: the sums are rescaled where a larger logit comes."""
    native.use(isa)
    for panels in (1, 3, 5):
        monkeypatch.setattr(loss, "WORKSPACE_BYTES", panels * 256 * 192 * dtype.itemsize)
        check(150, 128, 3000, dtype, sharpness=2.0)
        check(150, 128, 3000, dtype, cap=20.0, sharpness=2.0)


def test_more_rows_than_are_taken_at_once():
    isa, dtype = CASES[0]
    native.use(isa)
    check(2100, 32, 300, dtype)


def test_what_is_refused():
    isa, dtype = CASES[0]
    native.use(isa)
    head = DenseWeight(torch.zeros(10, 8, dtype=dtype))
    view, hidden = head.native_view(), torch.zeros(2, 8, dtype=dtype)
    with pytest.raises(IndexError, match=r"targets must lie in \[0, 10\)"):
        loss.linear_cross_entropy(hidden, view, torch.tensor([0, 10]), None, True)
    with pytest.raises(ValueError, match="int64"):
        loss.linear_cross_entropy(hidden, view, torch.tensor([0, 1], dtype=torch.int32), None, True)
    with pytest.raises(ValueError, match="do not fit a head of 8"):
        loss.linear_cross_entropy(hidden[:, :6], view, torch.tensor([0, 1]), None, True)
    nll, grad = loss.linear_cross_entropy(hidden[:0], view, torch.zeros(0, dtype=torch.int64), None, True)
    assert nll.shape == (0,)
    assert grad.shape == (0, 8)
