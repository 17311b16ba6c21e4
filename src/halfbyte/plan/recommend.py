"""Which method to use, and why: every method's memory and time on this machine, and one rule that a person can check.

The rule of `method: auto`, in order:

1. A method fits if its p95 peak is within the budget. If none fits, the answer is DoesNotFit, with the smallest.
2. Full fine-tuning is never chosen for you: it writes a whole model for every task and forgets more of the old one
   ("LoRA learns less and forgets less", arXiv 2405.09673). Ask for it with `--method full`.
3. On a processor: QLoRA. The memory is shared with everything else that the machine does, a quantized step costs
   about the same time, and the published comparisons find no difference in quality (QLoRA, arXiv 2305.14314, table 4).
4. On a GPU: LoRA if its p95 is within 80 % of the budget, since there the 16-bit step is the faster one; else QLoRA.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from halfbyte.adapters.lora import LoraOptions
from halfbyte.errors import DoesNotFit
from halfbyte.models.spec import ModelSpec
from halfbyte.optim.options import OptimOptions
from halfbyte.plan import memory, time
from halfbyte.plan.hardware import Hardware, Rates
from halfbyte.plan.memory import Job
from halfbyte.quant.options import QuantOptions

SCHEMA_VERSION = 1
METHODS = ("qlora", "lora", "full")
MICRO_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Tokens of a micro-batch beyond which matrix products get no faster; memory may ask for fewer."""
MEMORY_P95, MEMORY_MARGIN = 1.15, 150_000_000
"""p95 = 1.15 times the estimate plus 0.15 GB: allocator slack and library versions; to be calibrated on past runs."""
TIME_P95 = 1.6
"""p95 = 1.6 times the estimate: other work on the machine, and thermal limits."""


@dataclass(frozen=True)
class DataShape:
    """What the rows are, in tokens; `spread` is the standard deviation of a row's length.

    `assumed` says that no data was given and these are stand-ins.
    """

    rows: int
    tokens: int
    longest: int
    supervised_share: float
    spread: float = 0.0
    eval_tokens: int = 0
    assumed: bool = False

    @property
    def mean(self) -> float:
        return self.tokens / max(self.rows, 1)

    def largest_micro_batch(self, rows_at_once: int, rows_per_update: int) -> int:
        """Tokens of the largest micro-batch to expect, of which no more than `rows_at_once` longest rows are possible.

        With packing it takes what an update has, which hardly ever exceeds its mean by three standard deviations.
        """
        update = rows_per_update * self.mean + 3 * self.spread * math.sqrt(rows_per_update)
        return math.ceil(max(self.longest, min(rows_at_once * self.longest, update)))


@dataclass(frozen=True)
class Request:
    """What a run asks for; what it leaves open is chosen here.

    method         auto, or one of METHODS
    batches        (rows at once, accumulation) that are allowed, largest first
    checkpointing  None: only if memory asks for it
    evaluations    passes over the held-out rows, base against tuned at the end included
    forward_tokens further tokens that are only read: training rows that a preference run's reference is asked about
    held           bytes of the tensors that the model's file brings in blocks of its own
    file_itemsize  bytes of a value in the model's file
    updates        the optimizer's other options
    """

    method: str
    dtype: str
    device: str
    quant: QuantOptions
    lora: LoraOptions
    optim: str
    batches: tuple[tuple[int, int], ...]
    checkpointing: bool | None
    epochs: float
    max_steps: int | None
    evaluations: int = 1
    forward_tokens: int = 0
    held: Mapping[str, int] = field(default_factory=dict)
    file_itemsize: int = 4
    updates: OptimOptions = field(default_factory=OptimOptions)


