"""What `halfbyte doctor` says: the machine, its measured rates, the backend in use and why, the optional packages."""

import importlib.metadata
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from halfbyte import ops
from halfbyte.models.dtype import fast_dtype
from halfbyte.plan.hardware import cache_folder, detect, measure

PACKAGES = ("torch", "transformers", "safetensors", "huggingface_hub", "pydantic", "gguf", "tokenizers")
EXTRAS = {
    "bitsandbytes": "4-bit kernels on NVIDIA",
    "pyarrow": "Parquet files",
    "datasets": "data sets of the Hub",
    "peft": "PEFT's own loader",
    "llama-cpp-python": "exports compared in llama.cpp",
    "tensorboard": "--report-to tensorboard",
    "wandb": "--report-to wandb",
    "mlflow-skinny": "--report-to mlflow",
    "trackio": "--report-to trackio",
}
SCHEMA_VERSION = 1


def diagnose(refresh: bool = False) -> dict[str, Any]:
    """Facts about this machine as plain data; measures for about two seconds unless the cache has it."""
    hardware = detect()
    rates = measure(hardware, refresh=refresh)
    backend = ops.backend()
    dtype, reason = auto_dtype(hardware.device)
    disk = shutil.disk_usage(Path.cwd())
    return {
        "schema_version": SCHEMA_VERSION,
        "halfbyte": _version("halfbyte"),
        "hardware": hardware.as_dict(),
        "threads": torch.get_num_threads(),
        "disk_free_bytes": disk.free,
        "rates": asdict(rates),
        "dtype": {"name": str(dtype).removeprefix("torch."), "reason": reason},
        "backend": {"name": backend.name, "reason": backend.reason},
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": {name: {"version": _version(name), "for": use} for name, use in EXTRAS.items()},
        "cache": str(cache_folder()),
        "warnings": _warnings(hardware.memory_available, disk.free, backend.name),
    }


def auto_dtype(device: str) -> tuple[torch.dtype, str]:
    """What `dtype: auto` computes in on this device, and why; as `models.load` decides it."""
    if device == "cpu":
        return fast_dtype()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bfloat16: this GPU has it"
    return torch.float16, "float16 with loss scaling: this GPU has no bfloat16"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _warnings(memory: int, disk: int, backend: str) -> list[str]:
    found = []
    if memory < 2_000_000_000:
        found.append(f"only {memory / 1e9:.1f} GB of memory is free: even a small model wants 2 GB")
    if disk < 5_000_000_000:
        found.append(f"only {disk / 1e9:.1f} GB of disk is free here: checkpoints and merged models need room")
    if backend == "reference":
        found.append("the native kernels are not in use: training works, but slower")
    return found
