"""Memory and time of an architecture that is not the decoder's: T5, BART, GPT-2, BLOOM, Falcon and the rest.

Weights, constants, adapters, gradients and the optimizer are exact, as in `plan.memory`. Activations come from a run of
the architecture's own code without memory (`models.foreign_trace`), padded as `models.fallback` pads; what operators
need inside themselves is not in it. Where the code cannot be run so, they are an upper estimate from what goes in and
out of the linears, attention's scores and the logits. Either way the interval is wider (`CALIBRATION`), and says so.

    phases(shape, job)               bytes by phase and component, as `memory.phases`
    seconds(shape, job, rates)       seconds by phase, as `time.phases`
    training_flops(shape, job)       operations of all training steps

Units: bytes, seconds, operations (a multiply-add is two). 1 GB = 10⁹ bytes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch

from halfbyte.errors import UsageError
from halfbyte.models.foreign_spec import ForeignSpec
from halfbyte.models.spec import ModelSpec
from halfbyte.plan import memory, time
from halfbyte.plan.calibration import Calibration
from halfbyte.plan.hardware import Rates
from halfbyte.plan.memory import DTYPE_BYTES, Job

CALIBRATION = Calibration(
    memory_spread=0.3,
    time_spread=1.5,
    source="unmeasured: an architecture that transformers' own code runs, the interval is a guess",
)
IMPORTS = 60_000_000
"""Resident bytes of transformers' models and generation code beyond `memory.PROCESS_FLOOR`, which the decoder does not
import."""

HEAP = 400_000_000
"""What freed temporaries leave in the C library's heap beside the tensors that are alive, and what operators need
inside themselves: 0.16 to 0.56 GB in fresh processes (GPT-2 and T5 of 512 features, 2,048 tokens)."""
MODULE_SECONDS = 1e-4
"""Python and dispatch of one linear's neighbourhood, a pass (a guess)."""


@lru_cache(maxsize=256)
def _trace(config: str, layout: Any) -> Any:
    """`foreign_trace.trace`, once a layout; None where it cannot be known."""
    from halfbyte.models import foreign_trace

    try:
        return foreign_trace.trace(json.loads(config), layout)
    except foreign_trace.Unknown:
        return None


def micro_batch(
    shape: ForeignSpec, job: Job, rows: int | None = None, source_share: float | None = None
) -> tuple[int, int, int]:
    """(rows, tokens of the longest source or text, tokens of the longest answer) of the largest micro-batch, as padded.

    rows          documents at once; None: as many of the longest as its tokens are
    source_share  share of a document that is its source; None: not known, so either side may be as long as the whole
    """
    count = rows or max(1, math.ceil(job.micro_tokens / max(job.longest, 1)))
    if not shape.encoder_decoder:
        return count, job.longest, 0
    if source_share is None:
        return count, job.longest, job.longest
    source = min(job.longest, max(1, math.ceil(job.longest * source_share)))
    return count, source, max(1, job.longest - source)


