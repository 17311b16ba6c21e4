"""Peak memory of other fine-tuning stacks on one card: their habits are data (stacks.yaml), the arithmetic is here.

halfbyte's own engine is planned by `plan.memory`, which knows what each of its kernels allocates. Of another stack that
is not known, but its habits are, from its sources: what it keeps in float32, how many copies of the logits are alive,
what a layer keeps. Each figure here is a sum that a reader can repeat by hand:

    peak = fixed + factor * (what grows with the tokens) + gradients, at the highest of three moments

    loss      every layer's activations (or checkpoints) and the logits
    turn      the same activations, and the last layer at work in the backward pass
    end       the first layer at work, and all gradients

torch's counter of active bytes, and a card that is full to the brim, show the highest moment. What the driver shows is
what the allocator reserved: blocks of the logits and of a layer are of different sizes, both stay, and the moments add
up (a stack's habit `reserved`). One constant a stack, `activation_factor`, is fitted (`plan.anchors`).

Units: bytes; 1 GB = 10⁹ bytes, 1 GiB = 2³⁰ bytes. Shape letters of the habits: d hidden size, q all query heads, kv all
key heads, i the MLP's inner size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from halfbyte.adapters.lora import LoraOptions
from halfbyte.errors import UsageError
from halfbyte.models.spec import ModelSpec
from halfbyte.plan import memory
from halfbyte.plan.memory import CUDA_CONTEXT, Job, weight_bytes
from halfbyte.quant.options import QuantOptions
from halfbyte.yamlfile import read_yaml

FILE = Path(__file__).with_name("stacks.yaml")
MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class Setup:
    """What a source says of its run.

    method         full, lora or qlora
    rank, targets  of the adapters, as in `LoraOptions`
    batch, length  rows at once and tokens of each, padding included
    accumulation   micro-batches an update: with more than one, gradients stand while the next loss is computed
    checkpointing  activations are recomputed; offload: what is kept of them is moved to the host
    eager          attention's scores are written out
    compiled       torch.compile; chunked: the loss goes through the logits in chunks
    in_backward    the optimizer's step is taken in the backward pass, gradient by gradient
    optimizer      adamw, adamw_8bit or paged_adamw_8bit
    """

    method: str
    rank: int = 16
    targets: str = "all-linear"
    batch: int = 1
    length: int = 2048
    accumulation: int = 1
    checkpointing: bool = True
    offload: bool = False
    eager: bool = False
    compiled: bool = False
    chunked: bool = False
    in_backward: bool = False
    optimizer: str = "adamw"

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def job(self) -> Job:
        """The same, as far as the planner's own shapes need it."""
        lora = LoraOptions(lora_r=self.rank, target_modules=self.targets)
        return Job(self.method, "bfloat16", QuantOptions(), lora, device="cuda")


@dataclass(frozen=True)
class Stack:
    """One stack's habits; stacks.yaml says what each field is and where it was read.

    like  the stack whose habits hold where its own entry names none; `read` is of its own habits only
    """

    name: str
    title: str
    kept: Mapping[str, float]
    inputs: Mapping[str, bool]
    work: Mapping[str, float]
    residual_bytes: int
    offloads: bool
    logits: float
    head_gradients: int
    scores: float
    embedding_bytes: int
    head_copy_bytes: int
    trained_bytes: int
    state_bytes: Mapping[str, float]
    workspace_bytes: int
    quantizing_bytes: int
    context: bool
    reserved: bool
    activation_factor: float
    read: Mapping[str, str]
    like: str
    kept_compiled: Mapping[str, float] | None = None
    logits_chunked: float | None = None
    head_gradients_chunked: int | None = None


@dataclass(frozen=True)
class Peak:
    """Bytes of one moment, by component; `moment` says which one it is."""

    moment: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def stacks() -> dict[str, Stack]:
    """Every stack by name, with the habits that it takes over from another filled in."""
    return dict(_stacks())


