"""What a few seeds and some held-out rows allow one to say: means, paired differences, what could have been found.

    mean_interval(values)            mean over seeds and its 95 % interval (Student's t); none for a single seed
    mean_ratio(values)               the same of ratios, by their logarithms
    paired_difference(a, b)          the same of differences by seed, where a figure has no rows (memory, seconds)
    row_difference(a, b)             of a figure that is a mean over held-out rows (loss, accuracy), by seed and by row
    pareto(points)                   which points no other one beats in everything

Two things vary between two such comparisons: the seeds (initial values, order of rows, dropout) and the held-out rows.
`row_difference` counts both, as a hierarchical bootstrap over seeds and rows does. Rows are many and are resampled
(Efron 1979), the same for all seeds, as in the pigeonhole bootstrap (Owen 2007, Ann. Appl. Stat. 1:386). Seeds are few:
three of them have ten different resamples, whose percentiles cover far less than they say, so their part is drawn from
Student's t with n - 1 degrees of freedom. What of the rows' spread is in the spread between seeds already (a row's luck
with a seed) is taken out of the rows' part, so that it counts once. Seeds that agree by luck
(scores of a few rows may) make nothing certain: the interval is never narrower than that of the rows alone. Where each
seed held out rows of its own, the spread between seeds has all of theirs, and the interval is Student's alone.
`tests/compare` simulates coverage.

The *detectable* difference is the true difference that this many seeds and rows would have found with a power of 80 %
at the 5 % level, two-sided, by the noncentral t, averaged over how far the standard error found may be from the true
one, with the degrees of freedom of Satterthwaite (1946, Biometrics Bulletin 2:110). numpy only; the same seed gives the
same interval.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ENOUGH_ROWS = 100
"""Held-out rows below which a comparison says little of what is learned: one of speed holds out a few."""
LEVEL = 0.95
POWER = 0.80
DRAWS = 4000
_ABOVE_80 = 0.8416  # standard errors that a normal value stays below with a probability of POWER
T_DRAWS = 50
"""Draws of the seeds' part for each of the rows': with few degrees of freedom the tails of Student's t are long."""
_CHUNK = 2_000_000  # resampled indices held at once: 16 MB


@dataclass(frozen=True)
class Figure:
    """A mean over seeds. `low` and `high` bound its 95 % interval; None where there is one seed."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": len(self.values),
                "values": list(self.values)}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """a minus b. `detectable`: the smallest true difference that would have been found (power 80 %); None: one
    seed, or nothing varied."""

    mean: float
    low: float | None
    high: float | None
    detectable: float | None
    seeds: int
    rows: int = 0

    @property
    def found(self) -> bool:
        """Whether the interval leaves 0 out; one seed finds nothing."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high

    def as_dict(self) -> dict[str, float | None]:
        return {"mean": self.mean, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Rows:
    """One figure of one run on its held-out rows: sum(totals) / sum(weights) is the figure.

    Of a loss, totals are summed negative log-likelihoods and weights supervised tokens; of a score, scores and ones.
    `names` says which rows they are.
    """

    names: tuple[str, ...]
    totals: Array
    weights: Array

    @property
    def figure(self) -> float:
        return float(self.totals.sum() / self.weights.sum())

    def pairs_with(self, other: "Rows") -> bool:
        """Whether both are of the same rows, each with the same weight."""
        return self.names == other.names and np.array_equal(self.weights, other.weights)


def mean_interval(values: Sequence[float]) -> Figure:
    """Mean over seeds with Student's 95 % interval. ValueError for no values."""
    if not values:
        raise ValueError("a mean needs at least one value")
    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) == 1:
        return Figure(mean, None, None, (mean,))
    half = t_quantile(0.5 + LEVEL / 2, len(data) - 1) * float(data.std(ddof=1)) / math.sqrt(len(data))
    return Figure(mean, mean - half, mean + half, tuple(map(float, values)))