def phases(
    shape: ForeignSpec, job: Job, rows: int | None = None, source_share: float | None = None
) -> dict[str, dict[str, int]]:
    """Bytes by phase and component; see `micro_batch` for the last two arguments. UsageError for method full."""
    if job.method == "full":
        raise UsageError("method full is built for the decoder's families only: use lora or qlora with this model")
    spec = _as_spec(shape)
    values, constants = base_bytes(shape, job)
    floor = memory.CUDA_CONTEXT if job.device == "cuda" else memory.runtime_bytes(spec, job) + IMPORTS
    held = {"runtime": floor, "base weights": values, "quantization constants": constants}
    held["adapters"] = memory.trainable_bytes(spec, job)
    batch = micro_batch(shape, job, rows, source_share)
    activations, loss = activation_bytes(shape, job, batch)
    train = {
        **held,
        "gradients": memory.standing_gradients(spec, job),
        "optimizer": memory.optimizer_bytes(spec, job),
        "activations": activations,
        "loss": loss,
        "workspace": workspace_bytes(shape, job, batch),
    }
    read = max(1, job.eval_batch_tokens // max(job.longest, 1)), *batch[1:]
    activations, loss = activation_bytes(shape, job, read, training=False)
    evaluate = {k: v for k, v in train.items() if k != "gradients"} | {"activations": activations, "loss": loss}
    return {
        "load": {**held, "adapters": 0, "loading": loading_bytes(shape, job)},
        "train": train,
        "evaluate": evaluate,
        "save": {**held, "optimizer": train["optimizer"], "saving": memory.trainable_bytes(spec, job)},
    }


def base_bytes(shape: ForeignSpec, job: Job) -> tuple[int, int]:
    """(values, constants) of the base as `fallback_load.Loader` holds it: linears in their format, else as computed."""
    values, constants = 0, 0
    for linear in shape.linears():
        own = job.held_bytes(f"{linear.name}.weight")
        if own is not None:
            values += own
            continue
        made = memory.weight_bytes(
            linear.parameters, job.format_of(linear.name), job.quant.blocksize, job.quant.double_quant
        )
        values, constants = values + made[0], constants + made[1]
    others = shape.total_parameters - shape.linear_parameters
    return values + others * DTYPE_BYTES[job.dtype], constants


def loading_bytes(shape: ForeignSpec, job: Job) -> int:
    """The largest tensor as the file has it, and as it is computed with."""
    largest = max(math.prod(size) for _, size in shape.tensors())
    return largest * (job.file_itemsize + DTYPE_BYTES[job.dtype])


def workspace_bytes(shape: ForeignSpec, job: Job, batch: tuple[int, int, int]) -> int:
    """Scratch between calls: packed tokens and panels of the native linears, else the largest weight decoded; the
    adapters' factors once more, as they are computed with; and the heap's holes."""
    size, linears = DTYPE_BYTES[job.dtype], shape.linears()
    factors = memory.trainable_bytes(_as_spec(shape), job) + (HEAP if job.device == "cpu" else 0)
    if job.native_linears:
        widest = max((linear.in_features for linear in linears), default=0)
        tokens = min(batch[0] * max(batch[1:]), 2048)
        return factors + tokens * widest * size + memory.THREAD_PANELS * torch.get_num_threads()
    return factors + max((linear.parameters for linear in linears if job.is_coded(linear.name)), default=0) * size


def activation_bytes(
    shape: ForeignSpec, job: Job, batch: tuple[int, int, int], training: bool = True
) -> tuple[int, int]:
    """(kept and at work for a micro-batch, the part of it that the loss takes)."""
    positions = batch[0] * (batch[2] or batch[1])
    chosen = max(1, math.ceil(positions * _supervised(shape, job)))
    # The logits, then of what is supervised their log-softmax in float32 and the gradient of that.
    loss = shape.vocab_size * (positions * DTYPE_BYTES[job.dtype] + chosen * 8)
    traced = traced_batch(shape, job, batch, training)
    peak = estimated_bytes(shape, job, batch, training) + loss if traced is None else traced.peak
    loss = min(loss, peak)
    return peak - loss, loss


def traced_batch(shape: ForeignSpec, job: Job, batch: tuple[int, int, int], training: bool = True) -> Any:
    """What one micro-batch keeps and computes (`foreign_trace.Traced`); None for code that needs values."""
    from halfbyte.models.foreign_trace import Layout

    adapted = {linear.name: job.lora.rank_of(linear.name) for linear in memory.targets(_as_spec(shape), job)}
    layout = Layout(
        rows=batch[0],
        longest=batch[1],
        answer=batch[2],
        dtype=getattr(torch, job.dtype),
        adapted=frozenset(adapted),
        rank=max(adapted.values(), default=1),
        checkpointing=job.checkpointing and training,
        training=training,
        supervised=_supervised(shape, job),
    )
    return _trace(json.dumps(dict(shape.config), sort_keys=True, default=str), layout)


def _supervised(shape: ForeignSpec, job: Job) -> float:
    """Share of the positions that the head sees: of an encoder-decoder all of the answer's are supervised."""
    return 1.0 if shape.encoder_decoder else job.supervised


def estimated_bytes(shape: ForeignSpec, job: Job, batch: tuple[int, int, int], training: bool = True) -> int:
    """An upper estimate without running the code: every linear's input and output, twice, and attention's scores."""
    size, tokens = DTYPE_BYTES[job.dtype], batch[0] * max(batch[1:])
    per_layer: dict[int, int] = {}
    for linear in shape.linears():
        width = 2 * (linear.in_features + linear.out_features)
        per_layer[linear.layer] = per_layer.get(linear.layer, 0) + width
    kept = max(per_layer.values(), default=0)
    if training and job.checkpointing:
        kept += shape.hidden_size * len(per_layer)
    elif training:
        kept = sum(per_layer.values())
    layers = len(per_layer) if training and not job.checkpointing else 1
    scores = 3 * batch[0] * _heads(shape.config) * max(batch[1:]) ** 2 * layers
    return (tokens * kept + scores) * size


def _heads(config: Mapping[str, Any]) -> int:
    names = ("num_attention_heads", "num_heads", "n_head", "decoder_attention_heads")
    return max((int(config.get(name) or 0) for name in names), default=0) or 32


@dataclass(frozen=True)
class Work:
    """What all training steps compute: operations by part, bytes of `traffic`, weights decoded, calls of linears."""

    linears: float
    products: float
    adapters: float
    traffic: float
    decoded: float
    calls: float


def training_work(shape: ForeignSpec, job: Job, rows: int | None = None, source_share: float | None = None) -> Work:
    """All training steps together: the largest micro-batch's work, as often as the run has its tokens."""
    batch = micro_batch(shape, job, rows, source_share)
    tokens = batch[0] * (job.longest if source_share is None else batch[1] + batch[2])
    often = job.train_tokens / max(tokens, 1)
    traced = traced_batch(shape, job, batch)
    adapters = memory.adapter_parameters(_as_spec(shape), job)
    decoded = sum(linear.parameters for linear in shape.linears() if job.is_coded(linear.name))
    passes = 2 + job.checkpointing
    if traced is None:
        linears = 2.0 * passes * shape.linear_parameters * job.train_tokens
        products = 4.0 * shape.head_parameters * job.train_tokens
        written = float(estimated_bytes(shape, job, batch)) * often
    else:
        linears, products, written = traced.linear * often, traced.other * often, traced.traffic * often
    return Work(
        linears=linears,
        products=products,
        adapters=2.0 * (1 + passes) * adapters * job.train_tokens,
        traffic=3.0 * written,  # written once, read about twice
        decoded=0.0 if job.native_linears else float(decoded) * passes * job.micro_batches,
        calls=float(len(shape.matrices)) * passes * job.micro_batches,
    )


def training_flops(shape: ForeignSpec, job: Job, rows: int | None = None, source_share: float | None = None) -> float:
    """Operations of all training steps together."""
    work = training_work(shape, job, rows, source_share)
    return work.linears + work.products + work.adapters


def seconds(
    shape: ForeignSpec, job: Job, rates: Rates, rows: int | None = None, source_share: float | None = None
) -> dict[str, float]:
    """Seconds by phase, as `time.phases`; evaluation costs a third of what training the same tokens would."""
    values, constants = base_bytes(shape, job)
    train = _seconds_of(training_work(shape, job, rows, source_share), job, rates)
    source = float(job.file_itemsize) * shape.total_parameters
    quantizing = shape.linear_parameters / rates.dequantize * 4 if job.method == "qlora" else 0.0
    spec = _as_spec(shape)
    return {
        "load": max(source, values + constants) / time.LOAD_BYTES_A_SECOND + quantizing,
        "train": train + time.optimizer_seconds(spec, job, rates) * job.steps,
        "evaluate": train / 3 * job.eval_tokens / max(job.train_tokens, 1),
        "save": time.SAVE_SECONDS + 4.0 * 4 * memory.trainable_parameters(spec, job) / time.SAVE_BYTES_A_SECOND,
    }


def _seconds_of(work: Work, job: Job, rates: Rates) -> float:
    """Linears at the engine's own rate where it runs them, the rest at torch's."""
    costs = time.costs_of(job)
    torch_rate = (rates.gemm.get(job.dtype) or rates.gemm["float32"]) * (1.0 if rates.engine else time.GEMM_EFFICIENCY)
    engine = rates.engine.get(job.dtype, {}) if job.native_linears else {}
    own = engine.get("quantized", torch_rate)
    return (
        work.linears / own * costs.linears
        + work.adapters / own * costs.adapters
        + work.products / torch_rate * time.TORCH.attention
        + work.traffic / rates.bandwidth
        + work.decoded / rates.dequantize
        + work.calls * MODULE_SECONDS
    )


def _as_spec(shape: ForeignSpec) -> ModelSpec:
    """For those functions of `plan.memory` that ask for linears, tensors and their counts, which both kinds have."""
    return cast(ModelSpec, shape)
