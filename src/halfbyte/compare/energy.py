"""Energy from the processor's own counters, where the machine shows them (Intel's and AMD's RAPL on Linux).

`/sys/class/powercap/intel-rapl:N/energy_uj` counts the microjoules of package N and wraps at max_energy_range_uj; on
most systems only root may read it. It is the packages' energy, whoever used them: other work counts too, and memory,
disks, fans and a GPU do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Counter:
    """One package's counter: microjoules, and where it begins again."""

    value: int
    wraps_at: int


def read(root: Path = POWERCAP) -> list[Counter] | None:
    """All packages' counters; None where the machine has none or they may not be read."""
    found = []
    try:
        for zone in sorted(root.glob("intel-rapl:*")):
            if zone.name.count(":") == 1:  # the others are parts of these
                values = (int((zone / name).read_text()) for name in ("energy_uj", "max_energy_range_uj"))
                found.append(Counter(*values))
    except (OSError, ValueError):
        return None
    return found or None


def joules(before: Sequence[Counter] | None, after: Sequence[Counter] | None) -> float | None:
    """Energy between two readings, taken less than a wrap (an hour or so at full load) apart."""
    if before is None or after is None or len(before) != len(after):
        return None
    return sum((b.value - a.value) % (a.wraps_at + 1) for a, b in zip(before, after, strict=True)) / 1e6


class Meter:
    """Adds up readings that are taken often enough for no counter to wrap unseen."""

    def __init__(self, root: Path = POWERCAP) -> None:
        self._root, self._last = root, read(root)
        self.joules: float | None = 0.0 if self._last is not None else None

    def tick(self) -> None:
        """Read again; a machine that stops showing its counters has no figure at all."""
        if self.joules is not None:
            now = read(self._root)
            more = joules(self._last, now)
            self.joules = None if more is None else self.joules + more
            self._last = now
