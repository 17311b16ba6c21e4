"""How long a run takes: operations over measured rates, by phase.

A training token costs 2 operations a weight forward and 2 more for the gradient of the inputs; frozen weights need no
gradient of their own. Trained weights (full fine-tuning) cost 2 more, recomputed activations 2 more. What is not a
product (norms, activations, the optimizer) is bound by memory traffic, and a layer costs some Python. The rates come
from `plan.hardware.measure` on this machine, halfbyte's own operators among them; `Costs` says how much longer than at
these rates each part of a step takes, fitted on `benchmarks/plan_accuracy.py`'s runs.

Units: seconds, operations (a multiply-add is two), bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.models.spec import ModelSpec
from halfbyte.plan import engine_rates
from halfbyte.plan.hardware import Rates
from halfbyte.plan.memory import (
    Job,
    adapter_parameters,
    base_bytes,
    layer_tensors,
    optimizer_state,
    targets,
    trainable_bytes,
    trainable_parameters,
)


@dataclass(frozen=True)
class Costs:
    """Seconds of a part over those that it would take at the measured rate; `layer` is seconds a layer and pass.

    Below 1 for products: a model's are larger than the ones that were measured.
    """

    linears: float
    adapters: float
    loss: float
    attention: float
    traffic: float
    layer: float
    update: float


NATIVE = Costs(linears=0.885, adapters=1.2, loss=1.1, attention=0.8, traffic=10.0, layer=2.5e-3, update=2.0)
"""With the native engine and frozen weights."""
TORCH = Costs(linears=0.73, adapters=1.0, loss=2.2, attention=0.8, traffic=20.0, layer=2.5e-3, update=4.5)
"""Where PyTorch multiplies on a processor: trained weights, or no engine."""
CUDA = Costs(linears=1.4, adapters=2.0, loss=2.0, attention=1.1, traffic=10.0, layer=1e-4, update=1.0)
"""On a GPU. Guesses: nothing was measured there."""
GEMM_EFFICIENCY = 0.55
"""Share of torch's measured rate that a step's products are taken to reach where the engine was not measured."""
FORWARD = 0.4
"""A forward pass beside a forward and a backward one, for what is not a product."""
LOAD_BYTES_A_SECOND = 3e9
"""Of a file that the system has in memory. One that must come from a disk first takes the disk's time instead."""
QUANTIZING = 20.0
"""Quantizing a weight takes so much longer than decoding it."""
SAVE_SECONDS, SAVE_BYTES_A_SECOND = 0.5, 1e9
"""The model card and the tokenizer's files; tensors with their checksums, to a disk that buffers them."""
MINUTES_A_CHECKPOINT = 15.0


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


@dataclass(frozen=True)
class Work:
    """What some micro-batches cost at the measured rates, in seconds by part; `layers` counts layers times passes."""

    linears: float
    adapters: float
    loss: float
    attention: float
    traffic: float
    layers: float

    def seconds(self, costs: Costs) -> float:
        return (
            self.linears * costs.linears
            + self.adapters * costs.adapters
            + self.loss * costs.loss
            + self.attention * costs.attention
            + self.traffic * costs.traffic
            + self.layers * costs.layer
        )


def costs_of(job: Job) -> Costs:
    if job.device != "cpu":
        return CUDA
    return NATIVE if job.native_linears else TORCH


def attention_flops(spec: ModelSpec, tokens: int, length: float) -> float:
    """Operations of the scores and the weighted values, forward, of causal documents of `length` tokens."""
    width = spec.num_heads * spec.head_dim
    seen = (min(length / 2, window) if window else length / 2 for window in spec.windows)
    return sum(4.0 * tokens * width * keys for keys in seen)


def counts_of(job: Job, length: float) -> Counts:
    """All training micro-batches of a job together, of documents of `length` tokens."""
    tokens = job.train_tokens
    return Counts(job.micro_batches, tokens, round(tokens * job.supervised), round(tokens * length))


def training_work(spec: ModelSpec, job: Job, counts: Counts, rates: Rates) -> Work:
    """Forward and backward pass of some micro-batches, the optimizer's steps apart."""
    full, again = job.method == "full", 1 if job.checkpointing else 0
    tokens, supervised = counts.tokens, counts.supervised
    gemm, own = _gemm(job, rates), _engine(job, rates)
    adapters = 0 if full else adapter_parameters(spec, job)
    linears = 2.0 * (2 + full + again) * spec.linear_parameters * tokens
    # Two forward passes of the low-rank products where they are recomputed, and four products backward.
    low_rank = 2.0 * (3 + again) * adapters * tokens
    attention = attention_flops(spec, tokens, counts.squares / max(tokens, 1)) * (3.5 + again)
    size = layer_tensors(spec, job) * spec.num_layers
    return Work(
        linears=linears / own.get("quantized", gemm) + _few(spec, job, counts, own) * (2 + again) / 2,
        adapters=low_rank / own.get("quantized", gemm),
        loss=2.0 * (2 + full) * spec.head_parameters * supervised / own.get("loss", gemm),
        attention=attention / rates.engine.get(job.dtype, {}).get("attention", gemm),
        traffic=(1.0 + FORWARD * again) * size * tokens / rates.bandwidth,
        layers=(2.0 + again) * spec.num_layers * counts.micro_batches,
    )


