"""How long a run takes: operations over measured rates, by phase.

A training token costs 2 operations a weight forward and 2 more for the gradient of the inputs; frozen weights need no
gradient of their own. Trained weights (full fine-tuning) cost 2 more, recomputed activations 2 more. What is not a
matrix product (norms, activations, attention's softmax) is bound by memory traffic, and a quantized weight is decoded
once a pass. The rates come from `plan.hardware.measure` on this machine.

Units: seconds, operations (a multiply-add is two), bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.models.spec import ModelSpec
from halfbyte.plan.hardware import Rates
from halfbyte.plan.memory import Job, adapter_parameters, base_bytes, layer_tensors, targets, trainable_parameters

GEMM_EFFICIENCY = 0.55
"""Share of the measured rate that a step's products reach: their shapes are smaller than the one measured."""
TRAFFIC = 10.0
"""Times that a layer's activations cross the memory bus in forward and backward together, in units of what it makes."""
LOAD_BYTES_A_SECOND = 400e6
STARTUP_SECONDS = 2.0


@dataclass(frozen=True)
class Work:
    """What a run computes: `flops` by part, `traffic` in bytes, `decoded` weights."""

    linears: float
    head: float
    attention: float
    adapters: float
    traffic: float
    decoded: float


@dataclass(frozen=True)
class Counts:
    """What a number of micro-batches hold together; `squares` is the sum of the documents' squared lengths."""

    micro_batches: int
    tokens: int
    supervised: int
    squares: int


@dataclass(frozen=True)
class Probed:
    """One micro-batch whose forward and backward pass were timed on this machine; `counts.micro_batches` is 1."""

    counts: Counts
    seconds: float


def attention_flops(spec: ModelSpec, tokens: int, length: float) -> float:
    """Operations of the scores and the weighted values, forward, of causal documents of `length` tokens."""
    width = spec.num_heads * spec.head_dim
    seen = (min(length / 2, window) if window else length / 2 for window in spec.windows)
    return sum(4.0 * tokens * width * keys for keys in seen)


def counts_of(job: Job, length: float) -> Counts:
    """All training micro-batches of a job together, of documents of `length` tokens."""
    tokens = job.train_tokens
    return Counts(job.micro_batches, tokens, round(tokens * job.supervised), round(tokens * length))


def training_work(spec: ModelSpec, job: Job, counts: Counts) -> Work:
    """Forward and backward pass of some micro-batches, the optimizer's steps apart."""
    passes = 2 + (1 if job.method == "full" else 0) + (1 if job.checkpointing else 0)
    quantized = sum(x.parameters for x in spec.linears() if job.is_coded(x.name))
    tokens, supervised = counts.tokens, counts.supervised
    adapters = adapter_parameters(spec, job) if job.method != "full" else 0
    return Work(
        linears=2.0 * passes * spec.linear_parameters * tokens,
        head=2.0 * (2 + (job.method == "full")) * spec.head_parameters * supervised,
        attention=attention_flops(spec, tokens, counts.squares / max(tokens, 1)) * (3.5 + job.checkpointing),
        adapters=2.0 * 3 * adapters * tokens,
        traffic=TRAFFIC * (1.0 + 0.4 * job.checkpointing) * spec.num_layers * layer_tensors(spec, job) * tokens
        + 12.0 * spec.vocab_size * supervised,
        decoded=float(quantized) * (2 + job.checkpointing) * counts.micro_batches,
    )


