"""The process's memory as the operating system counts it."""

import sys
from pathlib import Path

import psutil


def process_memory() -> tuple[int, int]:
    """(resident bytes now, peak resident bytes) of this process.

    Linux: VmRSS and VmHWM of /proc/self/status. Elsewhere the resident set from psutil and the peak from getrusage
    (bytes on macOS) or, on Windows, from psutil.
    """
    fields = _status()
    if fields is None:
        return _portable_memory()
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def data_left() -> int | None:
    """Bytes that may still be mapped under the process's limit on its data; None without one (or off Linux).

    RLIMIT_DATA counts writable private memory whether it is used or not (VmData), so this says when a new mapping will
    be refused, and nothing of how much the heap still has inside.
    """
    fields = _status()
    if fields is None:
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    return max(0, limit - int(fields["VmData"].split()[0]) * 1024)


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
