"""How far the planner's arithmetic is from measurements: the middle it is corrected to, and the interval around it.

`of(device)` gives the constants that ship with halfbyte: for a CPU they are fitted on `benchmarks/plan_accuracy.py`'s
runs (docs/planner-accuracy.md says which), for a GPU nothing was measured and the interval is wide. A machine's own
history refits them (`plan.history`).

Units: bytes, seconds.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A figure that is not known exactly: the middle (p50), and what 95 of 100 runs stay below (p95)."""

    p50: float
    p95: float

    def as_dict(self, digits: int = 0) -> dict[str, float]:
        """{"p50", "p95"}, rounded: whole numbers unless `digits` asks for more."""
        p50, p95 = round(self.p50, digits), round(self.p95, digits)
        return {"p50": p50, "p95": p95} if digits else {"p50": int(p50), "p95": int(p95)}


@dataclass(frozen=True)
class Calibration:
    """Constants of one machine, or of a kind of machine.

    memory_scale    measured peak over predicted peak, the median of past runs
    memory_spread   p95 over p50, as a share: 0.05 says that 95 of 100 runs stay below 1.05 times the middle
    memory_margin   bytes added to p95 whatever the size: what the process itself varies by
    time_scale      measured seconds over predicted ones, the median of past runs, before any probe
    time_spread     p95 over p50 of time, as a share
    probe_spread    the same after a probe of a few steps on the very run
    runs            how many runs these constants come from; 0: none, they are guesses
    source          in words: where they come from
    """

    memory_scale: float = 1.0
    memory_spread: float = 0.15
    memory_margin: int = 150_000_000
    time_scale: float = 1.0
    time_spread: float = 0.6
    probe_spread: float = 0.2
    runs: int = 0
    source: str = "unmeasured: the interval is a guess"

    def memory(self, nbytes: float) -> Interval:
        """Peak memory of a phase, or the bytes of all components together."""
        middle = nbytes * self.memory_scale
        return Interval(middle, middle * (1 + self.memory_spread) + self.memory_margin)

    def seconds(self, predicted: float, probed: bool = False) -> Interval:
        """Seconds of a phase or a run. With `probed`, `predicted` comes from a probe of this run and has its scale."""
        middle = predicted if probed else predicted * self.time_scale
        return Interval(middle, middle * (1 + (self.probe_spread if probed else self.time_spread)))


CPU = Calibration(
    memory_spread=0.12,
    memory_margin=80_000_000,
    time_spread=0.5,
    probe_spread=0.25,
    runs=44,
    source="44 configurations on one processor (docs/planner-accuracy.md)",
)
GPU = Calibration()


def of(device: str) -> Calibration:
    """The constants that ship with halfbyte for `cpu` or `cuda`."""
    return CPU if device == "cpu" else GPU