def evaluation_work(spec: ModelSpec, job: Job, length: float) -> Work:
    """All evaluation passes: forward only, one of the passes over the linears and about a third of everything else."""
    tokens = job.eval_tokens
    batches = -(-tokens // max(job.micro_tokens, 1))
    counts = Counts(batches, tokens, round(tokens * job.supervised), round(tokens * length))
    train = training_work(spec, job, counts)
    return Work(
        linears=train.linears / (2 + (job.method == "full") + job.checkpointing),
        head=train.head / (2 + (job.method == "full")),
        attention=train.attention / (3.5 + job.checkpointing),
        adapters=train.adapters / 3,
        traffic=train.traffic / 3,
        decoded=train.decoded / (2 + job.checkpointing),
    )


def seconds_of(work: Work, job: Job, rates: Rates) -> float:
    gemm = rates.gemm.get(job.dtype) or rates.gemm["float32"]
    products = (work.linears + work.head + work.attention + work.adapters) / (gemm * GEMM_EFFICIENCY)
    # Quantized products dequantize first: half a byte read and D bytes written, then read by the product.
    decode = work.decoded / rates.dequantize if work.decoded else 0.0
    return products + work.traffic / rates.bandwidth + decode


def phases(spec: ModelSpec, job: Job, rates: Rates, length: float) -> dict[str, float]:
    """Seconds by phase. `load` includes quantizing; `evaluate` is every evaluation pass of the run."""
    values, constants = base_bytes(spec, job)
    source = 2.0 * spec.total_parameters
    # What the file has in blocks of its own, or beside them, is read as it is.
    linears = [x for x in spec.linears() if job.is_coded(x.name)]
    fresh = sum(x.parameters for x in linears if job.held_bytes(f"{x.name}.weight") is None)
    quantizing = fresh / rates.dequantize * 4 if job.method == "qlora" else 0.0
    train = training_work(spec, job, counts_of(job, length))
    return {
        "load": STARTUP_SECONDS + max(source, values + constants) / LOAD_BYTES_A_SECOND + quantizing,
        "train": seconds_of(train, job, rates) + optimizer_seconds(spec, job, rates) * job.steps,
        "evaluate": seconds_of(evaluation_work(spec, job, length), job, rates),
        "save": (4.0 * spec.total_parameters if job.method == "full" else 1e7) / LOAD_BYTES_A_SECOND,
    }


def optimizer_seconds(spec: ModelSpec, job: Job, rates: Rates) -> float:
    """One update beside its gradient: parameter, gradient and two moments, most of them read and written."""
    count = trainable_parameters(spec, job)
    seconds = count * (4.0 * 4 if job.optim.endswith("8bit") else 4.0 * 7) / rates.bandwidth
    if job.method != "full" and job.lora.use_dora:
        # DoRA measures the rows of every adapted weight once an update: a product with the rows of A, 64 at least.
        products = sum(2.0 * x.parameters * max(64, job.lora.rank_of(x.name)) for x in targets(spec, job))
        seconds += products / ((rates.gemm.get(job.dtype) or rates.gemm["float32"]) * GEMM_EFFICIENCY)
    return seconds


def corrected(
    spec: ModelSpec,
    job: Job,
    rates: Rates,
    seconds: Mapping[str, float],
    probes: Sequence[Probed],
    counts: Counts,
    update_seconds: float | None = None,
    evaluation: Probed | None = None,
) -> dict[str, float]:
    """`seconds` (by phase, as `phases` gave them) with training and evaluation as some timed micro-batches show them.

    A micro-batch takes `fixed + scale * predicted`: both are fitted to the probes, so that the sum over a run's
    micro-batches follows from their `counts`. Probes of one length give the scale alone.

    counts          all training micro-batches of the run
    update_seconds  one optimizer step, timed; None: as predicted
    evaluation      a timed forward pass over an evaluation batch; None: evaluation is scaled as training is
    """
    if not probes:
        return dict(seconds)
    predicted = [seconds_of(training_work(spec, job, p.counts), job, rates) for p in probes]
    fixed, scale = fit_line(predicted, [p.seconds for p in probes])
    whole = seconds_of(training_work(spec, job, counts), job, rates)
    update = optimizer_seconds(spec, job, rates) if update_seconds is None else update_seconds
    out = dict(seconds) | {"train": fixed * counts.micro_batches + scale * whole + update * job.steps}
    if evaluation is None:
        out["evaluate"] = seconds["evaluate"] * scale
    else:
        out["evaluate"] = evaluation.seconds * job.eval_tokens / max(evaluation.counts.tokens, 1)
    return out


def fit_line(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(fixed, scale) with `measured` near `fixed + scale * predicted` in relative terms; neither is negative.

    Each point counts by its relative error, so a short micro-batch weighs as much as a long one.
    """
    x = np.array(predicted, dtype=np.float64)
    y = np.array(measured, dtype=np.float64)
    ratio = float(np.median(y / x))
    if len(x) < 2 or x.max() < 1.2 * x.min():
        return 0.0, ratio
    rows = np.stack([1.0 / y, x / y], axis=1)
    (fixed, scale), *_ = np.linalg.lstsq(rows, np.ones(len(x)), rcond=None)
    if fixed < 0:
        return 0.0, ratio
    if scale <= 0:
        return float(np.median(y)), 0.0
    return float(fixed), float(scale)
