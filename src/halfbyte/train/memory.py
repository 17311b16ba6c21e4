"""The process's memory as the operating system counts it."""

import sys
from pathlib import Path

import psutil


def process_memory() -> tuple[int, int]:
    """(resident bytes now, peak resident bytes) of this process.

    Linux: VmRSS and VmHWM of /proc/self/status. Elsewhere the resident set from psutil and the peak from getrusage
    (bytes on macOS) or, on Windows, from psutil.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _portable_memory()
    fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def _portable_memory() -> tuple[int, int]:
    info = psutil.Process().memory_info()
    if sys.platform == "win32":
        return info.rss, info.peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return info.rss, max(info.rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
