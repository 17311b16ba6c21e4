import math
from collections.abc import Callable

import numpy as np
import pytest

from halfbyte.compare.statistics import (
    Array,
    Rows,
    detectable,
    mean_interval,
    mean_ratio,
    paired_difference,
    pareto,
    power,
    row_difference,
    satterthwaite,
    t_cdf,
    t_quantile,
)


@pytest.mark.parametrize(
    ("p", "freedom", "value"),
    [  # printed tables of Student's t
        (0.975, 1, 12.7062047364), (0.975, 2, 4.30265272991), (0.975, 4, 2.77644510520), (0.975, 30, 2.04227245630),
        (0.80, 2, 1.06066017178), (0.995, 10, 3.16927267262), (0.975, 1e6, 1.95996635682), (0.025, 2, -4.30265272991),
    ],
)  # fmt: skip
def test_quantiles_of_students_t(p: float, freedom: float, value: float) -> None:
    assert t_quantile(p, freedom) == pytest.approx(value, rel=1e-9)
    assert t_cdf(value, freedom) == pytest.approx(p, rel=1e-9)


def test_quantiles_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 1.7, 3, 8.5, 60):
        for p in (0.6, 0.9, 0.975, 0.999):
            assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9)


def test_a_quantile_of_nonsense_is_refused() -> None:
    for p, freedom in ((0.0, 2.0), (1.0, 2.0), (0.5, 0.0)):
        with pytest.raises(ValueError, match="quantile"):
            t_quantile(p, freedom)


def test_mean_and_interval_over_seeds() -> None:
    figure = mean_interval([1.0, 2.0, 3.0])
    assert figure.mean == 2.0
    assert figure.low == pytest.approx(2 - 4.30265272991 / math.sqrt(3))
    assert figure.as_dict() == {"mean": 2.0, "low": figure.low, "high": figure.high, "n": 3, "values": [1.0, 2.0, 3.0]}
    one = mean_interval([5.0])
    assert (one.mean, one.low, one.high) == (5.0, None, None)
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_pairs_by_seed() -> None:
    found = paired_difference([1.0, 2.0, 3.1], [0.0, 1.0, 2.0])
    assert found.mean == pytest.approx(1.0333333)
    assert found.found
    same = paired_difference([1.0, 2.0, 3.0], [1.1, 1.8, 3.05])
    assert not same.found
    assert same.detectable is not None
    assert same.detectable > 0
    one = paired_difference([1.0], [0.0])
    assert (one.low, one.detectable, one.found) == (None, None, False)
    with pytest.raises(ValueError, match="differ in number"):
        paired_difference([1.0], [1.0, 2.0])


def test_equal_differences_leave_no_doubt() -> None:
    """Counts of parameters: no spread, and still a difference."""
    found = paired_difference([10.0, 10.0], [7.0, 7.0])
    assert (found.low, found.high, found.found, found.detectable) == (3.0, 3.0, True, None)
    assert not paired_difference([1.0, 1.0], [1.0, 1.0]).found


def test_rows_must_be_the_same() -> None:
    ones = np.ones(2)
    with pytest.raises(ValueError, match="different held-out rows"):
        row_difference([Rows(("a", "b"), ones, ones)], [Rows(("a", "c"), ones, ones)])
    with pytest.raises(ValueError, match="different held-out rows"):
        row_difference([Rows(("a", "b"), ones, ones)], [Rows(("a", "b"), ones, 2 * ones)])
    with pytest.raises(ValueError, match="differ in number"):
        row_difference([], [])
    assert row_difference([Rows(("a", "b"), ones, ones)], [Rows(("a", "b"), 0 * ones, ones)]).low is None


def test_the_same_seed_gives_the_same_interval() -> None:
    rng = np.random.default_rng(1)
    names = tuple(map(str, range(20)))
    a = [Rows(names, rng.normal(size=20), np.ones(20)) for _ in range(3)]
    b = [Rows(names, rng.normal(size=20), np.ones(20)) for _ in range(3)]
    assert row_difference(a, b) == row_difference(a, b)