@dataclass(frozen=True)
class Estimate:
    """One method on one machine: bytes by phase and component, seconds by phase."""

    job: Job
    batch: tuple[int, int]
    memory: dict[str, dict[str, int]]
    seconds: dict[str, float]
    trainable: int

    @property
    def method(self) -> str:
        return self.job.method

    @property
    def peak_phase(self) -> str:
        return max(self.memory, key=lambda phase: sum(self.memory[phase].values()))

    @property
    def peak(self) -> int:
        """Expected peak, p50."""
        return sum(self.memory[self.peak_phase].values())

    @property
    def peak_p95(self) -> int:
        return int(self.peak * MEMORY_P95) + MEMORY_MARGIN

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def seconds_p95(self) -> float:
        return self.total_seconds * TIME_P95

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "trainable_parameters": self.trainable,
            "per_device_train_batch_size": self.batch[0],
            "gradient_accumulation_steps": self.batch[1],
            "gradient_checkpointing": self.job.checkpointing,
            "steps": self.job.steps,
            "tokens": self.job.train_tokens,
            "peak_memory_bytes": {"p50": self.peak, "p95": self.peak_p95},
            "seconds": {"p50": round(self.total_seconds, 1), "p95": round(self.seconds_p95, 1)},
            "peak_phase": self.peak_phase,
            "memory_by_phase": {phase: sum(parts.values()) for phase, parts in self.memory.items()},
            "memory_by_component": self.memory,
            "seconds_by_phase": {phase: round(value, 1) for phase, value in self.seconds.items()},
        }


@dataclass(frozen=True)
class Plan:
    """Every method's estimate, which fit, the chosen one and the reason. `as_dict()` is plan.json."""

    estimates: tuple[Estimate, ...]
    budget: int
    budget_reason: str
    method: str
    reason: str
    data: DataShape
    hardware: dict[str, Any]
    rates: dict[str, Any]

    @property
    def chosen(self) -> Estimate:
        return next(e for e in self.estimates if e.method == self.method)

    def fits(self, estimate: Estimate) -> bool:
        return estimate.peak_p95 <= self.budget

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            **self.chosen.as_dict(),
            "reason": self.reason,
            "budget_bytes": self.budget,
            "budget_reason": self.budget_reason,
            "methods": [{**e.as_dict(), "fits": self.fits(e)} for e in self.estimates],
            "data": asdict(self.data),
            "hardware": self.hardware,
            "rates": self.rates,
        }


def estimate(spec: ModelSpec, request: Request, method: str, data: DataShape, rates: Rates, limit: int) -> Estimate:
    """Memory and time of one method, laid out in the largest micro-batch that fits `limit` (else the smallest)."""
    made: Estimate | None = None
    for batch, checkpointing in _layouts(request, data):
        job = _job(request, method, data, batch, checkpointing)
        made = Estimate(
            job,
            batch,
            memory.phases(spec, job),
            time.phases(spec, job, rates, data.mean),
            memory.trainable_parameters(spec, job),
        )
        if made.peak_p95 <= limit:
            return made
    assert made is not None
    return made


def _layouts(request: Request, data: DataShape) -> list[tuple[tuple[int, int], bool]]:
    """Micro-batches from large to small, then again with recomputed activations, as far as these are left open."""
    target = MICRO_TOKENS[request.device]
    useful = [b for b in request.batches if b[0] * data.longest <= target] or [request.batches[-1]]
    modes = (False, True) if request.checkpointing is None else (request.checkpointing,)
    return [(batch, mode) for mode in modes for batch in useful]


def _job(request: Request, method: str, data: DataShape, batch: tuple[int, int], checkpointing: bool) -> Job:
    rows_per_update = batch[0] * batch[1]
    per_epoch = math.ceil(data.rows / rows_per_update)
    steps = request.max_steps or max(1, math.ceil(per_epoch * request.epochs - 1e-9))
    tokens = int(data.tokens * steps / per_epoch)
    micro_tokens = data.largest_micro_batch(batch[0], rows_per_update)
    return Job(
        method=method,
        dtype=request.dtype,
        quant=request.quant,
        lora=request.lora,
        optim=request.optim,
        updates=request.updates,
        checkpointing=checkpointing,
        micro_tokens=micro_tokens,
        longest=data.longest,
        micro_batches=max(steps, math.ceil(tokens / (0.8 * micro_tokens))),
        steps=steps,
        train_tokens=tokens,
        supervised=data.supervised_share,
        eval_tokens=data.eval_tokens * request.evaluations + request.forward_tokens,
        device=request.device,
        held=request.held,
        file_itemsize=request.file_itemsize,
    )


