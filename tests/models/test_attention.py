"""Attention over documents laid end to end, against a dense float64 softmax for each."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from halfbyte.models.attention import KVCache, attend, attend_cached
from halfbyte.ops import native

H, K, E = 6, 2, 8
CASES = [(None, None), (5, None), (None, 2.0), (5, 2.0)]


def dense(q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """One document in float64, [L, H, E]."""
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    scores = torch.einsum("qhe,khe->hqk", q, k) * 0.3
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    rows, columns = torch.arange(len(q))[:, None], torch.arange(len(q))[None]
    seen = columns <= rows
    if window is not None:
        seen &= rows - columns < window
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khe->qhe", weights, v)


def qkv(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(tokens, H, E), torch.randn(tokens, K, E), torch.randn(tokens, K, E)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("window", "softcap"), CASES)
@pytest.mark.parametrize("lengths", [(17,), (6, 6, 6), (3, 14, 1, 5)])
def test_documents_are_attended_apart(lengths: tuple[int, ...], window: int | None, softcap: float | None) -> None:
    ours = [x.requires_grad_() for x in qkv(sum(lengths))]
    exact = [x.detach().double().requires_grad_() for x in ours]
    out = attend(*ours, lengths, 0.3, window, softcap)
    parts = zip(*(x.split(list(lengths)) for x in exact), strict=True)
    expected = torch.cat([dense(q, k, v, window, softcap) for q, k, v in parts])
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[None, "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """The native attention where there is one, and torch's."""
    native.use(request.param)
    yield
    native.use(None)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("window", "softcap"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_the_same_with_one_gradient(dtype: torch.dtype, window: int | None, softcap: float | None) -> None:
    lengths = (3, 14, 1, 5)
    packed = torch.cat(qkv(sum(lengths)), 1).to(dtype).requires_grad_()
    apart = [x.detach().requires_grad_() for x in packed.split((H, K, K), 1)]
    out = attend(*packed.split((H, K, K), 1), lengths, 0.3, window, softcap)
    expected = attend(*apart, lengths, 0.3, window, softcap)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(packed.grad, torch.cat([x.grad for x in apart], 1), rtol=0, atol=0)


@pytest.mark.parametrize(("window", "softcap"), CASES)
def test_a_cache_filled_in_pieces_gives_the_same(window: int | None, softcap: float | None) -> None:
    """Two sequences of unequal length: a prompt, a further piece, then token by token, with NaN in unwritten slots."""
    totals = (15, 11)
    whole = [qkv(n) for n in totals]
    cache = KVCache(1, 2, K, E, 16, torch.float32, "cpu")
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    outputs: list[list[Tensor]] = [[], []]
    for new in ([7, 4], [4, 3], [1, 1], [1, 1], [1, 1], [1, 1]):
        starts = list(cache.lengths)
        pieces = [[x[s : s + n] for x in seq] for seq, s, n in zip(whole, starts, new, strict=True)]
        q, k, v = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        cache.append(0, k, v, new)
        out = attend_cached(q, cache, 0, new, 0.3, window, softcap)
        cache.advance(new)
        for collected, part in zip(outputs, out.split(new), strict=True):
            collected.append(part)
    for (q, k, v), collected in zip(whole, outputs, strict=True):
        expected = dense(q.double(), k.double(), v.double(), window, softcap)
        torch.testing.assert_close(torch.cat(collected).double(), expected, rtol=1e-5, atol=1e-5)


def test_finished_sequences_leave_the_cache() -> None:
    cache = KVCache(1, 3, K, E, 4, torch.float32, "cpu")
    cache.append(0, torch.randn(6, K, E), torch.randn(6, K, E), [1, 2, 3])
    cache.advance([1, 2, 3])
    kept = cache.keys[0][2].clone()
    cache.keep([2])
    assert cache.lengths == [3]
    torch.testing.assert_close(cache.keys[0][0, :, :3], kept[:, :3])


def test_a_cache_cannot_be_truncated_to_more_than_it_holds() -> None:
    cache = KVCache(1, 1, K, E, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="truncate"):
        cache.truncate([2])
