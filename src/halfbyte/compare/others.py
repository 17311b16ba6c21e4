"""How much of the processor other work took while a run was at work: times beside others' say little of a method.

The system's counters of all processors against the process's own, from its start to its end. What a hypervisor took
("steal") counts as others'; so does the comparison itself, which sleeps.
"""

import contextlib
import time

import psutil

QUIET = 0.05
"""Of the processor: what others may take of a machine that is called quiet."""


class Others:
    """The share of all processors' time that others took; `tick` while the process is alive, the last one counts."""

    def __init__(self, pid: int) -> None:
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._process = psutil.Process(pid)
        self._began, self._at_work = time.monotonic(), _at_work()
        self.share: float | None = None

    def tick(self) -> None:
        """Read again; a process that is gone has no more figures."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.Error):
            own = self._process.cpu_times()
            passed = (time.monotonic() - self._began) * (psutil.cpu_count() or 1)
            if passed > 0:
                taken = _at_work() - self._at_work - own.user - own.system
                self.share = min(max(taken / passed, 0.0), 1.0)


def _at_work() -> float:
    """Seconds that processors worked since the system started, summed."""
    times = psutil.cpu_times()._asdict()
    # Linux counts guests' time in user and nice as well.
    return float(sum(value for name, value in times.items() if name not in ("idle", "iowait", "guest", "guest_nice")))
