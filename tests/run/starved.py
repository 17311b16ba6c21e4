"""Whole runs for processes of their own, with as much memory as a test allows; little is imported here for that."""

from pathlib import Path
from typing import Any

from halfbyte.errors import DoesNotFit
from halfbyte.plan import hardware
from halfbyte.plan.hardware import Rates
from halfbyte.run.config import load_config
from halfbyte.run.run import run
from tests.limits import data_bytes, limit_data

RATES = Rates("cpu", {"float32": 2e11, "bfloat16": 8e11}, 2e10, 1e9)


def status() -> dict[str, int]:
    """Bytes that the system counts for this process, by the names of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    return {key: int(fields[key][0]) * 1024 for key in ("VmHWM", "VmRSS", "RssAnon", "RssFile", "VmData")}


def within(nbytes: int, config: dict[str, Any]) -> dict[str, Any]:
    """Run under RLIMIT_DATA, such that the resident set cannot exceed `nbytes`.

    The limit counts private writable memory, used or not: what is mapped of files (`RssFile`: torch's code) is in the
    resident set and not in it, and what was reserved and never touched (stacks, heaps' ends) the other way round.
    """
    now = status()
    limit_data(nbytes - now["RssFile"] + (now["VmData"] - now["RssAnon"]))
    return outcome(config)


def cut_off(room: int, at: str, config: dict[str, Any]) -> dict[str, Any]:
    """Run, and from the first event `at` on with `room` bytes beside what is then held."""
    begun: list[str] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == at and not begun:
            begun.append(at)
            limit_data(data_bytes() + room)

    return outcome(config, listen)


def outcome(config: dict[str, Any], listen: Any = lambda event: None) -> dict[str, Any]:
    hardware._measure = lambda machine: RATES
    try:
        made = run(load_config(**config), listen)
        return {"result": made.result, "status": status()}
    except DoesNotFit as error:
        return {"error": str(error), "code": error.exit_code, "status": status()}
