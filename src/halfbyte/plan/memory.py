"""Peak memory of a run, by phase and component: arithmetic on shapes, before any weight is read.

Every figure here follows from what the other packages hold, so each formula names the place that makes it true.
Phases are what happens one after the other (load, train, evaluate, save); the peak is the largest phase.

Units: bytes; 1 GB = 10⁹ bytes. Shape letters as elsewhere: T tokens of a micro-batch, D bytes of the compute dtype.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from halfbyte.adapters.lora import LoraOptions, target_names
from halfbyte.linear.cross_entropy import PANEL_BYTES, chunk_rows
from halfbyte.models.spec import LinearSpec, ModelSpec
from halfbyte.ops.loss import WORKSPACE_BYTES
from halfbyte.optim.galore import Projection
from halfbyte.optim.options import OptimOptions
from halfbyte.optim.paged import PAGE_ELEMENTS
from halfbyte.quant.options import QuantOptions

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_DENSE_FORMATS = {"bf16": 2, "fp16": 2, "fp32": 4}
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
NESTED_BLOCKSIZE = 256

PROCESS_FLOOR = 428_000_000
"""A process that has imported what a run needs, 0.35 GB, and what loading leaves in its heap: resident set, with torch
2.13 on Linux, the middle of runs on five models (`benchmarks/plan_accuracy.py`)."""
TOKENIZER_BYTES_A_WORD = 210
"""A fast tokenizer's resident size per vocabulary entry, once the garbage of making it is given back
(`heap.give_back`)."""
TORCH_PRODUCTS = 90_000_000
"""What PyTorch's own matrix products on a CPU leave: compiled kernels, buffers of their threads."""
EVALUATION_TOKENS = 4096
"""Tokens of rows in one forward pass of an evaluation (`evaluate.EvaluateOptions.eval_batch_tokens`), by default."""
CUDA_CONTEXT = 500_000_000
"""What a CUDA context takes of the card, beside torch's allocations."""
SAVED_PIECE = 64_000_000
"""Tensors in flight while a checkpoint is written and its checksums are made."""
MERGED_PIECES = 64_000_000
"""Rows in float32 and in the merged type at once (`export.merged_tensors`)."""
TOKENIZER_FILES = 40_000_000
"""A large vocabulary's tokenizer files on the disk."""
THREAD_PANELS = 2_000_000
"""Panels of weights and sums that the native engine keeps for each thread (`csrc/engine/linear.inc`, `loss.inc`)."""


