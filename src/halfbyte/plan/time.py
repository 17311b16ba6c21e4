"""How long a run takes: operations over measured rates, by phase.

A training token costs 2 operations a weight forward and 2 more for the gradient of the inputs; frozen weights need no
gradient of their own. Trained weights (full fine-tuning) cost 2 more, recomputed activations 2 more. What is not a
matrix product (norms, activations, attention's softmax) is bound by memory traffic, and a quantized weight is decoded
once a pass. The rates come from `plan.hardware.measure` on this machine.

Units: seconds, operations (a multiply-add is two), bytes.
"""

from dataclasses import dataclass

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


def attention_flops(spec: ModelSpec, tokens: int, length: float) -> float:
    """Operations of the scores and the weighted values, forward, of causal documents of `length` tokens."""
    width = spec.num_heads * spec.head_dim
    seen = (min(length / 2, window) if window else length / 2 for window in spec.windows)
    return sum(4.0 * tokens * width * keys for keys in seen)


def training_work(spec: ModelSpec, job: Job, length: float) -> Work:
    """All training steps together; `length` is the average document."""
    passes = 2 + (1 if job.method == "full" else 0) + (1 if job.checkpointing else 0)
    quantized = sum(x.parameters for x in spec.linears() if job.is_coded(x.name))
    tokens = job.train_tokens
    supervised = tokens * job.supervised
    adapters = adapter_parameters(spec, job) if job.method != "full" else 0
    # DoRA measures the rows of every adapted weight once an update: a product with the rows of A, 64 at least.
    measured = 0.0
    if job.method != "full" and job.lora.use_dora:
        measured = job.steps * sum(2.0 * x.parameters * max(64, job.lora.rank_of(x.name)) for x in targets(spec, job))
    return Work(
        linears=2.0 * passes * spec.linear_parameters * tokens + measured,
        head=2.0 * (2 + (job.method == "full")) * spec.head_parameters * supervised,
        attention=attention_flops(spec, tokens, length) * (3.5 + job.checkpointing),
        adapters=2.0 * 3 * adapters * tokens,
        traffic=TRAFFIC * (1.0 + 0.4 * job.checkpointing) * spec.num_layers * layer_tensors(spec, job) * tokens
        + 12.0 * spec.vocab_size * supervised,
        decoded=float(quantized) * (2 + job.checkpointing) * job.micro_batches,
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
    train = training_work(spec, job, length)
    scale = job.eval_tokens / max(job.train_tokens, 1)
    # Forward only: one of the two or more passes over the linears, and about a third of everything else.
    passes = 2 + (job.method == "full") + job.checkpointing
    forward = Work(
        linears=train.linears / passes * scale,
        head=train.head / (2 + (job.method == "full")) * scale,
        attention=train.attention / (3.5 + job.checkpointing) * scale,
        adapters=train.adapters / 3 * scale,
        traffic=train.traffic / 3 * scale,
        decoded=train.decoded / (2 + job.checkpointing) * scale,
    )
    writing = trainable_update_bytes(spec, job) * job.steps / rates.bandwidth
    return {
        "load": STARTUP_SECONDS + max(source, values + constants) / LOAD_BYTES_A_SECOND + quantizing,
        "train": seconds_of(train, job, rates) + writing,
        "evaluate": seconds_of(forward, job, rates),
        "save": (4.0 * spec.total_parameters if job.method == "full" else 1e7) / LOAD_BYTES_A_SECOND,
    }


def trainable_update_bytes(spec: ModelSpec, job: Job) -> float:
    """Memory that one optimizer step reads and writes: parameter, gradient and two moments, most of them twice."""
    count = trainable_parameters(spec, job)
    return count * (4.0 * 4 if job.optim.endswith("8bit") else 4.0 * 7)
