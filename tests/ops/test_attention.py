"""The native attention, forward and backward, against a dense float64 softmax, for every instruction set there is."""

import pytest
import torch
from torch import Tensor

from halfbyte.ops import attention, native
from tests.ops.conftest import available

ISAS = [name for name in available() if name != "reference"]
DTYPES = [torch.bfloat16, torch.float32]
# Of the output, of gradients, of any one row; bfloat16 rounds weights and results to 9 bits: 2^-9 is 0.002. Torch's
# own attention has the same errors.
BOUNDS = {torch.bfloat16: (4e-3, 8e-3, 8e-2), torch.float32: (1e-6, 2e-6, 2e-5)}
# heads, kv heads, features, window, softcap, lengths: tiles that are cut, whole and skipped, documents of any length
CASES = [
    (2, 1, 64, None, None, (1, 2, 65, 200)),
    (4, 2, 80, 33, None, (130, 1, 300)),
    (3, 3, 96, None, 3.0, (64, 129)),
    (6, 2, 8, 5, 2.0, (3, 14, 1, 5, 17)),
    (4, 1, 256, 128, None, (400,)),
    (2, 1, 130, 1, None, (20, 64)),
    (1, 1, 2, 300, None, (700,)),
    (8, 4, 18, None, None, (12, 49, 0, 31, 16, 47)),
]