def test_seeds_that_agree_by_luck_make_nothing_certain() -> None:
    """One answer of 100 more in each of three seeds, each time another one: the seeds alone would have no doubt."""
    names, ones = tuple(map(str, range(100))), np.ones(100)
    a = [Rows(names, np.eye(100)[row], ones) for row in (5, 17, 40)]
    b = [Rows(names, np.zeros(100), ones)] * 3
    found = row_difference(a, b)
    assert found.mean == pytest.approx(0.01)
    assert not found.found
    assert found.detectable is not None
    assert found.detectable > 0.01
    same = row_difference(b, b)
    assert (same.low, same.high, same.found, same.detectable) == (0.0, 0.0, False, None)


@pytest.mark.parametrize("seeds", [2, 3])
def test_an_interval_is_the_same_from_the_other_side(seeds: int) -> None:
    """Student's t with one degree of freedom has tails that a few thousand draws do not fill."""
    rng = np.random.default_rng(4)
    a, b = simulated(rng, seeds, 80, (0.05, 0.0, 0.0), True, 0.3)
    found, turned = row_difference(a, b), row_difference(b, a)
    assert found.low is not None
    assert found.high is not None
    assert turned.low == pytest.approx(-found.high, rel=1e-6)
    by_seed = [one.figure - other.figure for one, other in zip(a, b, strict=True)]
    student = mean_interval(by_seed)
    assert student.high is not None
    assert found.high - found.mean == pytest.approx(student.high - student.mean, rel=0.04)


def simulated(
    rng: np.random.Generator, seeds: int, rows: int, spread: tuple[float, float, float], shared: bool, shift: float
) -> tuple[list[Rows], list[Rows]]:
    """Rows with random lengths whose difference is `shift` a token: spread by seed, by row, and by both together."""
    of_seed, of_row, of_both = spread
    made: tuple[list[Rows], list[Rows]] = ([], [])
    row_effect, tokens = rng.normal(0, of_row, rows), rng.integers(5, 40, rows).astype(float)
    for seed in range(seeds):
        if not shared:
            row_effect, tokens = rng.normal(0, of_row, rows), rng.integers(5, 40, rows).astype(float)
        names = tuple(f"{0 if shared else seed}:{i}" for i in range(rows))
        b: Array = rng.normal(2, 0.5, rows) * tokens
        effect = shift + rng.normal(0, of_seed) + row_effect + rng.normal(0, of_both, rows)
        made[0].append(Rows(names, b + effect * tokens, tokens))
        made[1].append(Rows(names, b, tokens))
    return made


SPREADS = {"seeds": (0.05, 0.1, 0.1), "rows": (0.0, 0.5, 0.05), "noise": (0.0, 0.0, 0.5), "all": (0.03, 0.3, 0.2)}


def coverage(monkeypatch: pytest.MonkeyPatch, spread: str, shared: bool, seeds: int, repetitions: int) -> float:
    """How often the interval of a simulated comparison holds the truth."""
    monkeypatch.setattr("halfbyte.compare.statistics.DRAWS", 1000)
    rng = np.random.default_rng(11)
    held = 0
    for repetition in range(repetitions):
        found = row_difference(*simulated(rng, seeds, 80, SPREADS[spread], shared, 0.3), seed=repetition)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0.3 <= found.high
    return held / repetitions


@pytest.mark.parametrize("shared", [True, False], ids=["the same rows", "own rows"])
@pytest.mark.parametrize("spread", ["seeds", "all"])
def test_intervals_cover(monkeypatch: pytest.MonkeyPatch, spread: str, shared: bool) -> None:
    assert coverage(monkeypatch, spread, shared, 3, 150) >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / 150)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("shared", [True, False], ids=["the same rows", "own rows"])
@pytest.mark.parametrize("spread", SPREADS)
def test_intervals_cover_whatever_varies(
    monkeypatch: pytest.MonkeyPatch, spread: str, shared: bool, seeds: int
) -> None:
    """95 times of 100 or more, whether seeds, rows or both together make the differences."""
    assert coverage(monkeypatch, spread, shared, seeds, 600) >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / 600)


