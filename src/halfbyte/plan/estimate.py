"""One method on one machine: the layout it would run in, and what that takes, each figure with its interval.

A layout is the micro-batch, whether activations are recomputed, and how many tokens an evaluation reads at once. The
effective batch is the same in all of them, so they make the same update; the largest that fits is taken.

Units: bytes, seconds.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from halfbyte.adapters.options import LoraOptions
from halfbyte.models.foreign_spec import ForeignSpec
from halfbyte.models.spec import ModelSpec
from halfbyte.optim.options import OptimOptions
from halfbyte.plan import foreign, memory, time
from halfbyte.plan.calibration import Calibration, Interval, of
from halfbyte.plan.hardware import Rates
from halfbyte.plan.memory import Job
from halfbyte.plan.price import Price
from halfbyte.plan.rule import Offer
from halfbyte.quant.options import QuantOptions

MICRO_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Tokens of a micro-batch beyond which matrix products get no faster; memory may ask for fewer."""
Shape = ModelSpec | ForeignSpec
"""What the arithmetic knows of a model: the decoder's, or one that transformers' own code runs."""
Phases = dict[str, dict[str, int]]
"""Bytes by phase and component."""
LEAST_EVALUATION_TOKENS = 256
"""An evaluation's forward pass is not made smaller than this: its weights are decoded once a pass."""


@dataclass(frozen=True)
class DataShape:
    """What the rows are, in tokens; `spread` is the standard deviation of a row's length.

    `assumed` says that no data was given and these are stand-ins. `source_share`: of an encoder-decoder's rows, the
    share that the encoder reads; None: not known.
    """

    rows: int
    tokens: int
    longest: int
    supervised_share: float
    spread: float = 0.0
    eval_tokens: int = 0
    assumed: bool = False
    source_share: float | None = None

    @property
    def mean(self) -> float:
        return self.tokens / max(self.rows, 1)

    @property
    def supervised(self) -> int:
        """Supervised tokens of the distinct rows."""
        return round(self.tokens * self.supervised_share)

    def largest_micro_batch(self, rows_at_once: int, rows_per_update: int) -> int:
        """Tokens of the largest micro-batch to expect, of which no more than `rows_at_once` longest rows are possible.

        With packing it takes what an update has, which hardly ever exceeds its mean by three standard deviations.
        """
        update = rows_per_update * self.mean + 3 * self.spread * math.sqrt(rows_per_update)
        return math.ceil(max(self.longest, min(rows_at_once * self.longest, update)))

    def cut(self, length: int) -> "DataShape":
        """With rows of at most `length` tokens; the mean is an upper bound: which rows are longer is not known."""
        if length >= self.longest:
            return self
        share = min(1.0, length / max(self.mean, 1e-9))
        return replace(
            self,
            longest=length,
            tokens=max(self.rows, int(self.tokens * share)),
            spread=min(self.spread, length / 2),
            eval_tokens=int(self.eval_tokens * share),
        )


@dataclass(frozen=True)
class Request:
    """What a run asks for; what it leaves open is chosen here.

    method         auto, full, lora or qlora
    batches        (rows at once, accumulation) that are allowed, largest first
    checkpointing  None: only if memory asks for it
    evaluations    passes over the held-out rows, base against tuned at the end included
    forward_tokens further tokens that are only read: training rows that a preference run's reference is asked about
    held           bytes of the tensors that the model's file brings in blocks of its own
    file_itemsize  bytes of a value in the model's file
    updates        the optimizer's other options
    packing        rows of an update are laid end to end
    eval_tokens    tokens of rows in one forward pass of an evaluation; None: 4,096, fewer where memory asks for it
    checkpoints    that are kept beside the best one
    open_rank      the adapters' rank is left to the rule
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
    packing: bool = True
    eval_tokens: int | None = None
    checkpoints: int = 2
    open_rank: bool = False

    @property
    def own_blocks(self) -> bool:
        """Whether QLoRA would train on the file's own blocks."""
        return bool(self.held) and not self.quant.requantize

    def with_rank(self, rank: int) -> "Request":
        return replace(self, lora=self.lora.model_copy(update={"lora_r": rank}))


@dataclass(frozen=True)
class Candidate:
    """A method to estimate: its name for people (qdora), and what it asks for; `request.method` is full, lora or qlora.

    choosable   whether `auto` may take it: not what the rest of the config does not go with
    """

    name: str
    request: Request
    choosable: bool = True