def _gemm(job: Job, rates: Rates) -> float:
    return (rates.gemm.get(job.dtype) or rates.gemm["float32"]) * (1.0 if rates.engine else GEMM_EFFICIENCY)


def _engine(job: Job, rates: Rates) -> Mapping[str, float]:
    """The rates of halfbyte's own linears and loss; empty where PyTorch runs them."""
    return rates.engine.get(job.dtype, {}) if job.native_linears else {}


def _few(spec: ModelSpec, job: Job, counts: Counts, own: Mapping[str, float]) -> float:
    """Seconds that reading the weights costs beside multiplying, forward and backward: from the rate at few tokens."""
    if not own or not job.native_linears:
        return 0.0
    tokens, few = engine_rates.TOKENS, engine_rates.FEW
    slow, fast = 4.0 * few / own["few"], 4.0 * tokens / own["quantized"]  # seconds for one weight
    fixed = max(0.0, (slow - fast * few / tokens) / (1 - few / tokens))
    return fixed * spec.linear_parameters * counts.micro_batches


def evaluation_seconds(spec: ModelSpec, job: Job, length: float, rates: Rates) -> float:
    """All evaluation passes: forward only, about half of the products and less of the rest."""
    tokens = job.eval_tokens
    batches = -(-tokens // max(job.micro_tokens, 1))
    counts = Counts(batches, tokens, round(tokens * job.supervised), round(tokens * length))
    work, full, again = training_work(spec, job, counts, rates), job.method == "full", 1 if job.checkpointing else 0
    forward = Work(
        linears=work.linears / (2 + full + again),
        adapters=work.adapters / (3 + again),
        loss=work.loss / 2,  # where the head is trained, the exponentials make up for the third product
        attention=work.attention / (3.5 + again),
        traffic=work.traffic * FORWARD / (1.0 + FORWARD * again),
        layers=work.layers / (2 + again),
    )
    return forward.seconds(costs_of(job))


def phases(spec: ModelSpec, job: Job, rates: Rates, length: float) -> dict[str, float]:
    """Seconds by phase. `load` includes quantizing; `evaluate` is every evaluation pass of the run."""
    values, constants = base_bytes(spec, job)
    source = 2.0 * spec.total_parameters
    # What the file has in blocks of its own, or beside them, is read as it is.
    linears = [x for x in spec.linears() if job.is_coded(x.name)]
    fresh = sum(x.parameters for x in linears if job.held_bytes(f"{x.name}.weight") is None)
    quantizing = fresh / rates.dequantize * QUANTIZING if job.method == "qlora" else 0.0
    train = training_work(spec, job, counts_of(job, length), rates).seconds(costs_of(job))
    train += optimizer_seconds(spec, job, rates) * job.steps
    kept, state = trainable_bytes(spec, job), optimizer_state(spec, job)
    checkpoints = 1 + int(train / (60 * MINUTES_A_CHECKPOINT))
    # Adapters are written twice into a checkpoint, as the run resumes from them and as PEFT reads them.
    written = checkpoints * (state + kept * (1 if job.method == "full" else 2)) + kept
    return {
        "load": max(source, values + constants) / LOAD_BYTES_A_SECOND + quantizing,
        "train": train,
        "evaluate": evaluation_seconds(spec, job, length, rates),
        "save": SAVE_SECONDS + written / SAVE_BYTES_A_SECOND,
    }


def optimizer_seconds(spec: ModelSpec, job: Job, rates: Rates) -> float:
    """One update beside its gradient: parameter, gradient and two moments, most of them read and written."""
    count = trainable_parameters(spec, job)
    seconds = count * (4.0 * 4 if job.optim.endswith("8bit") else 4.0 * 7) / rates.bandwidth * costs_of(job).update
    if job.method != "full" and job.lora.use_dora:
        # DoRA measures the rows of every adapted weight once an update: a product with the rows of A, 64 at least.
        products = sum(2.0 * x.parameters * max(64, job.lora.rank_of(x.name)) for x in targets(spec, job))
        seconds += products / _engine(job, rates).get("quantized", _gemm(job, rates)) * costs_of(job).linears
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
    costs = costs_of(job)
    predicted = [training_work(spec, job, p.counts, rates).seconds(costs) for p in probes]
    fixed, scale = fit_line(predicted, [p.seconds for p in probes])
    whole = training_work(spec, job, counts, rates).seconds(costs)
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
