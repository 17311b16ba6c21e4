"""The process's memory as the operating system counts it."""

import sys
from pathlib import Path

import psutil

from halfbyte.plan.hardware import memory_available


def process_memory() -> tuple[int, int]:
    """(resident bytes now, peak resident bytes) of this process.

    Linux: VmRSS and VmHWM of /proc/self/status. Elsewhere the resident set from psutil and the peak from getrusage
    (bytes on macOS) or, on Windows, from psutil.
    """
    fields = _status()
    if fields is None:
        return _portable_memory()
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def memory_left() -> int:
    """Bytes that this process can still take: what the machine and its control group have, within RLIMIT_DATA.

    The limit counts writable private memory whether it is used or not (VmData), which is what is asked for here.
    """
    left = memory_available()
    fields = _status()
    if fields is not None and "VmData" in fields:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
        if limit != resource.RLIM_INFINITY:
            left = min(left, max(0, limit - int(fields["VmData"].split()[0]) * 1024))
    return left


def _status() -> dict[str, str] | None:
    """/proc/self/status by name; None on other systems than Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return {key: value for key, _, value in (line.partition(":") for line in lines)}


def _portable_memory() -> tuple[int, int]:
    info = psutil.Process().memory_info()
    if sys.platform == "win32":
        return info.rss, info.peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return info.rss, max(info.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