@dataclass(frozen=True)
class Estimate:
    """One method on one machine: bytes by phase and component, seconds by phase, as the arithmetic gives them.

    `calibration` makes intervals of them. `merge` (bytes by component) and `disk` (bytes by part) stand beside the run:
    a merge is a command of its own, and the peak is the run's.
    """

    job: Job
    batch: tuple[int, int]
    memory: dict[str, dict[str, int]]
    seconds: dict[str, float]
    trainable: int
    name: str = ""
    packing: bool = True
    merge: dict[str, int] = field(default_factory=dict)
    disk: tuple[dict[str, int], dict[str, int]] = field(default_factory=lambda: ({}, {}))
    calibration: Calibration = field(default_factory=Calibration)
    price: Price | None = None
    probed: bool = False

    @property
    def method(self) -> str:
        """How the base is held: full, lora or qlora."""
        return self.job.method

    # -- memory ---------------------------------------------------------------------------------------------------

    @property
    def peak_phase(self) -> str:
        return max(self.memory, key=lambda phase: sum(self.memory[phase].values()))

    @property
    def peak_memory(self) -> Interval:
        return self.calibration.memory(sum(self.memory[self.peak_phase].values()))

    @property
    def peak(self) -> int:
        """Expected peak, p50."""
        return int(self.peak_memory.p50)

    @property
    def peak_p95(self) -> int:
        return int(self.peak_memory.p95)

    def of_phase(self, phase: str) -> Interval:
        """Bytes of a phase of the run, or of `merge`."""
        return self.calibration.memory(sum(self._parts(phase).values()))

    def of_component(self, phase: str, name: str) -> Interval:
        """Bytes of a component; what does not scale with anything is the process's."""
        whole = self.calibration.memory(self._parts(phase)[name])
        return whole if name == "runtime" else Interval(whole.p50, whole.p95 - self.calibration.memory_margin)

    def _parts(self, phase: str) -> dict[str, int]:
        return self.merge if phase == "merge" else self.memory[phase]

    @property
    def phases(self) -> list[str]:
        """In the order in which they happen."""
        return [*self.memory, *(["merge"] if self.merge else [])]

    # -- disk, time, money ----------------------------------------------------------------------------------------

    @property
    def disk_bytes(self) -> Interval:
        """Middle: the checkpoints that are kept. Upper end: beside them the best one and one that is being written."""
        middle, most = (sum(parts.values()) for parts in self.disk)
        return Interval(middle, most)

    @property
    def time(self) -> Interval:
        return self.calibration.seconds(sum(self.seconds.values()), self.probed)

    @property
    def total_seconds(self) -> float:
        """Expected, p50."""
        return self.time.p50

    @property
    def seconds_p95(self) -> float:
        return self.time.p95

    @property
    def cost(self) -> Interval | None:
        """In the price's currency; None without a price."""
        if self.price is None:
            return None
        return Interval(self.price.of(self.time.p50).amount, self.price.of(self.time.p95).amount)

    # -- as others see it -----------------------------------------------------------------------------------------

    @property
    def offer(self) -> Offer:
        """What the rule needs to know of it."""
        train = self.memory.get("train", {})
        weights = sum(train.get(part, 0) for part in ("base weights", "quantization constants"))
        return Offer(self.name, self.method, self.peak_memory, self.time, weights, self.job.checkpointing)

    @property
    def layout(self) -> str:
        """In words: rows at once times accumulation."""
        return f"{self.batch[0]} x {self.batch[1]} rows{', activations recomputed' if self.job.checkpointing else ''}"

    def as_dict(self) -> dict[str, Any]:
        seconds = {phase: self.calibration.seconds(value, self.probed) for phase, value in self.seconds.items()}
        adapters = self.method != "full"
        return {
            "method": self.method,
            "method_name": self.name or self.method,
            "trainable_parameters": self.trainable,
            "lora_r": self.job.lora.lora_r if adapters else None,
            "target_modules": self.job.lora.target_modules if adapters else None,
            "optim": self.job.optim,
            "per_device_train_batch_size": self.batch[0],
            "gradient_accumulation_steps": self.batch[1],
            "gradient_checkpointing": self.job.checkpointing,
            "packing": self.packing,
            "eval_batch_tokens": self.job.eval_batch_tokens,
            "steps": self.job.steps,
            "tokens": self.job.train_tokens,
            "peak_memory_bytes": self.peak_memory.as_dict(),
            "seconds": self.time.as_dict(3),
            "peak_phase": self.peak_phase,
            "memory_by_phase": {phase: self.of_phase(phase).as_dict() for phase in self.phases},
            "memory_by_component": {
                phase: {name: self.of_component(phase, name).as_dict() for name in self._parts(phase)}
                for phase in self.phases
            },
            "seconds_by_phase": {phase: value.as_dict(3) for phase, value in seconds.items()},
            "probed": self.probed,
            "disk_bytes": self.disk_bytes.as_dict(),
            "disk_by_part": {
                name: Interval(self.disk[0].get(name, 0), most).as_dict() for name, most in self.disk[1].items()
            },
            "cost": self._cost_as_dict(),
        }

    def _cost_as_dict(self) -> dict[str, Any] | None:
        if self.cost is None or self.price is None:
            return None
        return {"currency": self.price.currency, **self.cost.as_dict(4)}


