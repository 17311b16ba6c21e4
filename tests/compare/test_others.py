"""Other work beside a process, on the real counters."""

import subprocess
import sys
import time

import psutil

from halfbyte.compare.others import Others

SPIN = "import time; end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


def share_beside(count: int, seconds: float = 2.0) -> float:
    """Of a process that sleeps, beside others that do not."""
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    asleep = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        time.sleep(0.3)
        others = Others(asleep.pid)
        time.sleep(seconds)
        others.tick()
    finally:
        for process in (*spinning, asleep):
            process.kill()
            process.wait()
    assert others.share is not None
    return others.share


def test_work_beside_is_seen() -> None:
    cores = psutil.cpu_count() or 1
    assert share_beside(1) > 0.6 / cores


def test_a_processs_own_work_is_not_others() -> None:
    """Whatever else the machine does meanwhile: both together are what its processors worked."""
    spinning = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        time.sleep(0.3)
        own, idle, began = psutil.Process(spinning.pid).cpu_times(), psutil.cpu_times(), time.monotonic()
        others = Others(spinning.pid)
        # What it had worked before counts as its own, too: a worker is met at its start.
        time.sleep(2.0)
        others.tick()
        later, passed = psutil.cpu_times(), time.monotonic() - began
    finally:
        spinning.kill()
        spinning.wait()
    rested = later.idle - idle.idle + getattr(later, "iowait", 0.0) - getattr(idle, "iowait", 0.0)
    worked = 1 - rested / (passed * (psutil.cpu_count() or 1))
    mine = (passed + own.user + own.system) / (passed * (psutil.cpu_count() or 1))
    assert others.share is not None
    assert max(worked - mine, 0.0) - 0.15 <= others.share <= max(worked, 0.0) + 0.02


def test_a_process_that_never_was_has_no_figure() -> None:
    others = Others(0x7FFFFFF0)
    others.tick()
    assert others.share is None


def test_a_process_that_is_gone_keeps_its_last_figure() -> None:
    quick = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    others = Others(quick.pid)
    time.sleep(0.2)
    others.tick()
    before = others.share
    quick.wait()
    others.tick()
    assert others.share == before
