"""The process's memory against what Linux and psutil say."""

import psutil
import pytest

from halfbyte.train.memory import _portable_memory, process_memory


def test_resident_and_peak() -> None:
    resident, peak = process_memory()
    assert resident == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)
    block = bytearray(80_000_000)
    block[::4096] = b"x" * len(block[::4096])
    grown, higher = process_memory()
    assert grown >= resident + 70_000_000
    assert higher >= max(peak, grown)
    del block
    assert process_memory()[1] > 0.99 * higher  # the kernel batches its counters by thread


def test_the_portable_way_agrees() -> None:
    resident, peak = _portable_memory()
    assert peak >= resident > 10_000_000
    assert abs(peak - process_memory()[1]) < 0.1 * peak
