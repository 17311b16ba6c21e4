"""What a benchmark was run on: processor, instruction sets, cores, memory, versions, the state of this checkout."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate")
_ASK = (
    "import json, sys; from importlib.metadata import version, PackageNotFoundError\n"
    "def ask(name):\n"
    "    try: return version(name)\n"
    "    except PackageNotFoundError: return None\n"
    "print(json.dumps({name: ask(name) for name in sys.argv[1:]}))"
)


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _memory() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def versions(python: str) -> dict[str, str]:
    """Versions of the packages that an environment has."""
    done = subprocess.run([python, "-c", _ASK, *PACKAGES], capture_output=True, text=True, check=True)
    return {name: version for name, version in json.loads(done.stdout).items() if version}


def describe(threads: int, peers_python: str | None) -> dict[str, Any]:
    """A plain dictionary, the same at every call on one machine. Without peers their versions are None."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    family = ", ".join(f"{name} {info[name]}" for name in ("cpu family", "model", "stepping") if name in info)
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cpu_family": family,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": cores(),
        "threads": threads,
        "memory_bytes": _memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(sys.executable),
        "peer_versions": versions(peers_python) if peers_python else None,
    }


def revision() -> str | None:
    """This checkout's commit, with a + where files differ from it; None outside one."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty=+",
        "--abbrev=10",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