def make_plan(
    spec: ModelSpec, request: Request, data: DataShape, hardware: Hardware, rates: Rates, budget: int | None
) -> Plan:
    """Estimate every method and choose one; `request.method` of `auto` leaves the choice to the rule above.

    DoesNotFit if under `auto` no method is within the budget at p95 (see `check_fits` for a method that was asked for).
    """
    limit = hardware.usable if budget is None else budget
    where = "GPU memory" if hardware.gpus else "memory"
    why = f"90 % of the {where} that is free now" if budget is None else "--memory"
    estimates = tuple(estimate(spec, request, method, data, rates, limit) for method in METHODS)
    method, reason = _choose(estimates, request.method, limit, why, on_gpu=request.device == "cuda")
    return Plan(estimates, limit, why, method, reason, data, hardware.as_dict(), asdict(rates))


def _choose(estimates: Sequence[Estimate], asked: str, budget: int, why: str, on_gpu: bool) -> tuple[str, str]:
    by_name = {e.method: e for e in estimates}
    if asked != "auto":
        return asked, "asked for"
    fitting = [e.method for e in estimates if e.peak_p95 <= budget and e.method != "full"]
    qlora, lora = by_name["qlora"], by_name["lora"]
    if not fitting:
        smallest = min((qlora, lora), key=lambda e: e.peak_p95)
        raise DoesNotFit(too_big(smallest, budget, why))
    if on_gpu and "lora" in fitting and lora.peak_p95 <= 0.8 * budget:
        return "lora", f"its 16-bit base fits with room to spare ({_gb(lora.peak_p95)} of {_gb(budget)}) and is faster"
    if "qlora" not in fitting:
        return "lora", f"it needs the least memory here ({_gb(lora.peak_p95)})"
    if "lora" not in fitting:
        return "qlora", f"it fits in {_gb(budget)}, which LoRA on a 16-bit base ({_gb(lora.peak_p95)}) does not"
    return "qlora", _saving(qlora, lora)


def _saving(qlora: Estimate, lora: Estimate) -> str:
    slower = qlora.total_seconds / max(lora.total_seconds, 1e-9) - 1
    pace = "no slower" if slower < 0.03 else f"{slower:.0%} slower"
    weights = [sum(e.memory["train"][k] for k in ("base weights", "quantization constants")) for e in (qlora, lora)]
    return (
        f"its base takes {_gb(weights[0])} instead of LoRA's {_gb(weights[1])}, it is expected to be {pace}, "
        "and published comparisons find the same quality"
    )


def check_fits(plan: Plan) -> None:
    """DoesNotFit if the plan's method is over its budget at p95."""
    if not plan.fits(plan.chosen):
        raise DoesNotFit(too_big(plan.chosen, plan.budget, plan.budget_reason, plan))


def too_big(e: Estimate, budget: int, why: str, plan: Plan | None = None) -> str:
    """One line: what does not fit, by how much, and the nearest thing that would."""
    smaller = [o for o in plan.estimates if plan.fits(o)] if plan is not None else []
    if smaller:
        best = min(smaller, key=lambda o: o.peak_p95)
        advice = f"--method {best.method} fits ({_gb(best.peak_p95)})"
    else:
        parts = e.memory[e.peak_phase]
        largest = max(parts, key=lambda name: parts[name])
        tips = {
            "activations": "try a smaller --max-seq-length or --per-device-train-batch-size",
            "optimizer": "try --optim adamw_8bit, or paged_adamw, which keeps it on the disk",
            "gradients": "try --optim paged_adamw, which keeps them on the disk",
            "runtime": "that is Python, torch and the tokenizer, which every run needs",
        }
        advice = f"most of it is {largest} ({_gb(parts[largest])}): {tips.get(largest, 'try a smaller model')}"
    return (
        f"{e.method} needs {_gb(e.peak)} (up to {_gb(e.peak_p95)}) while it does phase '{e.peak_phase}', "
        f"and the budget is {_gb(budget)} ({why}): {advice}"
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