@cache
def _stacks() -> dict[str, Stack]:
    entries: dict[str, dict[str, Any]] = read_yaml(FILE)["stacks"].value
    found: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        base = found.get(entry.get("from", ""), {})
        own = {key: value for key, value in entry.items() if key != "from"}
        found[name] = {**base, **own, "name": name, "like": entry.get("from", "")}
    known = {f.name for f in fields(Stack)}
    assert all(set(entry) <= known for entry in found.values()), "stacks.yaml names a habit that no field holds"
    return {name: Stack(**entry) for name, entry in found.items()}


def constants() -> dict[str, dict[str, Any]]:
    """The constants that no source gives: value, range that physics leaves, meaning."""
    return dict(read_yaml(FILE)["constants"].value)


def find(name: str) -> Stack:
    """UsageError for a stack that is not in stacks.yaml."""
    if name not in _stacks():
        raise UsageError(f"{name!r} is not a stack that stacks.yaml describes: known are {', '.join(_stacks())}")
    return _stacks()[name]


# -- what does not grow with the tokens ---------------------------------------------------------------------------


def trained(spec: ModelSpec, setup: Setup) -> int:
    """Trained parameters."""
    return spec.total_parameters if setup.method == "full" else memory.adapter_parameters(spec, setup.job())


def base(spec: ModelSpec, stack: Stack, setup: Setup) -> dict[str, int]:
    """Bytes of the base model: linears, quantization constants, and what no 4-bit base quantizes."""
    other = spec.total_parameters - spec.linear_parameters
    if setup.method != "qlora":
        return {"base weights": 2 * spec.total_parameters}
    sizes = [weight_bytes(linear.parameters, "nf4") for linear in spec.linears()]
    return {
        "base weights": sum(codes for codes, _ in sizes),
        "quantization constants": sum(constants for _, constants in sizes),
        "embeddings, head, norms": other * stack.embedding_bytes,
    }


def fixed(spec: ModelSpec, stack: Stack, setup: Setup) -> dict[str, int]:
    """What is there at every moment of a step."""
    count = trained(spec, setup)
    largest = max(linear.parameters for linear in spec.linears())
    quantized = setup.method == "qlora"
    parts = {
        "CUDA context": CUDA_CONTEXT if stack.context else 0,
        **base(spec, stack, setup),
        "adapters": 0 if setup.method == "full" else count * stack.trained_bytes,
        "optimizer": int(count * stack.state_bytes[setup.optimizer]),
        "head copy": spec.head_parameters * stack.head_copy_bytes if quantized else 0,
        "workspace": largest * stack.workspace_bytes if quantized else 0,
    }
    return {name: size for name, size in parts.items() if size}


def loading(spec: ModelSpec, stack: Stack, setup: Setup) -> Peak:
    """The peak of loading: the model, and the largest matrix while it is quantized on the card."""
    count = 0 if setup.method == "full" else trained(spec, setup)
    largest = max(linear.parameters for linear in spec.linears())
    parts = {"CUDA context": CUDA_CONTEXT if stack.context else 0, **base(spec, stack, setup)}
    parts |= {"adapters": count * stack.trained_bytes}
    if setup.method == "qlora":
        parts["quantizing"] = largest * stack.quantizing_bytes
    return Peak("load", {name: size for name, size in parts.items() if size})


# -- what grows with the tokens -----------------------------------------------------------------------------------


def _widths(spec: ModelSpec) -> dict[str, int]:
    heads = {"q": spec.num_heads * spec.head_dim, "kv": spec.num_kv_heads * spec.head_dim}
    return {"d": spec.hidden_size, "i": spec.intermediate_size, **heads}


def _bytes(spec: ModelSpec, counts: Mapping[str, float]) -> float:
    """Bytes a token of 16-bit numbers that are counted by their width."""
    widths = _widths(spec)
    return 2.0 * sum(widths[letter] * count for letter, count in counts.items())


def layer_kept(spec: ModelSpec, stack: Stack, setup: Setup) -> float:
    """Bytes a token that one layer keeps for its backward pass where nothing is recomputed."""
    counts = stack.kept_compiled if setup.compiled and stack.kept_compiled is not None else stack.kept
    names = {linear.name.rpartition(".")[2] for linear in memory.targets(spec, setup.job())}
    groups = {x.group for x in spec.layer_linears(0) if setup.method == "full" or x.name.rpartition(".")[2] in names}
    widths = {"qkv": "d", "gate_up": "d", "down": "i"}
    inputs = sum(_bytes(spec, {widths[g]: 1}) for g in widths if stack.inputs.get(g) and g in groups)
    return _bytes(spec, counts) + inputs


