"""The sampler: a function of its arguments, fair in every epoch and across epochs."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data import Sampler


@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 50))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    order = Sampler(n, seed).order(epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert order.tolist() == Sampler(n, seed).order(epoch).tolist()


def test_the_order_is_pinned() -> None:
    """It must never change: a resumed run relies on it, whatever numpy's version."""
    assert Sampler(10, 42).order(0).tolist() == PINNED
    assert Sampler(7, 1, sizes=[4, 3], weights=[1, 3]).order(2).tolist() == PINNED_MIXTURE


PINNED = [0, 2, 7, 1, 4, 5, 8, 3, 9, 6]
PINNED_MIXTURE = [4, 4, 5, 0, 3, 6, 6]


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(Sampler(100, seed).order(epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_callers_may_change_what_they_get() -> None:
    sampler = Sampler(10, 0)
    sampler.order(0)[:] = 0
    assert sorted(sampler.order(0).tolist()) == list(range(10))


@given(st.integers(1, 20), st.integers(0, 100), st.integers(0, 60))
def test_rows_for_is_a_window_of_the_endless_order(n: int, position: int, count: int) -> None:
    sampler = Sampler(n, 3)
    epochs = (position + count) // n + 1
    stream = [row for epoch in range(epochs) for row in sampler.order(epoch).tolist()]
    assert sampler.rows_for(position, count) == stream[position : position + count]


sources = st.lists(st.tuples(st.integers(1, 30), st.floats(0.01, 100)), min_size=1, max_size=4)


@given(sources, st.integers(0, 1000))
def test_a_mixture_keeps_its_shares_and_is_fair(found: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = [size for size, _ in found], [weight for _, weight in found]
    n = sum(sizes)
    sampler = Sampler(n, seed, sizes, weights)
    borders = np.cumsum([0, *sizes])
    seen: Counter[int] = Counter()
    for epoch in range(3):
        order = sampler.order(epoch)
        assert len(order) == n
        seen.update(order.tolist())
        counts = np.histogram(order, borders)[0]
        exact = n * np.array(weights) / sum(weights)
        assert (abs(counts - exact) < 1 + 1e-9).all()
    for first, last in pairwise(borders):
        times = [seen[row] for row in range(first, last)]
        assert max(times) - min(times) <= 1


def test_without_weights_sources_are_one_pool() -> None:
    assert Sampler(5, 9, sizes=[2, 3]).order(1).tolist() == Sampler(5, 9).order(1).tolist()


def test_the_order_looks_random() -> None:
    """Each row is as likely in each place: chi-squared over 2,000 epochs of 8 rows stays below its 99.9 % point."""
    table = np.zeros((8, 8))
    for epoch in range(2000):
        table[np.arange(8), Sampler(8, 5).order(epoch)] += 1
    assert ((table - 250) ** 2 / 250).sum() < 85.4


@pytest.mark.parametrize(
    ("n", "sizes", "weights"),
    [(0, None, None), (3, [1, 1], None), (2, [1, 1], [1]), (2, [1, 1], [1, 0]), (2, [2, 0], [1, 1])],
)
def test_nonsense_is_refused(n: int, sizes: list[int] | None, weights: list[float] | None) -> None:
    with pytest.raises(ValueError):
        Sampler(n, 0, sizes, weights)