def estimate(
    spec: Shape,
    candidate: Candidate,
    data: DataShape,
    rates: Rates,
    limit: int,
    calibration: Calibration | None = None,
    price: Price | None = None,
) -> Estimate:
    """One method in the largest layout whose P95 is within `limit`; where none is, in the one that needs least."""
    constants = calibration or of(candidate.request.device)
    best: tuple[float, Job, tuple[int, int], Phases] | None = None
    for batch, checkpointing in _layouts(candidate.request, data):
        for eval_tokens in _eval_tokens(candidate.request, data):
            job = _job(candidate.request, data, batch, checkpointing, eval_tokens)
            found = phases_of(spec, job, batch, data)
            sums = {phase: sum(parts.values()) for phase, parts in found.items()}
            peak = constants.memory(max(sums.values())).p95
            if best is None or peak < best[0]:
                best = (peak, job, batch, found)
            if peak <= limit or sums["evaluate"] < max(sums.values()):
                break  # reading fewer rows at once in an evaluation would change nothing
        if peak <= limit:
            break
    assert best is not None
    _, job, batch, found = best
    return _estimate_job(spec, candidate, job, batch, found, data, rates, constants, price)


def least_peak(spec: Shape, candidate: Candidate, data: DataShape, calibration: Calibration) -> float:
    """Peak (P95) in the smallest layout that the request allows."""
    *_, (batch, checkpointing) = _layouts(candidate.request, data)
    *_, eval_tokens = _eval_tokens(candidate.request, data)
    job = _job(candidate.request, data, batch, checkpointing, eval_tokens)
    return calibration.memory(max(sum(parts.values()) for parts in phases_of(spec, job, batch, data).values())).p95


def phases_of(spec: Shape, job: Job, batch: tuple[int, int], data: DataShape) -> Phases:
    """Bytes by phase and component, of either kind of model."""
    if isinstance(spec, ForeignSpec):
        return foreign.phases(spec, job, batch[0], data.source_share)
    return memory.phases(spec, job)


def _layouts(request: Request, data: DataShape) -> Iterator[tuple[tuple[int, int], bool]]:
    """Micro-batches from large to small, then again with recomputed activations, as far as these are left open."""
    target = MICRO_TOKENS[request.device]
    useful = [b for b in request.batches if b[0] * data.longest <= target] or [request.batches[-1]]
    modes = (False, True) if request.checkpointing is None else (request.checkpointing,)
    return ((batch, mode) for mode in modes for batch in useful)


def _eval_tokens(request: Request, data: DataShape) -> Iterator[int]:
    """Tokens of an evaluation's forward pass, from the default down; a row is never cut."""
    if request.eval_tokens is not None:
        yield request.eval_tokens
        return
    tokens = memory.EVALUATION_TOKENS
    while True:
        yield tokens
        if tokens // 2 < LEAST_EVALUATION_TOKENS or tokens <= data.longest:
            return
        tokens //= 2


def _estimate_job(
    spec: Shape,
    candidate: Candidate,
    job: Job,
    batch: tuple[int, int],
    found: Phases,
    data: DataShape,
    rates: Rates,
    calibration: Calibration,
    price: Price | None,
) -> Estimate:
    kept = candidate.request.checkpoints
    own = cast(ModelSpec, spec)  # for arithmetic that asks for linears and counts, which both kinds have
    # `disk_bytes` counts two checkpoints beside the kept ones.
    disk = (memory.disk_bytes(own, job, kept - 2), memory.disk_bytes(own, job, kept))
    if isinstance(spec, ForeignSpec):
        seconds, merge = foreign.seconds(spec, job, rates, batch[0], data.source_share), {}
    else:
        seconds = time.phases(spec, job, rates, data.mean)
        merge = memory.merge_phase(spec, job) if job.method != "full" else {}
    return Estimate(
        job,
        batch,
        found,
        seconds,
        memory.trainable_parameters(own, job),
        name=candidate.name,
        packing=candidate.request.packing,
        merge=merge,
        disk=disk,
        calibration=calibration,
        price=price,
    )


def _job(request: Request, data: DataShape, batch: tuple[int, int], checkpointing: bool, eval_tokens: int) -> Job:
    rows_per_update = batch[0] * batch[1]
    per_epoch = math.ceil(data.rows / rows_per_update)
    steps = request.max_steps or max(1, math.ceil(per_epoch * request.epochs - 1e-9))
    tokens = int(data.tokens * steps / per_epoch)
    micro_tokens = data.largest_micro_batch(batch[0], rows_per_update)
    return Job(
        method=request.method,
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
        eval_batch_tokens=eval_tokens,
        eval_pass_tokens=data.eval_tokens,
        device=request.device,
        held=request.held,
        file_itemsize=request.file_itemsize,
    )
