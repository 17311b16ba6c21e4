"""95 % intervals for a mean over rows: how far another sample of rows of the same kind could have moved it.

They cover the choice of evaluation rows and nothing else: not the training seed, not the prompt's wording.

- 0/1 scores: Wilson's score interval (Wilson 1927, JASA 22:209). The bootstrap would call 50 right rows out of 50
  "[1, 1]", which is a claim that 50 rows cannot carry.
- everything else: the percentile bootstrap (Efron 1979, Ann. Statist. 7:1) over rows, 1,000 resamples, fixed seed.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]

RESAMPLES = 1000
_Z = 1.959963984540054  # the normal distribution's 97.5 % point
_CHUNK = 2_000_000  # resampled indices held at once: 16 MB


def mean_interval(scores: Sequence[float], seed: int = 0) -> Interval:
    """Interval of the mean of one score a row: Wilson's where all scores are 0 or 1, else the bootstrap."""
    if not scores:
        raise ValueError("an interval needs at least one row")
    if all(score in (0, 1) for score in scores):
        return wilson_interval(round(sum(scores)), len(scores))
    return ratio_interval(scores, [1.0] * len(scores), seed)


def wilson_interval(successes: int, rows: int) -> Interval:
    """Wilson's interval for `successes` out of `rows` > 0."""
    share, z2 = successes / rows, _Z * _Z
    center = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = _Z / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows * rows))
    # At the ends the formula is exactly 0 or 1, and rounding would leave crumbs of it.
    return (center - half if successes else 0.0, center + half if successes < rows else 1.0)


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """Bootstrap interval of sum(numerators) / sum(denominators), rows resampled as pairs.

    This is the loss: negative log-likelihood over supervised tokens, where a row is the unit that is drawn.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    rng = np.random.default_rng(seed)
    values: list[NDArray[np.float64]] = []
    left, step = RESAMPLES, max(1, _CHUNK // max(1, len(top)))
    while left > 0:
        drawn = rng.integers(0, len(top), (min(step, left), len(top)))
        values.append(top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1))
        left -= step
    return _percentiles(np.concatenate(values))


def corpus_interval(score: Callable[[list[int]], float], rows: int, seed: int = 0, resamples: int = 200) -> Interval:
    """Bootstrap interval of a score that only exists for a whole set of rows; `score` gets the drawn row indices.

    Fewer resamples than elsewhere, because each is a call of the user's function.
    """
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, rows, rows).tolist() for _ in range(resamples))
    return _percentiles(np.asarray([score(indices) for indices in drawn], dtype=np.float64))


def paired_interval(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Interval:
    """Bootstrap interval of mean(after) - mean(before) over the same rows: far tighter than two separate intervals."""
    if len(before) != len(after):
        raise ValueError(f"paired rows differ in number: {len(before)} and {len(after)}")
    difference = [b - a for a, b in zip(before, after, strict=True)]
    return ratio_interval(difference, [1.0] * len(difference), seed)


def _percentiles(values: NDArray[np.float64]) -> Interval:
    low, high = np.percentile(values, (2.5, 97.5))
    return (float(low), float(high))