def mean_ratio(values: Sequence[float]) -> Figure:
    """Geometric mean of ratios with Student's interval of their logarithms: it is above 0, and the ratio the other way
    round has the inverse. ValueError for no values, or one that is not above 0."""
    if any(value <= 0 for value in values):
        raise ValueError("a ratio is above 0")
    figure = mean_interval([math.log(value) for value in values])
    low, high = (None if end is None else math.exp(end) for end in (figure.low, figure.high))
    return Figure(math.exp(figure.mean), low, high, tuple(map(float, values)))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a minus b, paired by seed. ValueError where they are not as many."""
    if len(a) != len(b):
        raise ValueError(f"paired values differ in number: {len(a)} and {len(b)}")
    figure = mean_interval([x - y for x, y in zip(a, b, strict=True)])
    if figure.low is None:
        return Difference(figure.mean, None, None, None, 1)
    n = len(a)
    error = float(np.std(np.asarray(figure.values), ddof=1)) / math.sqrt(n)
    return Difference(figure.mean, figure.low, figure.high, detectable(error, n - 1), n)


def row_difference(a: Sequence[Rows], b: Sequence[Rows], seed: int = 0) -> Difference:
    """a minus b by seed and by row; one `Rows` a seed, in the same order, on the same rows within a seed.

    ValueError where rows or weights of a pair differ. See the module for how the interval is made.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"paired seeds differ in number: {len(a)} and {len(b)}")
    for one, other in zip(a, b, strict=True):
        if not one.pairs_with(other):
            raise ValueError("the two were measured on different held-out rows")
    totals = [one.totals - other.totals for one, other in zip(a, b, strict=True)]
    weights = [one.weights for one in a]
    by_seed = np.array([t.sum() / w.sum() for t, w in zip(totals, weights, strict=True)])
    mean, rows = float(by_seed.mean()), min(map(len, totals))
    if len(a) == 1 or rows < 2 or len({one.names for one in a}) > 1:  # the rows' spread is in the seeds'
        return replace(paired_difference(by_seed.tolist(), [0.0] * len(a)), rows=rows)
    rng = np.random.default_rng(seed)
    row_part = _resample_rows(totals, weights, rng) - mean
    # The bootstrap of n values is too narrow by these two (Hesterberg 2015, Am. Statistician 69:371).
    row_part *= math.sqrt(rows / (rows - 1)) * t_quantile(0.5 + LEVEL / 2, rows - 1) / t_quantile(0.975, 1e6)
    variance, seed_variance = float(row_part.var()), float(by_seed.var(ddof=1)) / len(a)
    own = max(variance - _noise(totals, weights, by_seed), 0.0)
    drawn = rng.standard_t(len(a) - 1, (T_DRAWS // 2, DRAWS)) * math.sqrt(seed_variance)
    seed_part = np.concatenate([drawn, -drawn])  # both ways, so that a minus b says what b minus a does
    both = _ends(mean + seed_part + row_part * math.sqrt(own / variance if variance > 0 else 0.0))
    alone = _ends(mean + row_part)
    low, high = min(both[0], alone[0]), max(both[1], alone[1])
    parts = [(seed_variance, len(a) - 1.0), (own, rows - 1.0)]
    error = math.sqrt(seed_variance + own)
    sizes = (
        detectable(error, satterthwaite(parts)),
        detectable(math.sqrt(variance), rows - 1),
        # Few seeds' long tails are in the interval whole, and only in part in Satterthwaite's degrees of freedom: what
        # lies inside half an interval is not found.
        (high - low) / 2 + _ABOVE_80 * error if error > 0 else None,
    )
    return Difference(mean, low, high, max((s for s in sizes if s is not None), default=None), len(a), rows)


def _ends(draws: Array) -> tuple[float, float]:
    low, high = np.percentile(draws, (50 - 50 * LEVEL, 50 + 50 * LEVEL))
    return float(low), float(high)


def _resample_rows(totals: Sequence[Array], weights: Sequence[Array], rng: np.random.Generator) -> Array:
    """The mean over seeds of each seed's figure on resampled rows, the same for all seeds, [DRAWS]."""
    found = np.zeros(DRAWS)
    step = max(1, _CHUNK // len(totals[0]))
    for start in range(0, DRAWS, step):
        drawn = rng.integers(0, len(totals[0]), (min(step, DRAWS - start), len(totals[0])))
        for top, bottom in zip(totals, weights, strict=True):
            found[start : start + step] += top[drawn].sum(1) / bottom[drawn].sum(1)
    return found / len(totals)


def _noise(totals: Sequence[Array], weights: Sequence[Array], by_seed: Array) -> float:
    """Of the variance between seeds' means, the part that rows explain: what is left of a row in a seed when the row's
    mean over seeds and the seed's mean are taken off (interaction and noise), as a variance of the mean over seeds."""
    seeds, rows = len(totals), len(totals[0])
    share_R = weights[0] * (rows / weights[0].sum())
    residual_SR = np.stack([t * (rows / w.sum()) for t, w in zip(totals, weights, strict=True)])
    residual_SR = residual_SR - by_seed[:, None] * share_R
    residual_SR = residual_SR - residual_SR.mean(0, keepdims=True)
    if rows < 2:
        return 0.0
    variance = float((residual_SR**2).sum()) / ((seeds - 1) * (rows - 1))
    return variance / (rows * seeds)


def satterthwaite(parts: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of variances, each (variance, its degrees of freedom)."""
    bottom = sum(variance**2 / freedom for variance, freedom in parts)
    return sum(variance for variance, _ in parts) ** 2 / bottom if bottom > 0 else max(f for _, f in parts)


def detectable(error: float, freedom: float) -> float | None:
    """The true difference that is found with 80 % power at the 5 % level, two-sided, for a standard error.

    None where nothing varied: that says how little was seen, not that everything would have been.
    """
    return _standard_errors(round(freedom, 2)) * error if error > 0 else None


@lru_cache(maxsize=1024)
def _standard_errors(freedom: float) -> float:
    """How many standard errors *found* a true difference must be to be found with 80 % power.

    The standard error is itself known from a few runs: where the one found is too small by luck, so is any multiple of
    it. The power is averaged over how far it may be from the true one, found = s * true with s as in `power`. With 3
    seeds that takes 1.55 times as much as if it were known exactly, with 30 no more than 1.03 times.
    """
    s, weight = _spread_found(freedom)
    shifts = np.linspace(0.0, 12.0 * t_quantile(0.5 + LEVEL / 2, freedom) + 40.0, 800)
    powers = power(shifts, freedom)
    low, high = 0.0, float(shifts[-1])
    for _ in range(60):
        middle = (low + high) / 2
        mean = float((weight * np.interp(middle * s, shifts, powers)).sum())
        low, high = (middle, high) if mean < POWER else (low, middle)
    return (low + high) / 2


def power(shifts: Array, freedom: float) -> Array:
    """The probability that t exceeds its 97.5 % point where the true difference is so many true standard errors.

    t is (z + shift) / s with s² = chi² / freedom: the mean over s of P(z > t(0.975) s - shift).
    """
    s, weight = _spread_found(freedom)
    beyond = t_quantile(0.5 + LEVEL / 2, freedom) * s - shifts[:, None]
    powers: Array = (np.interp(beyond, *_above()) * weight).sum(1)
    return powers


@lru_cache(maxsize=1)
def _above() -> tuple[Array, Array]:
    """z, and P(a standard normal value is above z), closely enough for straight lines between."""
    z = np.linspace(-9.0, 9.0, 20001)
    return z, np.array([0.5 * math.erfc(float(one) / math.sqrt(2)) for one in z])


@lru_cache(maxsize=1024)
def _spread_found(freedom: float) -> tuple[Array, Array]:
    """A standard error that is found, over the true one, and how likely each is: s² = chi² / freedom."""
    log_s = np.linspace(-8.0, 3.0, 2201)  # equal steps, whatever the degrees of freedom
    weight = np.exp(freedom * log_s - freedom / 2 * np.exp(2 * log_s) + freedom / 2)
    weight /= weight.sum()
    likely = weight > 1e-9
    return np.exp(log_s[likely]), weight[likely]


def pareto(points: Sequence[Sequence[float]]) -> list[bool]:
    """Which points are on the front, where less is better in every coordinate; equal points are on it together."""

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)

    return [not any(beats(other, one) for other in points) for one in points]


# ---------------------------------------------------------------- Student's t without scipy


@lru_cache(maxsize=1024)
def t_quantile(p: float, freedom: float) -> float:
    """The point that Student's t with `freedom` > 0 stays below with probability p, by bisection of `t_cdf`."""
    if not 0.0 < p < 1.0 or freedom <= 0:
        raise ValueError(f"a quantile needs 0 < p < 1 and degrees of freedom above 0, not {p} and {freedom}")
    if p < 0.5:
        return -t_quantile(1.0 - p, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        high *= 2.0
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, freedom: float) -> float:
    """Student's distribution function: beyond t lies I_x(freedom / 2, 1 / 2) / 2 with x = freedom / (freedom + t²)."""
    tail = 0.5 * _beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return 1.0 - tail if t >= 0 else tail


def _beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (Abramowitz & Stegun 26.5.8)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction, c, d = 1.0, 1.0, 0.0  # Lentz's method
    for m in range(10_000):
        half = m // 2
        if m == 0:
            term = 1.0
        elif m % 2 == 0:
            term = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        else:
            term = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        d = 1.0 / _away_from_zero(1.0 + term * d)
        c = _away_from_zero(1.0 + term / c)
        fraction *= c * d
        if m and abs(c * d - 1.0) < 1e-15:
            break
    return math.exp(log_front) * (fraction - 1.0) / a


def _away_from_zero(x: float) -> float:
    return x if abs(x) > 1e-300 else 1e-300
