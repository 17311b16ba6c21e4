"""The planner's constants of one machine, fitted again on what its runs really took.

Of each run only two ratios count: measured over predicted peak memory, and measured over predicted seconds, both of the
arithmetic as it is before any calibration. All is done on their logarithms, in which twice and half are equally far.

**Which runs.** The last `PER_CONFIGURATION` of each configuration, so that one that is repeated every night does not
speak for all. Runs that were resumed, or that stopped early, say nothing about time; a second run of one process, and
one that was resumed, nothing about memory. What other work on the machine disturbed is an outlier: a ratio more than
`CLIP` robust deviations (1.4826 MAD) from the median is moved to there. Too much memory is no outlier: nothing but the
run itself causes it.

**The middle.** With the median m of the logarithms of n configurations, and the shipped constant s counting as `PRIOR`:

    scale = exp((PRIOR ln s + n m) / (PRIOR + n)),   held within SCALE_BOUNDS of s

**The interval.** What is left, measured over corrected prediction, minus 1, has the spread

    normal = exp(1.645 sqrt((PRIOR d0^2 + n d^2) / (PRIOR + n))) - 1      d0 = ln(1 + shipped) / 1.645, d = 1.4826 MAD
    seen   = the ceil(0.95 (runs + 1))-th smallest excess, the largest where there are fewer than 19 runs
    spread = max(normal, seen, shipped / 2), held within SPREAD_BOUNDS

`normal` is the 95th percentile of a normal distribution whose variance is drawn from the shipped one towards the runs';
`seen` asks nothing of the distribution, and keeps the interval from being narrower than what has happened already; half
of the shipped spread is kept because the next run may be of a kind that this machine has not seen.
"""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from halfbyte.plan.calibration import Calibration

PRIOR = 5
"""Configurations that the shipped constants count as."""
PER_CONFIGURATION = 3
CLIP = 4.0
NORMAL_95 = 1.645
"""Standard deviations above the middle of which a normal distribution has 95 %."""
SMALLEST_DEVIATION = 0.02
"""Of ln(ratio), below which nothing is an outlier: repeated runs of one configuration agree better than that."""
SCALE_BOUNDS = {"memory": (0.67, 1.5), "time": (0.1, 10.0)}
"""Times the shipped scale. Beyond that it is not the machine that is unlike, but the record or the arithmetic."""
SPREAD_BOUNDS = {"memory": (0.02, 0.6), "time": (0.1, 4.0), "probe": (0.05, 2.0)}


@dataclass(frozen=True)
class Ratios:
    """ln(measured / predicted) of the runs that count, newest first, with the configuration each is of."""

    values: tuple[float, ...]
    configurations: tuple[str, ...]

    def chosen(self) -> list[int]:
        """Indices of the newest few of each configuration."""
        counts: Counter[str] = Counter()
        kept = []
        for index, configuration in enumerate(self.configurations):
            counts[configuration] += 1
            if counts[configuration] <= PER_CONFIGURATION:
                kept.append(index)
        return kept

    def chosen_values(self) -> list[float]:
        return [self.values[index] for index in self.chosen()]

    @property
    def kinds(self) -> int:
        """How many configurations there are."""
        return len(set(self.configurations))


def refit(shipped: Calibration, memory: Ratios, time: Ratios, probed: Ratios, margins: Sequence[float]) -> Calibration:
    """The shipped constants, corrected by a machine's runs as the module says.

    probed    of the runs whose prediction came from a probe, by that prediction
    margins   beside `memory`'s values: the shipped margin in bytes over the predicted peak, which p95 contains anyway
    """
    fitted = shipped
    held, taken, after = memory.chosen_values(), time.chosen_values(), probed.chosen_values()
    if held:
        scale = _scale(held, memory.kinds, shipped.memory_scale, SCALE_BOUNDS["memory"])
        excess = [(math.exp(memory.values[i]) - margins[i]) / scale - 1 for i in memory.chosen()]
        spread = _spread(held, memory.kinds, excess, shipped.memory_spread, SPREAD_BOUNDS["memory"])
        fitted = replace(fitted, memory_scale=scale, memory_spread=spread)
    if taken:
        scale = _scale(taken, time.kinds, shipped.time_scale, SCALE_BOUNDS["time"])
        excess = [math.exp(value) / scale - 1 for value in _clipped(taken)]
        spread = _spread(taken, time.kinds, excess, shipped.time_spread, SPREAD_BOUNDS["time"])
        fitted = replace(fitted, time_scale=scale, time_spread=spread)
    if after:
        excess = [math.exp(value) - 1 for value in _clipped(after)]
        spread = _spread(after, probed.kinds, excess, shipped.probe_spread, SPREAD_BOUNDS["probe"])
        fitted = replace(fitted, probe_spread=spread)
    runs = max(len(held), len(taken))
    source = f"refitted on {runs} run{'s' if runs != 1 else ''} of this machine"
    return replace(fitted, runs=runs, source=source) if runs else shipped


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation as the median absolute deviation tells it."""
    middle = statistics.median(values)
    return max(1.4826 * statistics.median(abs(value - middle) for value in values), SMALLEST_DEVIATION)


def _clipped(values: Sequence[float]) -> list[float]:
    """Outliers moved to where the ordinary ends."""
    middle, room = statistics.median(values), CLIP * _deviation(values)
    return [max(min(value, middle + room), middle - room) for value in values]


def _scale(values: Sequence[float], kinds: int, shipped: float, bounds: tuple[float, float]) -> float:
    """The middle, shrunk towards the shipped one; a median needs no clipping."""
    shrunk = math.exp((PRIOR * math.log(shipped) + kinds * statistics.median(values)) / (PRIOR + kinds))
    return min(max(shrunk, shipped * bounds[0]), shipped * bounds[1])


def _spread(
    values: Sequence[float], kinds: int, excess: Sequence[float], shipped: float, bounds: tuple[float, float]
) -> float:
    """p95 over p50, minus 1; see the module."""
    before = math.log1p(shipped) / NORMAL_95
    variance = (PRIOR * before**2 + kinds * _deviation(values) ** 2) / (PRIOR + kinds)
    normal = math.expm1(NORMAL_95 * math.sqrt(variance))
    seen = sorted(excess)[min(len(excess), math.ceil(0.95 * (len(excess) + 1))) - 1]
    return min(max(normal, seen, shipped / 2, bounds[0]), bounds[1])
