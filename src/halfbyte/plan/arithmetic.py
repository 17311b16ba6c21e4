"""Which arithmetic predicted: a digest of what the formulas say of a few fixed runs.

A machine's past runs correct its plans (`plan.history`) only as long as the same formulas predict. The digest is of
their results, not of their text: a comment changes nothing, and a constant counts wherever it stands. Three digits of
each figure are in it, so that what moves a prediction by less than a hundredth forgets nothing.
"""

import hashlib
import json
from functools import lru_cache

import torch

from halfbyte.adapters.options import LoraOptions
from halfbyte.models.spec import ModelSpec
from halfbyte.plan import memory, time
from halfbyte.plan.catalog import find_model
from halfbyte.plan.hardware import Rates
from halfbyte.plan.memory import Job
from halfbyte.quant.options import QuantOptions

MODELS = ("gemma-3-270m", "llama-3.2-1b")
"""Of the catalogue: tied and sandwiched norms, and neither."""
_ENGINE = {"quantized": 4e11, "few": 1e11, "dense": 4e11, "loss": 3e11, "attention": 1e11}
RATES = Rates("cpu", {"float32": 2e11, "bfloat16": 8e11}, 2e10, 1e9, {"float32": _ENGINE, "bfloat16": _ENGINE})
LENGTH = 300.0


def version() -> str:
    """Eight hex digits. The number of threads is a part of some formulas, and of the machine's key."""
    return _version(torch.get_num_threads())


@lru_cache(maxsize=4)
def _version(threads: int) -> str:
    found = []
    for name in MODELS:
        spec = ModelSpec.from_config(find_model(name))
        for job in _jobs():
            phases = {phase: sum(parts.values()) for phase, parts in memory.phases(spec, job).items()}
            figures = {**phases, **{f"{k} time": v for k, v in time.phases(spec, job, RATES, LENGTH).items()}}
            found.append({what: f"{figure:.3g}" for what, figure in sorted(figures.items())})
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:8]


def _jobs() -> tuple[Job, ...]:
    """Every way to hold a base; kept and recomputed activations; both kinds of device, both types."""

    def job(method: str, dtype: str = "bfloat16", **changes: object) -> Job:
        shape = {"micro_batches": 400, "steps": 100, "train_tokens": 600_000, "supervised": 0.5, "eval_tokens": 60_000}
        return Job(method, dtype, QuantOptions(), LoraOptions(), **(shape | changes))  # type: ignore[arg-type]

    return (
        job("qlora"),
        job("qlora", checkpointing=True),
        job("lora", "float32", optim="adamw_8bit"),
        job("full"),
        job("full", optim="paged_adamw"),
        job("lora", device="cuda"),
    )