@pytest.fixture(params=ISAS)
def isa(request, keep_choice):
    native.use(request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """One document, [L, H, E], in the inputs' type."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    rows, columns = torch.arange(len(q))[:, None], torch.arange(len(q))[None]
    seen = columns <= rows
    if window is not None:
        seen &= rows - columns < window
    return torch.einsum("hqk,khe->qhe", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def exact(qkv: list[Tensor], grad: Tensor, lengths: tuple[int, ...], *options) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients in float64."""
    inputs = [x.double().requires_grad_() for x in qkv]
    parts = zip(*(x.split(list(lengths)) for x in inputs), strict=True)
    out = torch.cat([dense(*part, *options) for part in parts])
    out.backward(grad.double())
    return out.detach(), [x.grad for x in inputs]


def inputs(tokens: int, heads: int, kv_heads: int, features: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k and v as slices of one tensor with room between its tokens, and a gradient that is strided too."""
    fused = torch.randn(tokens, heads + 2 * kv_heads + 1, features + 2)[..., :features].to(dtype)
    q, k, v, _ = fused.split((heads, kv_heads, kv_heads, 1), 1)
    return [q, k, v], torch.randn(heads, tokens, features, dtype=dtype).transpose(0, 1)


def size(exact: Tensor) -> float:
    """Root mean square of a row. The scores of a single key have no gradient: two equal numbers of this size cancel."""
    return float(exact.norm(dim=-1).square().mean().sqrt()) if exact.any() else exact.shape[-1] ** 0.5


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm(dim=-1).square().mean().sqrt()) / size(exact)


def worst_row(ours: Tensor, exact: Tensor) -> float:
    """The largest error of one token's head against the size of a usual one: one wrong row must not hide."""
    return float((ours.double() - exact).norm(dim=-1).max()) / size(exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_float64(isa, case, dtype):
    heads, kv_heads, features, window, softcap, lengths = case
    qkv, grad = inputs(sum(lengths), heads, kv_heads, features, dtype)
    if not attention.available(qkv[0]):
        pytest.skip(f"{isa} has no attention in {dtype}")
    options = (features**-0.5, window, softcap)
    out, lse = attention.attention(*qkv, lengths, *options)
    grads = attention.attention_backward(grad, *qkv, out, lse, lengths, *options)
    expected, exact_grads = exact(qkv, grad, lengths, *options)
    bound, gradient_bound, row_bound = BOUNDS[dtype]
    assert error(out, expected) < bound
    assert worst_row(out, expected) < row_bound
    for ours, theirs in zip(grads, exact_grads, strict=True):
        assert error(ours, theirs) < gradient_bound
        assert worst_row(ours, theirs) < row_bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_shapes(isa, dtype):
    for seed in range(25):
        torch.manual_seed(seed)
        kv_heads, group, documents = (int(torch.randint(1, 4, ())) for _ in range(3))
        features = 2 * int(torch.randint(1, 70, ()))
        lengths = tuple(torch.randint(1, 280, (documents,)).tolist())
        window = None if seed % 2 else int(torch.randint(1, 200, ()))
        softcap = 1.5 if seed % 5 == 0 else None
        qkv, grad = inputs(sum(lengths), kv_heads * group, kv_heads, features, dtype)
        if not attention.available(qkv[0]):
            pytest.skip(f"{isa} has no attention in {dtype}")
        options = (features**-0.5, window, softcap)
        out, lse = attention.attention(*qkv, lengths, *options)
        grads = attention.attention_backward(grad, *qkv, out, lse, lengths, *options)
        expected, exact_grads = exact(qkv, grad, lengths, *options)
        bound, gradient_bound, _ = BOUNDS[dtype]
        assert error(out, expected) < bound
        assert all(error(a, b) < gradient_bound for a, b in zip(grads, exact_grads, strict=True)), (seed, lengths)


@pytest.mark.parametrize("heads", [(8, 2), (12, 12), (4, 1)])
def test_the_result_does_not_depend_on_the_number_of_threads(isa, heads, threads):
    """Both ways to share out the backward pass: few tasks (heads of a group apart) and many."""
    for lengths in [(300, 70, 500), tuple(range(1, 120, 2))]:
        qkv, grad = inputs(sum(lengths), *heads, 32, torch.bfloat16 if isa == "avx512bf16" else torch.float32)
        if not attention.available(qkv[0]):
            pytest.skip(f"{isa} has no attention")
        results = []
        for count in (1, 2, 3, 5, 8):
            torch.set_num_threads(count)
            out, lse = attention.attention(*qkv, lengths, 0.2, 100)
            results.append((out, lse, *attention.attention_backward(grad, *qkv, out, lse, lengths, 0.2, 100)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_documents_and_later_tokens_change_nothing(isa):
    """Not a bit, NaN included: they are not multiplied by zero, they are not read."""
    qkv, _ = inputs(230, 4, 2, 16, torch.float32)
    if not attention.available(qkv[0]):
        pytest.skip(f"{isa} has no attention")
    out, _ = attention.attention(*qkv, (100, 130), 0.3)
    alone, _ = attention.attention(*(x[100:] for x in qkv), (130,), 0.3)
    assert torch.equal(out[100:], alone)
    for x in qkv:
        x[:100] = float("nan")
    poisoned, _ = attention.attention(*qkv, (100, 130), 0.3)
    assert torch.equal(poisoned[100:], alone)
    assert poisoned[:100].isnan().all()


def test_large_scores_do_not_overflow(isa):
    qkv, grad = inputs(150, 2, 1, 32, torch.float32)
    if not attention.available(qkv[0]):
        pytest.skip(f"{isa} has no attention")
    qkv = [qkv[0] * 10, qkv[1] * 10, qkv[2]]
    out, lse = attention.attention(*qkv, (150,), 1.0)
    grads = attention.attention_backward(grad, *qkv, out, lse, (150,), 1.0)
    expected, exact_grads = exact(qkv, grad, (150,), 1.0, None, None)
    # Scores of several hundred in float32 are known to 10^-4, and so are the weights where two keys compete.
    assert error(out, expected) < 1e-4
    assert all(error(a, b) < 1e-3 for a, b in zip(grads, exact_grads, strict=True))


def test_gradients_can_be_written_into_one_tensor(isa):
    qkv, grad = inputs(90, 4, 2, 24, torch.float32)
    if not attention.available(qkv[0]):
        pytest.skip(f"{isa} has no attention")
    out, lse = attention.attention(*qkv, (40, 50), 0.3)
    apart = attention.attention_backward(grad, *qkv, out, lse, (40, 50), 0.3)
    fused = torch.full((90, 8, 24), float("nan"))
    into = fused.split((4, 2, 2), 1)
    attention.attention_backward(grad, *qkv, out, lse, (40, 50), 0.3, into=into)
    assert torch.equal(fused, torch.cat(apart, 1))


def test_no_tokens():
    qkv, grad = inputs(0, 2, 1, 8, torch.float32)
    if not attention.available(qkv[0]):
        pytest.skip("no native attention here")
    out, lse = attention.attention(*qkv, (), 0.3)
    assert out.shape == (0, 2, 8)
    assert attention.attention_backward(grad, *qkv, out, lse, (), 0.3)[1].shape == (0, 1, 8)


def test_arguments_that_do_not_fit_are_refused():
    q, k = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
    if not attention.available(q):
        pytest.skip("no native attention here")
    run = attention.attention
    with pytest.raises(ValueError, match="tokens"):
        run(q, k, k, (5,), 0.3)
    with pytest.raises(ValueError, match="tokens"):
        run(q, k, k, (7, -1), 0.3)
    with pytest.raises(ValueError, match="fit together"):
        run(q, k, k[:, :, :6], (6,), 0.3)
    with pytest.raises(ValueError, match="share"):
        run(q[:, :3], k, k, (6,), 0.3)
    with pytest.raises(ValueError, match="dtype"):
        run(q, k, k.bfloat16(), (6,), 0.3)
    with pytest.raises(ValueError, match="window"):
        run(q, k, k, (6,), 0.3, 0)
    with pytest.raises(ValueError, match="positive"):
        run(q, k, k, (6,), -0.3)
    with pytest.raises(ValueError, match="no native attention"):
        run(q.half(), k.half(), k.half(), (6,), 0.3)
    out, lse = run(q, k, k, (6,), 0.3)
    with pytest.raises(ValueError, match="gradient"):
        attention.attention_backward(q[:5], q, k, k, out, lse, (6,), 0.3)
    with pytest.raises(ValueError, match="gradient"):
        attention.attention_backward(q, q, k, k, out, lse, (6,), 0.3, into=(q, k, k[:, :, :6]))


def test_the_reference_has_none(keep_choice):
    native.use("reference")
    assert not attention.available(torch.randn(6, 4, 8))
