"""Intervals against published values and against coverage by simulation."""

import numpy as np
import pytest

from halfbyte.evaluate.intervals import (
    corpus_interval,
    mean_interval,
    paired_interval,
    ratio_interval,
    wilson_interval,
)


def test_wilson_by_its_published_values() -> None:
    # Newcombe 1998 (Stat. Med. 17:857), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, rows, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson_interval(successes, rows) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_a_perfect_score_on_few_rows_is_not_certain() -> None:
    low, high = mean_interval([1.0] * 50)
    assert 0.9 < low < 0.95
    assert high == 1.0
    assert mean_interval([0.0] * 64)[0] == 0.0


def test_bootstrap_of_a_mean_is_the_normal_interval_on_many_rows() -> None:
    scores = np.random.default_rng(3).uniform(size=2000)
    low, high = mean_interval(scores.tolist())
    half = 1.96 * scores.std() / np.sqrt(2000)
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.15 * half)


def test_ratio_interval_covers_the_true_loss() -> None:
    rng, hits = np.random.default_rng(0), 0
    for trial in range(100):
        tokens = rng.integers(1, 60, 80)
        nll = rng.gamma(2.0, 1.0, 80) * tokens  # two nats a token, whatever the row's length
        low, high = ratio_interval(nll.tolist(), tokens.tolist(), seed=trial)
        hits += low <= 2.0 <= high
    assert 88 <= hits <= 100


def test_paired_interval_sees_a_small_steady_gain() -> None:
    before = np.random.default_rng(1).uniform(0, 0.9, 200)
    low, high = paired_interval(before.tolist(), (before + 0.05).tolist())
    assert (low, high) == pytest.approx((0.05, 0.05))
    with pytest.raises(ValueError, match="differ in number"):
        paired_interval([1.0], [1.0, 2.0])


def test_corpus_interval_resamples_rows() -> None:
    values = np.random.default_rng(2).uniform(size=300)
    low, high = corpus_interval(lambda rows: float(values[rows].mean()), 300)
    assert low < values.mean() < high
    assert high - low < 0.1


def test_intervals_are_reproducible_and_need_rows() -> None:
    assert mean_interval([0.1, 0.5, 0.9], seed=4) == mean_interval([0.1, 0.5, 0.9], seed=4)
    with pytest.raises(ValueError, match="at least one row"):
        mean_interval([])
