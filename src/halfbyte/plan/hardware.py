"""What this machine is and can do: devices, memory, instruction sets, and how fast it multiplies and copies.

Facts come from the operating system, control groups included: a container with 8 GB on a 256 GB machine has 8 GB.
Rates are measured, never looked up in a table, because a cloud vCPU, a laptop on battery and a desktop of the same
model differ by factors. A measurement takes about two seconds and is kept in the user's cache, keyed by everything
that changes it.

Units: bytes, seconds, FLOP/s (a multiply-add counts as two), bytes a second.
"""

import contextlib
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from halfbyte import ops
from halfbyte.errors import HalfbyteError
from halfbyte.files import write_atomic
from halfbyte.ops import native
from halfbyte.plan import engine_rates

INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "asimd": "NEON",
    "bf16": "NEON BF16",
    "i8mm": "NEON I8MM",
    "sve": "SVE",
}
_MEASUREMENT_VERSION = 3


@dataclass(frozen=True)
class Gpu:
    """One CUDA device. `memory` and `free` in bytes."""

    index: int
    name: str
    memory: int
    free: int
    capability: str
    bf16: bool


@dataclass(frozen=True)
class Rates:
    """Measured on `device`: matrix products in FLOP/s by dtype, memory copy in bytes a second (read plus written),
    NF4 decoding in weights a second by the backend that is in use.

    engine   by dtype, halfbyte's own operators in FLOP/s (`plan.engine_rates`); empty where none of them runs
    """

    device: str
    gemm: dict[str, float]
    bandwidth: float
    dequantize: float
    engine: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Hardware:
    """The machine, as planning needs it. Memory figures are what this process may use, limits of containers applied."""

    system: str
    processor: str
    cores: int
    memory_total: int
    memory_available: int
    memory_limit: str
    instruction_sets: tuple[str, ...]
    gpus: tuple[Gpu, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where training runs by default: the first GPU, or the processor."""
        return "cuda" if self.gpus else "cpu"

    @property
    def usable(self) -> int:
        """Bytes that a run may plan with by default: 90 % of what is free now on the device it runs on."""
        free = self.gpus[0].free if self.gpus else self.memory_available
        return int(free * 0.9)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "device": self.device, "usable": self.usable}


def detect() -> Hardware:
    """Read the machine's facts; takes milliseconds and measures nothing."""
    memory = psutil.virtual_memory()
    total, available, limit = memory.total, memory.available, "physical memory"
    for path, maximum, used in _cgroup_memory():
        if maximum < total:
            total, limit = maximum, f"control group limit {path}"
        available = min(available, max(maximum - used, 0))
    return Hardware(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor_name(),
        cores=usable_cores(),
        memory_total=total,
        memory_available=available,
        memory_limit=limit,
        instruction_sets=_instruction_sets(),
        gpus=_gpus(),
        versions={"python": platform.python_version(), "torch": torch.__version__},
    )


def memory_available() -> int:
    """Bytes that are free now, limits of containers applied."""
    return min([psutil.virtual_memory().available, *(max(most - used, 0) for _, most, used in _cgroup_memory())])


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, and a control group's CPU quota rounded up."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    for folder in _cgroup_folders(root, "cpu"):
        quota = _cpu_quota(folder)
        if quota is not None:
            cores = min(cores, max(1, -(-quota[0] // quota[1])))
    return cores


def _cpu_quota(folder: Path) -> tuple[int, int] | None:
    """(microseconds allowed, period) of one control group, version 2 or 1; None where there is no limit."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    return None if quota in ("max", "-1") else (int(quota), int(period))


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's control group and its ancestors, innermost first, for version 2 and version 1 hierarchies."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    base = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = base / controller if controllers else base
        inner = mount / path.lstrip("/")
        # Inside a container the path may name a folder of the host that is not mounted here; the mount itself is ours.
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(mount) and folder.exists():
                folders.append(folder)
    return folders


def _cgroup_memory(root: Path = Path("/")) -> list[tuple[str, int, int]]:
    """(folder, limit, bytes in use that cannot be reclaimed) of every control group with a memory limit."""
    found = []
    for folder in _cgroup_folders(root, "memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                limit = (folder / limit_name).read_text().strip()
                used = int((folder / used_name).read_text())
                stat = (folder / "memory.stat").read_text().split()
            except OSError:
                continue
            # Version 1 writes "no limit" as a number near 2**63.
            if limit == "max" or int(limit) >= 1 << 60:
                continue
            cache = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
            found.append((str(folder / limit_name), int(limit), max(used - cache, 0)))
    return found


def _cpuinfo(root: Path = Path("/")) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo; empty on other systems."""
    try:
        text = (root / "proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _processor_name() -> str:
    info = _cpuinfo()
    return info.get("model name") or info.get("Model") or platform.processor() or platform.machine()


def _instruction_sets() -> tuple[str, ...]:
    info = _cpuinfo()
    flags = (info.get("flags") or info.get("Features") or "").split()
    return tuple(name for flag, name in INSTRUCTION_SETS.items() if flag in flags)


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        # Emulated bf16 (before Ampere) is slower than fp16 with loss scaling, so it does not count as having it.
        gpus.append(Gpu(index, properties.name, total, free, capability, bf16=properties.major >= 8))
    return tuple(gpus)


def _key_facts(hardware: Hardware) -> dict[str, Any]:
    return {
        "version": _MEASUREMENT_VERSION,
        "processor": hardware.processor,
        "cores": hardware.cores,
        "threads": torch.get_num_threads(),
        "gpu": hardware.gpus[0].name if hardware.gpus else None,
        "torch": torch.__version__,
        "backend": ops.backend().name,
    }


def machine_key(hardware: Hardware) -> str:
    """16 hex digits of everything that changes how fast this machine is: processor, cores, threads, GPU, torch version,
    backend. What was measured under another key says nothing here."""
    return hashlib.sha256(json.dumps(_key_facts(hardware), sort_keys=True).encode()).hexdigest()[:16]


FASTER_NOW = 1.3
"""A machine that is so much faster than when it was measured was busy then, or has cooled down."""


def measure(hardware: Hardware, cache: Path | None = None, refresh: bool = False) -> Rates:
    """What the default device can do: matrix products, its memory, halfbyte's own operators.

    About 3 s, then read from `cache`, where it is kept by `machine_key`. A measurement looks for the best of many, but
    beside other work there may be none: one product is timed at every reading (0.05 s), and where the machine is far
    faster than it was, everything is measured again and the better of both is kept. A damaged file is measured again.
    """
    key = _key_facts(hardware)
    path = (cache or cache_folder()) / f"rates-{machine_key(hardware)}.json"
    known: Rates | None = None
    if not refresh:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            saved = json.loads(path.read_text())
            gemm = {str(k): float(v) for k, v in saved["gemm"].items()}
            engine = {str(k): {str(n): float(r) for n, r in v.items()} for k, v in saved["engine"].items()}
            known = Rates(str(saved["device"]), gemm, float(saved["bandwidth"]), float(saved["dequantize"]), engine)
            if known.device != "cpu" or _gemm_rate(torch.float32, "cpu", budget=0.0) < FASTER_NOW * gemm["float32"]:
                return known
    rates = _measure(hardware)
    if known is not None:
        rates = better(rates, known)
    # A home that cannot be written costs three seconds the next time, not the run.
    with contextlib.suppress(HalfbyteError):
        write_atomic(path, json.dumps({"schema_version": 1, "key": key, **asdict(rates)}, indent=2) + "\n")
    return rates


def better(a: Rates, b: Rates) -> Rates:
    """The higher of two measurements of one machine, rate by rate."""
    return Rates(
        a.device,
        {k: max(v, b.gemm.get(k, 0.0)) for k, v in a.gemm.items()},
        max(a.bandwidth, b.bandwidth),
        max(a.dequantize, b.dequantize),
        {k: {n: max(r, b.engine.get(k, {}).get(n, 0.0)) for n, r in v.items()} for k, v in a.engine.items()},
    )


def reference_gemm(seconds: float = 0.3) -> float:
    """FLOP/s at this moment of one fixed product, 512 x 1,024 by 1,024 x 2,048 in float32 on the processor.

    The median over about `seconds` (at least five calls): how fast the machine is *now*, neighbours included, where
    `measure` looks for what it can do at best. Timed before and after something else, it tells whether a slow run was a
    slow machine.
    """
    m, k, n = 512, 1024, 2048
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)
    out = torch.empty(m, n)
    torch.mm(x, w, out=out)  # page faults and kernel choice
    taken: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(x, w, out=out)
        taken.append(time.perf_counter() - start)
    return 2.0 * m * k * n / statistics.median(taken)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/halfbyte`, or `~/.cache/halfbyte`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte"


def _measure(hardware: Hardware) -> Rates:
    device = hardware.device
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if hardware.gpus and not hardware.gpus[0].bf16:
        names = {"float32": torch.float32, "float16": torch.float16}
    gemm = {name: _gemm_rate(dtype, device) for name, dtype in names.items()}
    fastest = max(gemm, key=lambda name: gemm[name])
    engine = {
        name: engine_rates.measure(dtype)
        for name, dtype in names.items()
        if device == "cpu" and native.multiplies(dtype)
    }
    return Rates(device, gemm, _bandwidth(device), _decode_rate(names[fastest], device), engine)


def _gemm_rate(dtype: torch.dtype, device: str, budget: float = 0.4) -> float:
    """FLOP/s of a product shaped like a small model's training step: 1,024 tokens through a 1,024 → 4,096 linear."""
    m, k, n = (1024, 1024, 4096) if device == "cpu" else (4096, 4096, 4096)
    x = torch.randn(m, k, device=device).to(dtype)
    w = torch.randn(n, k, device=device).to(dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    seconds = _best_seconds(lambda: torch.mm(x, w.t(), out=out), device, budget)
    return 2.0 * m * k * n / seconds


def _bandwidth(device: str) -> float:
    """Bytes a second of a copy too large for any cache: what is read plus what is written."""
    source = torch.ones((1 << 26) if device == "cpu" else (1 << 29), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device)
    return 2.0 * source.numel() / seconds


def _decode_rate(dtype: torch.dtype, device: str) -> float:
    """NF4 weights decoded a second, by whatever backend `ops` has chosen."""
    rows, columns = 2048, 1024
    codes, absmax = ops.quantize_blockwise(torch.randn(rows, columns, device=device), "nf4", 64)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    seconds = _best_seconds(lambda: ops.dequantize_blockwise_out(codes, absmax, "nf4", 64, out), device)
    return rows * columns / seconds


def _best_seconds(call: Callable[[], object], device: str, budget: float = 0.4) -> float:
    """The fastest of several calls (three at least) within `budget` seconds."""

    def synchronized() -> None:
        call()
        torch.cuda.synchronize()

    return engine_rates.best_seconds(call if device == "cpu" else synchronized, budget)