@pytest.mark.parametrize("spread", ["rows", "seeds"])
@pytest.mark.slow
def test_the_detectable_difference_is_found_four_times_of_five(monkeypatch: pytest.MonkeyPatch, spread: str) -> None:
    """Or a little less often: the interval is on the safe side where seeds and rows both vary."""
    monkeypatch.setattr("halfbyte.compare.statistics.DRAWS", 600)
    rng = np.random.default_rng(3)
    sizes = [row_difference(*simulated(rng, 5, 80, SPREADS[spread], True, 0.0)).detectable for _ in range(100)]
    size = float(np.sqrt(np.mean(np.square(np.array(sizes, dtype=float)))))
    found = [row_difference(*simulated(rng, 5, 80, SPREADS[spread], True, size)).found for _ in range(300)]
    assert 0.65 <= np.mean(found) <= 0.9


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("spread", SPREADS)
def test_what_would_have_been_found_is_more_than_what_was_not(seeds: int, spread: str) -> None:
    rng = np.random.default_rng(seeds)
    for repetition in range(20):
        found = row_difference(*simulated(rng, seeds, 200, SPREADS[spread], True, 0.05), seed=repetition)
        assert found.detectable is not None
        assert found.detectable > abs(found.mean) or found.found


def test_detectable_differences_shrink_with_what_is_known() -> None:
    # The paired t test's own tables, for a spread that is known: 3 pairs find 3.26 standard deviations, 5 pairs 1.68.
    assert power(np.array([3.264 * math.sqrt(3)]), 2) == pytest.approx(0.8, abs=0.001)
    assert power(np.array([1.682 * math.sqrt(5)]), 4) == pytest.approx(0.8, abs=0.001)
    for freedom, much in ((2, 1.5), (30, 1.02), (1e4, 1.0)):
        known = detectable(1.0, freedom)
        assert known is not None
        less, more = power(np.array([known / much / 1.1, known / much]), freedom)
        assert less < 0.8 <= more
    sizes = [detectable(0.5, 30), detectable(1.0, 30), detectable(1.0, 2)]
    assert sizes == sorted(sizes, key=float)
    assert satterthwaite([(1.0, 2), (0.0, 100)]) == pytest.approx(2)
    assert satterthwaite([(1.0, 2), (1.0, 2)]) == pytest.approx(4)
    assert satterthwaite([(0.0, 2), (0.0, 9)]) == 9


@pytest.mark.parametrize("seeds", [2, 3, 5, 20])
def test_a_difference_as_large_as_said_is_found_four_times_of_five(seeds: int) -> None:
    """What a few runs say could be found, tried on as many more of them."""
    rng, tries = np.random.default_rng(seeds), 20_000
    root, critical = math.sqrt(seeds), t_quantile(0.975, seeds - 1)
    error = rng.normal(size=(tries, seeds)).std(1, ddof=1) / root
    one = detectable(1.0, seeds - 1)
    assert one is not None
    drawn = rng.normal(size=(tries, seeds)) + (one * error)[:, None]
    found = drawn.mean(1) > critical * drawn.std(1, ddof=1) / root
    assert np.mean(found) == pytest.approx(0.8, abs=0.015)


def test_the_pareto_front() -> None:
    better: Callable[[list[list[float]]], list[bool]] = pareto
    assert better([[1, 5], [2, 2], [5, 1], [3, 3]]) == [True, True, True, False]
    assert better([[1, 1], [1, 1], [1, 2]]) == [True, True, False]
    assert better([]) == []


def test_ratios_the_other_way_round_are_the_inverse() -> None:
    values = [0.5, 1.1, 3.0]
    one, other = mean_ratio(values), mean_ratio([1 / value for value in values])
    assert one.mean == pytest.approx(math.prod(values) ** (1 / 3)) == pytest.approx(1 / other.mean)
    assert one.low is not None
    assert other.high is not None
    assert 0 < one.low == pytest.approx(1 / other.high)
    assert (mean_ratio([2.0]).mean, mean_ratio([2.0]).low) == (pytest.approx(2.0), None)
    with pytest.raises(ValueError, match="above 0"):
        mean_ratio([1.0, 0.0])