def layer_work(spec: ModelSpec, stack: Stack, setup: Setup) -> float:
    """Bytes a token of the layer at work: what it keeps meanwhile where it is recomputed, and its gradients."""
    kept = layer_kept(spec, stack, setup) if setup.checkpointing else 0.0
    scores = stack.scores * spec.num_heads * setup.length if setup.eager else 0.0
    return kept + _bytes(spec, stack.work) + scores


def activations(spec: ModelSpec, stack: Stack, setup: Setup) -> float:
    """Bytes a token that all layers keep: everything, or their inputs only, or two of those beside the host's."""
    if not setup.checkpointing:
        return spec.num_layers * layer_kept(spec, stack, setup)
    layers = 2 if stack.offloads or setup.offload else spec.num_layers
    return layers * float(spec.hidden_size * stack.residual_bytes)


def logits(spec: ModelSpec, stack: Stack, setup: Setup) -> float:
    """Bytes a token at the loss's highest moment."""
    chunked = setup.chunked and stack.logits_chunked is not None
    return spec.vocab_size * float(stack.logits_chunked or 0 if chunked else stack.logits)


def _head_gradients(spec: ModelSpec, stack: Stack, setup: Setup) -> int:
    if setup.method != "full":
        return 0
    chunked = setup.chunked and stack.head_gradients_chunked is not None
    return 2 * spec.head_parameters * int(stack.head_gradients_chunked or 0 if chunked else stack.head_gradients)


def _gradients(spec: ModelSpec, stack: Stack, setup: Setup) -> int:
    """All gradients; only the largest one where the optimizer takes each as it comes."""
    if setup.in_backward:
        return stack.trained_bytes * max(spec.head_parameters, max(x.parameters for x in spec.linears()))
    return stack.trained_bytes * trained(spec, setup)


# -- the peak -----------------------------------------------------------------------------------------------------


def moments(spec: ModelSpec, stack: Stack, setup: Setup) -> list[Peak]:
    """The three moments of a step that can be the highest; a single one where the counter adds them up."""
    held, factor, tokens = fixed(spec, stack, setup), stack.activation_factor, setup.tokens
    kept, work = activations(spec, stack, setup), layer_work(spec, stack, setup)
    head, all_of_them = _head_gradients(spec, stack, setup), _gradients(spec, stack, setup)
    standing = all_of_them if setup.accumulation > 1 and not setup.in_backward else 0

    def scaled(a_token: float) -> int:
        return int(factor * tokens * a_token)

    loss = {"activations": scaled(kept), "logits": scaled(logits(spec, stack, setup)), "gradients": head + standing}
    turn = {"activations": scaled(kept), "layer at work": scaled(work), "gradients": head // 2 + standing}
    first = kept / spec.num_layers
    end = {"activations": scaled(first), "layer at work": scaled(work), "gradients": all_of_them}
    if stack.reserved:
        together = {**loss, **turn, "gradients": max(head + standing, all_of_them)}
        return [Peak("all together", {**held, **together})]
    return [Peak(name, {**held, **parts}) for name, parts in (("loss", loss), ("turn", turn), ("end", end))]


def peak(spec: ModelSpec, stack: Stack, setup: Setup) -> Peak:
    """The highest moment of a step, as the stack's counter shows it.

    What is reserved never shrinks: there the peak of loading counts too.
    """
    found = moments(spec, stack, setup)
    return max([*found, loading(spec, stack, setup)] if stack.reserved else found, key=lambda moment: moment.total)


def longest_context(spec: ModelSpec, stack: Stack, setup: Setup, limit: int) -> int:
    """Tokens of the longest row whose peak is within `limit` bytes; 0 where one token is too many."""
    low, high = 0, MOST_TOKENS
    while high - low > 1:
        middle = (low + high) // 2
        fits = peak(spec, stack, replace(setup, length=middle)).total <= limit
        low, high = (middle, high) if fits else (low, middle)
    return low
