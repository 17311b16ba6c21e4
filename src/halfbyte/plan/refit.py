"""The planner's constants of one machine, fitted again on what its runs really took.

Of each run only two ratios count: measured over predicted peak memory, and measured over predicted seconds, both of the
arithmetic as it is before any calibration. All is done on their logarithms, in which twice and half are equally far.

**Which runs.** The last `PER_CONFIGURATION` of each configuration, so that one that is repeated every night does not
speak for all. Runs that were resumed, or that stopped early, say nothing about time; a second run of one process, and
one that was resumed, nothing about memory. What other work on the machine disturbed is an outlier: a ratio more than
`CLIP` robust deviations (1.4826 MAD) from the median is moved to there. Too much memory is no outlier: nothing but the
run itself causes it.

**The middle.** With n runs whose logarithms have the median m, and the shipped constant s counting as `PRIOR` runs:

    scale = exp((PRIOR ln s + n m) / (PRIOR + n)),   held within SCALE_BOUNDS of s

**The interval.** What is left, measured over corrected prediction, minus 1, has the spread

    narrow = (PRIOR shipped + n data) / (PRIOR + n)      data = exp(1.645 deviation (1 + 2 / sqrt n)) - 1
    seen   = the ceil(0.95 (n + 1))-th smallest excess, the largest where there are fewer than 19
    spread = max(narrow, seen), held within SPREAD_BOUNDS

`data` is a normal distribution's 95th percentile with room for a deviation that few runs tell badly; `seen` asks
nothing of the distribution, and keeps the interval from being narrower than what has happened already.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from halfbyte.plan.calibration import Calibration

PRIOR = 5
"""Runs that the shipped constants count as."""
PER_CONFIGURATION = 3
CLIP = 4.0
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

    def chosen(self) -> list[float]:
        """Of each configuration the newest few."""
        counts: dict[str, int] = {}
        kept = []
        for value, configuration in zip(self.values, self.configurations, strict=True):
            counts[configuration] = counts.get(configuration, 0) + 1
            if counts[configuration] <= PER_CONFIGURATION:
                kept.append(value)
        return kept


def refit(shipped: Calibration, memory: Ratios, time: Ratios, probed: Ratios, margins: Sequence[float]) -> Calibration:
    """The shipped constants, corrected by a machine's runs as the module says.

    probed    of the runs whose prediction came from a probe, by that prediction
    margins   beside `memory`'s values: the shipped margin in bytes over the predicted peak, which p95 contains anyway
    """
    fitted = shipped
    held = memory.chosen()
    if held:
        scale, deviation = _scale(held, shipped.memory_scale, SCALE_BOUNDS["memory"], clip_above=False)
        room = statistics.median(margins) if margins else 0.0
        excess = [math.exp(value) / scale - 1 - room / scale for value in held]
        spread = _spread(excess, shipped.memory_spread, deviation, SPREAD_BOUNDS["memory"])
        fitted = replace(fitted, memory_scale=scale, memory_spread=spread)
    taken = time.chosen()
    if taken:
        scale, deviation = _scale(taken, shipped.time_scale, SCALE_BOUNDS["time"])
        excess = [math.exp(value) / scale - 1 for value in _clipped(taken)]
        spread = _spread(excess, shipped.time_spread, deviation, SPREAD_BOUNDS["time"])
        fitted = replace(fitted, time_scale=scale, time_spread=spread)
    after = probed.chosen()
    if after:
        deviation = _deviation(after)
        excess = [math.exp(value) - 1 for value in _clipped(after)]
        fitted = replace(fitted, probe_spread=_spread(excess, shipped.probe_spread, deviation, SPREAD_BOUNDS["probe"]))
    runs = max(len(held), len(taken))
    source = f"refitted on {runs} run{'s' if runs != 1 else ''} of this machine"
    return replace(fitted, runs=runs, source=source) if runs else shipped


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation as the median absolute deviation tells it."""
    middle = statistics.median(values)
    return max(1.4826 * statistics.median(abs(value - middle) for value in values), SMALLEST_DEVIATION)


def _clipped(values: Sequence[float], above: bool = True) -> list[float]:
    middle, room = statistics.median(values), CLIP * _deviation(values)
    return [max(min(value, middle + room) if above else value, middle - room) for value in values]


def _scale(
    values: Sequence[float], shipped: float, bounds: tuple[float, float], clip_above: bool = True
) -> tuple[float, float]:
    """(the middle shrunk towards the shipped one, the deviation around it)."""
    n, middle = len(values), statistics.median(_clipped(values, clip_above))
    shrunk = math.exp((PRIOR * math.log(shipped) + n * middle) / (PRIOR + n))
    return min(max(shrunk, shipped * bounds[0]), shipped * bounds[1]), _deviation(values)


def _spread(excess: Sequence[float], shipped: float, deviation: float, bounds: tuple[float, float]) -> float:
    """p95 over p50, minus 1; see the module."""
    n = len(excess)
    data = math.exp(1.645 * deviation * (1 + 2 / math.sqrt(n))) - 1
    narrow = (PRIOR * shipped + n * data) / (PRIOR + n)
    seen = sorted(excess)[min(n, math.ceil(0.95 * (n + 1))) - 1]
    return min(max(narrow, seen, bounds[0]), bounds[1])