@dataclass(frozen=True)
class Job:
    """What decides memory and time of one run, beside the model's shape.

    micro_tokens    tokens of the largest micro-batch (rows of a batch times the longest row)
    longest         tokens of the longest document
    train_tokens    all tokens that go through forward and backward, epochs included
    supervised      share of them that is supervised
    eval_tokens     tokens of all evaluation passes together, forward only
    eval_batch_tokens   tokens of rows in one forward pass of an evaluation; a longer row is alone in its pass
    eval_pass_tokens    tokens of all held-out rows
    file_itemsize   bytes of a value in the model's file
    updates         the optimizer's options beside its name
    held            tensors that the model's file brings in blocks of its own (`ModelSource.prequantized_bytes`)
    """

    method: str
    dtype: str
    quant: QuantOptions
    lora: LoraOptions
    optim: str = "adamw"
    checkpointing: bool = False
    micro_tokens: int = 2048
    longest: int = 2048
    micro_batches: int = 1
    steps: int = 1
    train_tokens: int = 2048
    supervised: float = 1.0
    eval_tokens: int = 0
    eval_batch_tokens: int = EVALUATION_TOKENS
    eval_pass_tokens: int = EVALUATION_TOKENS
    device: str = "cpu"
    held: Mapping[str, int] = field(default_factory=dict)
    file_itemsize: int = 4
    updates: OptimOptions = field(default_factory=OptimOptions)

    @property
    def dense_bytes(self) -> int:
        """Bytes of a value in an unquantized matrix: 16-bit ones stay so where the engine reads them."""
        own = DTYPE_BYTES[self.dtype]
        return min(own, self.file_itemsize) if self.native_linears else own

    def held_bytes(self, name: str) -> int | None:
        """Bytes of a tensor that stays in its file's own blocks; None for one that does not."""
        if name not in (_EMBEDDING, _HEAD) and self.quant.format_of(name.removesuffix(".weight")) in _DENSE_FORMATS:
            return None
        return self.held.get(name) if self.keeps_file else None

    @property
    def keeps_file(self) -> bool:
        """Whether a quantized file's linears stay as they are: its blocks, and those that it left unquantized."""
        return bool(self.held) and self.method == "qlora" and not self.quant.requantize

    def format_of(self, name: str) -> str:
        """The storage of one linear that is not in its file's own blocks: a block format, or a dtype."""
        if self.method != "qlora":
            return self.dtype
        chosen = self.quant.format_of(name)
        return self.dtype if self.keeps_file and chosen not in _DENSE_FORMATS else chosen

    def is_coded(self, name: str) -> bool:
        """Whether this linear's weight must be decoded or converted before each product."""
        if self.held_bytes(f"{name}.weight") is not None:
            return True
        form = self.format_of(name)
        return form != self.dtype and {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(form) != self.dtype

    @property
    def native(self) -> bool:
        """Whether the native engine runs attention and what is elementwise; every CPU is taken to have it."""
        return self.device == "cpu" and self.dtype in ("bfloat16", "float32")

    @property
    def native_linears(self) -> bool:
        """Whether it runs the linears and the loss too: their weights must be frozen."""
        return self.native and self.method != "full"


def targets(spec: ModelSpec, job: Job) -> list[LinearSpec]:
    """The linears that get an adapter: none that is trained whole.

    UsageError if `target_modules` names one that the model has not.
    """
    if job.method == "full":
        return []
    linears = spec.linears()
    names = set(target_names([linear.name for linear in linears], job.lora.target_modules))
    return [linear for linear in linears if linear.name in names and not linear.name.endswith(_whole_ends(job))]


def _whole_ends(job: Job) -> tuple[str, ...]:
    """What the names of modules that are trained whole end in (`adapters.saved_modules.names_in`)."""
    return tuple(job.lora.modules_to_save)


def weight_bytes(count: int, form: str, blocksize: int = 64, double_quant: bool = True) -> tuple[int, int]:
    """(bytes of the codes or values, bytes of the constants) of `count` weights in a format (`quant.BlockWeight`)."""
    dense = DTYPE_BYTES.get(form) or _DENSE_FORMATS.get(form)
    if dense is not None:
        return count * dense, 0
    codes = count if form == "int8" else (count + 1) // 2
    blocks = -(-count // blocksize)
    constants = blocks + 4 * (-(-blocks // NESTED_BLOCKSIZE)) + 4 if double_quant else 4 * blocks
    return codes, constants


def adapter_parameters(spec: ModelSpec, job: Job) -> int:
    """Trainable parameters of the adapters: r (in + out) for each linear that has one, and DoRA's magnitudes."""
    linears = targets(spec, job)
    magnitudes = sum(x.out_features for x in linears) if job.lora.use_dora else 0
    return magnitudes + sum(job.lora.rank_of(x.name) * (x.in_features + x.out_features) for x in linears)


def saved_parameters(spec: ModelSpec, job: Job) -> int:
    """Parameters of the modules that are trained whole beside the adapters (`modules_to_save`)."""
    if job.method == "full" or not job.lora.modules_to_save:
        return 0
    names = [(name.rpartition(".")[0], math.prod(shape)) for name, shape in spec.tensors()]
    if spec.tied and "lm_head".endswith(_whole_ends(job)):
        names = [("lm_head" if name == "model.embed_tokens" else name, count) for name, count in names]
    return sum(count for name, count in names if name.endswith(_whole_ends(job)))


def trainable_parameters(spec: ModelSpec, job: Job) -> int:
    whole = spec.total_parameters if job.method == "full" else adapter_parameters(spec, job)
    return whole + saved_parameters(spec, job)


def trainable_bytes(spec: ModelSpec, job: Job) -> int:
    """What is trained, in the types that it is held in: adapters float32, everything else as it is computed with.

    Beside adapters nothing is trained in float16, which swallows small updates (`adapters.saved_modules`).
    """
    adapters = 0 if job.method == "full" else adapter_parameters(spec, job)
    size = 4 if job.dtype == "float16" and job.method != "full" else DTYPE_BYTES[job.dtype]
    return 4 * adapters + size * (trainable_parameters(spec, job) - adapters)


def base_bytes(spec: ModelSpec, job: Job) -> tuple[int, int]:
    """(values, constants) of the base model as it is held: linears in their format, all else in the compute dtype."""
    values, constants = 0, 0
    for linear in spec.linears():
        own = job.held_bytes(f"{linear.name}.weight")
        if own is not None:
            values += own
            continue
        form = job.format_of(linear.name)
        if form == job.dtype:
            values += linear.parameters * job.dense_bytes
            continue
        a, b = weight_bytes(linear.parameters, form, job.quant.blocksize, job.quant.double_quant)
        values, constants = values + a, constants + b
    other, table = spec.total_parameters - spec.linear_parameters, spec.vocab_size * spec.hidden_size
    in_file = not spec.tied and job.device == "cpu" and job.method != "full"
    if in_file:
        other -= table  # `models.stored`: its rows stay in the file
    for name in (_EMBEDDING, _HEAD):
        own = job.held_bytes(name)
        if own is not None and not (in_file and name == _EMBEDDING):
            values, other = values + own, other - table
    return values + other * job.dense_bytes, constants


def layer_activations(spec: ModelSpec, job: Job) -> int:
    """Bytes that one layer keeps for its backward pass, per token (`models.decoder.Layer`, `models.blocks`).

    Native: the residual stream before each block (or what it is remade from: the input and both blocks' outputs), the
    projection to queries, keys and values, attention's output and its log-sum-exp, gate and up, and the low-rank
    activations of the adapters. Normed inputs, rotated queries and keys and the gated unit's product are remade, but
    where PyTorch runs the linears it keeps the inputs of the four projection groups.
    """
    if not job.native:
        return layer_tensors(spec, job)
    d, i = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    elements = (3 if spec.sandwich_norms else 2) * d + (q + 2 * kv) + q + 2 * i + _adapters_keep(spec, job)
    if not job.native_linears:
        elements += 2 * d + i
    return elements * DTYPE_BYTES[job.dtype] + 4 * spec.num_heads


def layer_tensors(spec: ModelSpec, job: Job) -> int:
    """Bytes of what one layer makes, per token, and PyTorch's own operators keep.

    Inputs of the norms and of the four projection groups, query-key-value before and after rotation, attention's
    output in both layouts, gate and up, their product, and the low-rank activations of the adapters.
    """
    d, i = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    elements = 4 * d + (q + 2 * kv) + (q + kv) + 2 * q + 3 * i
    if spec.sandwich_norms:
        elements += 2 * d
    if spec.qk_norm:
        elements += q + kv
    return (elements + _adapters_keep(spec, job)) * DTYPE_BYTES[job.dtype]


def _adapters_keep(spec: ModelSpec, job: Job) -> int:
    """Elements that the adapters of one layer keep, per token: low-rank activations; with dropout masked inputs too.

    Each adapter draws a mask of its own and keeps it beside its input (`linear.grouped`).
    """
    masked = 2 if job.lora.lora_dropout > 0 else 0
    linears = targets(spec, job)
    ranks = sum(job.lora.rank_of(linear.name) + masked * linear.in_features for linear in linears)
    return (ranks + _magnitudes_keep(spec, job, linears)) // spec.num_layers


def _magnitudes_keep(spec: ModelSpec, job: Job, linears: list[LinearSpec]) -> int:
    """Elements that DoRA keeps of all layers beside LoRA, per token: the outputs that it scales (`linear.dora`).

    Gate and up are kept anyway, and so is what a norm behind the projection or behind its rotation reads.
    """
    if not job.lora.use_dora:
        return 0
    read = {"gate_up"} | ({"o", "down"} if spec.sandwich_norms else set()) | ({"qkv"} if spec.qk_norm else set())
    groups = {(linear.layer, linear.group): linear.bias for linear in linears if linear.group not in read}
    kept = sum(x.out_features for x in spec.linears() if (x.layer, x.group) in groups)
    # Without a bias it is the output that is kept, and the values are a part of it that attention keeps anyway.
    shared = sum(group == "qkv" and not bias for (_, group), bias in groups.items())
    return kept - shared * spec.num_kv_heads * spec.head_dim


def activation_bytes(spec: ModelSpec, job: Job) -> int:
    """Kept for the backward pass by all layers, plus what the layer at work needs beside."""
    per_token, size = layer_activations(spec, job), DTYPE_BYTES[job.dtype]
    if job.native:
        # A normed input, the gated product and its gradient, gradients of the residual; those of gate and up take the
        # place of gate and up, but where DoRA reads them.
        working = ((4 if job.lora.use_dora else 2) * spec.intermediate_size + 3 * spec.hidden_size) * size
    else:
        # Gradients of gate and up, of their product and of the residual, and float32 temporaries of a norm.
        working = (4 * spec.intermediate_size + 3 * spec.hidden_size) * size + 3 * 4 * spec.hidden_size
    layers = spec.num_layers
    kept = layers * spec.hidden_size * size + per_token if job.checkpointing else layers * per_token
    return job.micro_tokens * (kept + working) + attention_bytes(spec, job)


def attention_bytes(spec: ModelSpec, job: Job) -> int:
    """Scores that PyTorch writes out where the model caps them (Gemma 2); no other attention holds any."""
    if spec.attention_softcap is None or job.native:
        return 0
    layers = 1 if job.checkpointing else spec.num_layers
    rows = max(1, job.micro_tokens // max(job.longest, 1))
    return 2 * 4 * layers * rows * spec.num_heads * job.longest**2 // 2


def loss_bytes(spec: ModelSpec, job: Job) -> int:
    """The chunked vocabulary projection (`linear.cross_entropy`): hidden states, their gradient, one chunk's logits."""
    size, v = DTYPE_BYTES[job.dtype], spec.vocab_size
    rows = max(1, int(job.micro_tokens * job.supervised))
    if job.native_linears:
        return 3 * rows * spec.hidden_size * size + loss_workspace(spec, job, rows)
    chunk = min(chunk_rows(v), rows)
    logits = chunk * v * (4 if size == 4 else 4 + size)
    capped = chunk * v * 4 if spec.final_softcap is not None else 0
    return 2 * rows * spec.hidden_size * size + logits + capped


def training_peak(spec: ModelSpec, job: Job) -> dict[str, int]:
    """Gradients, activations and the loss's memory at the moment of a step that holds most of them.

    Where the vocabulary's matrix is trained there are two such moments. The loss is done and has that matrix' gradient
    in float32, soon in the compute dtype beside it, with every layer's activations (`linear.cross_entropy`); or the
    backward pass is done, with all gradients, and those that tied embeddings get from both their ends.
    """
    whole = {"gradients": standing_gradients(spec, job), "activations": activation_bytes(spec, job)}
    whole["loss"] = loss_bytes(spec, job)
    if job.method != "full":
        return whole
    size, table = DTYPE_BYTES[job.dtype], spec.vocab_size * spec.hidden_size
    one_by_one = _takes_gradients(job)
    # Micro-batches are counted a quarter too many, as rows are of unlike lengths.
    before = gradient_bytes(spec, job) if job.micro_batches >= 1.5 * job.steps and not one_by_one else 0
    early = whole | {"gradients": before, "loss": whole["loss"] + table * (4 + size)}
    late = {
        "gradients": table * size if one_by_one else gradient_bytes(spec, job),
        "activations": activation_bytes(spec, job) // spec.num_layers,
        "loss": whole["loss"] + (table * size if spec.tied else 0),
    }
    return max(early, late, key=lambda parts: sum(parts.values()))


def loss_workspace(spec: ModelSpec, job: Job, rows: int) -> int:
    """What the native loss keeps (`csrc/engine/loss.inc`), for `rows` supervised rows.

    Of up to 2,048 rows: the packed hidden states, the powers of a stretch of the vocabulary, whose panels of 256 words
    have two numbers a row, five numbers a row, and the gradient's float32 sums (columns in panels of 256 or 320).
    """
    d, size = spec.hidden_size, DTYPE_BYTES[job.dtype]
    most = _round_up(min(rows, 2048), 64)
    panels = min(-(-spec.vocab_size // 256), max(1, WORKSPACE_BYTES // (most * size * 256)))
    columns = _round_up(d, 320 if d % 320 == 0 else 256)
    return most * (d * size + panels * 256 * size + 4 * (2 * panels + 5) + 4 * columns)


def workspace_bytes(spec: ModelSpec, job: Job) -> int:
    """Scratch that is kept between calls, beside the loss's.

    Native linears hold their packed tokens and some panels a thread; native attention its packed blocks and its sums.
    PyTorch's products need a quantized weight decoded (`linear.workspace`): the largest one.
    """
    size = DTYPE_BYTES[job.dtype]
    attention = attention_workspace(spec, job) if job.native else 0
    if job.native_linears:
        widest = max(linear.in_features for linear in spec.linears())
        packed = _round_up(min(job.micro_tokens, 2048), 64) * widest * size
        return packed + THREAD_PANELS * torch.get_num_threads() + attention
    coded = [linear.parameters for linear in spec.linears() if job.is_coded(linear.name)]
    attention += TORCH_PRODUCTS if job.device == "cpu" else 0
    return attention + max(coded, default=0) * size + (PANEL_BYTES if coded else 0)


def attention_workspace(spec: ModelSpec, job: Job) -> int:
    """What native attention keeps for its backward pass (`csrc/engine/attention.cpp`).

    Packed queries and gradients of the output, float32 sums of the queries' gradients; where heads share keys and there
    are few blocks of 128 keys, sums of the keys' and values' gradients for each query head.
    """
    width = spec.num_heads * spec.head_dim
    tasks = -(-job.micro_tokens // 128) * spec.num_kv_heads
    split = spec.num_heads > spec.num_kv_heads and tasks < 48
    return job.micro_tokens * (width * (2 * DTYPE_BYTES[job.dtype] + 4 + (8 if split else 0)) + 4 * spec.num_heads)


def _round_up(count: int, to: int) -> int:
    return -(-count // to) * to


def optimizer_bytes(spec: ModelSpec, job: Job) -> int:
    """AdamW's state in memory; in a file, the pages that stay and the two at work (`optim.paged`)."""
    whole = optimizer_state(spec, job)
    if not job.optim.startswith("paged") or job.device != "cpu":
        return whole
    return min(whole + gradient_bytes(spec, job), job.updates.optim_memory + 2 * PAGE_ELEMENTS * 14)


def optimizer_state(spec: ModelSpec, job: Job) -> int:
    """AdamW's two moments: float32, or one byte each with a float32 constant for every 256 (`optim.moments`).

    GaLore's are of rank r for the linears' matrices, with a float32 projection (`optim.galore`).
    """
    count = trainable_parameters(spec, job)
    # A trained bfloat16 weight keeps the 16 bits below it in the optimizer's state.
    adapters = 0 if job.method == "full" else adapter_parameters(spec, job)
    low_bits = 2 * (count - adapters) if job.dtype == "bfloat16" else 0
    projections = 0
    if job.optim.startswith("galore") and job.method == "full":
        for linear in spec.linears():
            made = Projection.of((linear.out_features, linear.in_features), job.updates)
            rows, columns = made.low_shape
            count += rows * columns - linear.parameters
            projections += 4 * made.rank * (made.left * made.m + made.right * made.n)
    moments = 2 * count + 8 * (-(-count // 256)) if job.optim.endswith("8bit") else 8 * count
    return moments + low_bits + projections


def gradient_bytes(spec: ModelSpec, job: Job) -> int:
    """All gradients as they stand after a backward pass, in the type of what is trained."""
    return trainable_bytes(spec, job)


def standing_gradients(spec: ModelSpec, job: Job) -> int:
    """Gradients in memory at once; where a hook takes each one, no more than the vocabulary's."""
    if _takes_gradients(job):
        table = spec.vocab_size * spec.hidden_size * DTYPE_BYTES[job.dtype]
        return min(table if job.method == "full" else 0, gradient_bytes(spec, job))
    return gradient_bytes(spec, job)


def _takes_gradients(job: Job) -> bool:
    """Whether gradients leave during the backward pass: into a file, or with their layer's update."""
    by_layer, paged = job.updates.per_layer_updates, job.optim.startswith("paged") and job.device == "cpu"
    return paged or (job.optim.startswith("galore") if by_layer is None else by_layer)


def runtime_bytes(spec: ModelSpec, job: Job) -> int:
    """The process before any weight: Python, torch, transformers, and the tokenizer."""
    return PROCESS_FLOOR + TOKENIZER_BYTES_A_WORD * spec.vocab_size


def loading_bytes(spec: ModelSpec, job: Job) -> int:
    """What loading holds beside the finished part: one tensor as the file has it, 16 bits a value (`models.load`).

    The embeddings come first, when nothing else is held, and an output head of its own last; both stay as they are read
    where the compute dtype is the file's, which is taken to be bfloat16.
    """
    if all(job.held_bytes(f"{linear.name}.weight") is not None for linear in spec.linears()):
        return 0  # the file's bytes are read into the tensor that stays
    table, converted = spec.vocab_size * spec.hidden_size, job.dtype != "bfloat16"
    largest = max(linear.parameters for linear in spec.linears())
    last = table if converted and not spec.tied else largest
    first = table * (2 + DTYPE_BYTES[job.dtype]) - sum(base_bytes(spec, job)) if converted else 0
    return max(2 * largest, 2 * last, first)


def phases(spec: ModelSpec, job: Job) -> dict[str, dict[str, int]]:
    """Bytes by phase and component. On a GPU the figures are the card's, on a CPU the process's."""
    values, constants = base_bytes(spec, job)
    floor = CUDA_CONTEXT if job.device == "cuda" else runtime_bytes(spec, job)
    held = {"runtime": floor, "base weights": values, "quantization constants": constants}
    # Whole modules are copies: the originals stay for the base model.
    held["adapters"] = 0 if job.method == "full" else trainable_bytes(spec, job)
    train = {
        **held,
        "optimizer": optimizer_bytes(spec, job),
        **training_peak(spec, job),
        "workspace": workspace_bytes(spec, job),
    }
    # Nothing is kept for a backward pass: gate, up and their product, the residual, torch's float32 parts of a norm.
    d, size = spec.hidden_size, DTYPE_BYTES[job.dtype]
    temporaries = 0 if job.native else 2 * 4 * d
    read = min(max(job.eval_batch_tokens, job.longest), max(job.eval_pass_tokens, 1))
    forward_only = read * ((3 * spec.intermediate_size + 3 * d) * size + temporaries)
    evaluate = {k: v for k, v in train.items() if k != "gradients"}
    evaluate |= {"activations": forward_only, "loss": loss_bytes(spec, job)}
    return {
        "load": {**held, "adapters": 0, "loading": loading_bytes(spec, job)},
        "train": train,
        "evaluate": evaluate,
        "save": {k: v for k, v in evaluate.items() if k != "activations"} | {"pieces": SAVED_PIECE},
    }


def merge_phase(spec: ModelSpec, job: Job) -> dict[str, int]:
    """`halfbyte merge` afterwards, on its own: a few rows at a time, and the adapters (`export.merged_tensors`).

    The comparison of the merged model with the trained one goes layer by layer and holds one layer of each, dense.
    """
    d, size = spec.hidden_size, DTYPE_BYTES[job.dtype]
    layer = spec.linear_parameters // spec.num_layers
    return {
        "runtime": runtime_bytes(spec, job),
        "base weights": layer * 2 * size + spec.vocab_size * d * size,
        "adapters": 0 if job.method == "full" else 4 * adapter_parameters(spec, job),
        "pieces": MERGED_PIECES,
    }


def disk_bytes(spec: ModelSpec, job: Job, checkpoints: int = 2) -> dict[str, int]:
    """Bytes that a run leaves on the disk at most: the checkpoints at once (one is written before the oldest goes, and
    the best one may be kept beside the last ones), and the result."""
    each = trainable_bytes(spec, job) + optimizer_state(spec, job)
    result = spec.total_parameters * DTYPE_BYTES[job.dtype] if job.method == "full" else trainable_bytes(spec, job)
    paged = optimizer_state(spec, job) + gradient_bytes(spec, job) if job.optim.startswith("paged") else 0
    adapter = 0 if job.method == "full" else trainable_bytes(spec, job)
    return {
        "checkpoints": (each + adapter) * min(checkpoints + 2, job.steps),
        "result": result + TOKENIZER_FILES,
        "optimizer pages": paged,
    }
