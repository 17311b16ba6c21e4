"""LoRA and DoRA on a model's segments: which linears, what rank, what initial values.

Knows a segment's name and shape and nothing of its weight's format: initial values that depend on the weight ask a
`Base` for it. Names and meaning of the options are PEFT's (0.21), so that a user's habits and files carry over.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from halfbyte.adapters import heads, saved_modules
from halfbyte.adapters.initial import Initial, Shift, loftq, pissa
from halfbyte.adapters.options import ALL_LINEAR
from halfbyte.adapters.options import LoraOptions as LoraOptions
from halfbyte.errors import UsageError
from halfbyte.linear import LoraAdapter, Segment, segments
from halfbyte.linear.dora import row_norms
from halfbyte.options import nearest
from halfbyte.quant import Weight


class Base(Protocol):
    """The frozen weights as their source has them, by a linear's name, and as the model would hold them."""

    def source(self, name: str) -> Tensor:
        """The weight before quantization, float32 [out, in]."""
        ...

    def held(self, name: str, shift: Callable[[int, int], Tensor] | None) -> Weight:
        """The weight freed of `shift` (rows start to stop -> float32), in the format that the model holds it in."""
        ...

    def is_quantized(self, name: str) -> bool:
        """Whether that format is a quantized one."""
        ...


@dataclass(frozen=True)
class AttachReport:
    """What was attached, for the line printed at the start of a run."""

    names: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int

    @property
    def share(self) -> float:
        return self.trainable_parameters / max(1, self.total_parameters)


def target_names(available: list[str], targets: str | list[str]) -> list[str]:
    """The names among `available` that `targets` selects, in their order. UsageError if one selects nothing.

    A string is all-linear, a comma-separated list of names, or one regular expression over full names, told
    apart by whether it contains anything but names and dots.
    """
    if targets == ALL_LINEAR or targets == [ALL_LINEAR]:
        return list(available)
    if isinstance(targets, str) and re.search(r"[^\w.,\s-]", targets):
        try:
            expression = re.compile(targets)
        except re.error as error:
            raise UsageError(f"target_modules: {targets!r} is not a regular expression: {error}") from None
        chosen = [name for name in available if expression.fullmatch(name)]
        if not chosen:
            raise UsageError(f"target_modules: {targets!r} matches no linear of the model (such as {available[0]})")
        return chosen
    wanted = [t.strip() for t in targets.split(",")] if isinstance(targets, str) else list(targets)
    for target in wanted:
        if not any(name == target or name.endswith("." + target) for name in available):
            raise UsageError(f"target_modules: the model has no linear named {target!r}; {nearest(target, available)}")
    return [n for n in available if any(n == t or n.endswith("." + t) for t in wanted)]


def attach(model: nn.Module, options: LoraOptions, seed: int = 42, base: Base | None = None) -> AttachReport:
    """Put a fresh adapter on every targeted segment, make `modules_to_save` trainable, freeze everything else.

    The initial values depend on the seed and the model's order of linears, not on torch's global generator.
    base   needed by PiSSA and LoftQ: gives the weights before quantization, and rebuilds what the model holds
    """
    found = segments(model)
    options.require_linears(found)
    whole = saved_modules.names_in(model, heads.without_head(model, options.modules_to_save))
    names = [n for n in target_names(list(found), options.target_modules) if n not in whole]
    if not names:
        raise UsageError("target_modules are all in modules_to_save: nothing is left for an adapter")
    freeze(model)
    draw = _initial_values(found, names, options, seed, base)
    for name in names:
        segment = found[name]
        initial = draw(segment)
        if initial.shift is not None:
            assert base is not None
            segment.weight = base.held(name, initial.shift.rows)
        scaling = options.scaling_of(name)
        magnitude = _magnitude(segment, initial, scaling) if options.use_dora else None
        put(segment, initial, scaling, options.lora_dropout, magnitude)
    saved_modules.train(model, whole)
    heads.make_trainable(model)
    return report(model, tuple(names))


def freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def put(
    segment: Segment, initial: Initial, scaling: float, dropout: float = 0.0, magnitude: Tensor | None = None
) -> LoraAdapter:
    """An adapter with these values on the segment; a magnitude makes it a DoRA.

    The shift is kept beside it: whoever asks for the base model means the weights before.
    """
    device, shift = device_of(segment), initial.shift
    adapter = LoraAdapter(initial.a, initial.b, scaling, dropout, magnitude).to(device)
    segment.adapter = adapter
    removed = None
    if shift is not None:  # a copy: PiSSA's adapter begins as the very tensors that its base was freed of
        removed = LoraAdapter(shift.a.clone(), shift.b.clone(), shift.scaling).to(device).eval()
        removed.requires_grad_(False)
    segment.add_module("shift", removed)
    return adapter


def _magnitude(segment: Segment, initial: Initial, scaling: float) -> Tensor:
    """DoRA's magnitude before the first step: the length of every row of W + s B A (arXiv 2402.09353, section 4)."""
    device = device_of(segment)
    return row_norms(segment.weight, (initial.a.to(device), initial.b.to(device), scaling))


def shift_of(segment: Segment) -> Shift | None:
    """What the segment's base was freed of, None where it is the weight itself."""
    held = removed_from(segment)
    return None if held is None else Shift(held.lora_A.detach(), held.lora_B.detach(), held.scaling)


def removed_from(segment: Segment) -> LoraAdapter | None:
    """The shift as an adapter: on the shifted base it is the model that there was before."""
    found = segment._modules.get("shift")
    return found if isinstance(found, LoraAdapter) else None


def short_targets(model: nn.Module) -> list[str]:
    """Short names (q_proj, ...) where they select exactly the adapted linears, else full names."""
    found = segments(model)
    adapted = {name for name, segment in found.items() if segment.adapter is not None}
    leaves = {name.rsplit(".", 1)[-1] for name in adapted}
    selected = {name for name in found if name.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves if selected == adapted else adapted)


def report(model: nn.Module, names: tuple[str, ...]) -> AttachReport:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    spec = getattr(model, "spec", None)
    known = spec.total_parameters if spec is not None else getattr(model, "total_parameters", None)
    base = _held_parameters(model) if known is None else int(known)
    adapters = sum(p.numel() for s in segments(model).values() if s.adapter is not None for p in s.adapter.parameters())
    return AttachReport(names, trainable, base + adapters)


def _held_parameters(model: nn.Module) -> int:
    return sum(math.prod(s.weight.shape) for s in segments(model).values())


def device_of(segment: Segment) -> torch.device:
    tensor = next((t for t in (*segment.weight.parameters(), *segment.weight.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _initial_values(
    found: Mapping[str, Segment], names: list[str], options: LoraOptions, seed: int, base: Base | None
) -> Callable[[Segment], Initial]:
    """Draws one linear's initial values after the other. UsageError where they cannot be had from this base."""
    generator = torch.Generator().manual_seed(seed)
    kind, steps, dtype = options.init_lora_weights, options.loftq_iter, options.file_dtype

    def plain(segment: Segment) -> Initial:
        return Initial(*_plain(segment, options, generator))

    if kind in ("default", "gaussian"):
        return plain
    if base is None:
        raise UsageError(f"init_lora_weights {kind} needs the model's own weights, and they are not at hand here")
    if kind == "loftq" and not any(base.is_quantized(name) for name in names):
        raise UsageError(
            "init_lora_weights loftq makes good what quantizing the base loses, and this base is not quantized: use "
            "method qlora, or init_lora_weights pissa"
        )

    def drawn(segment: Segment) -> Initial:
        name = segment.name
        rank, scaling = options.rank_of(name), options.scaling_of(name)
        if kind == "loftq" and not base.is_quantized(name):
            return plain(segment)  # quant_pattern keeps it in 16 bits: nothing was lost
        weight = base.source(name)
        if not bool(torch.isfinite(weight).all()):
            raise UsageError(f"{name} holds NaN or infinite values: the model's file is damaged")
        if kind != "loftq":
            return pissa(weight, rank, scaling, generator, options.pissa_iterations, dtype)

        def quantized(shift: Shift | None) -> Tensor:
            held = segment.weight if shift is None else base.held(name, shift.rows)
            return held.dequantize(torch.float32).cpu()

        return loftq(weight, rank, scaling, quantized, generator, steps, dtype)

    return drawn


def _plain(segment: Segment, options: LoraOptions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B, float32. Kaiming uniform with a = sqrt(5) is U(-1/sqrt(in), 1/sqrt(in)); gaussian is N(0, 1/r)."""
    rank = options.rank_of(segment.name)
    shape = (rank, segment.in_features)
    if options.init_lora_weights == "gaussian":
        a = torch.randn(shape, generator=generator) / rank
    else:
        a = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(segment.in_features)
    return a, torch.zeros(segment.out_features, rank)


def detach(model: nn.Module) -> None:
    """Remove all adapters and put the originals of `modules_to_save` back. A base that was shifted stays so."""
    for segment in segments(model).values():
        segment.adapter = None
    saved_modules.remove(model)


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters, in the model's order."""
    return [p for s in segments(model).values() if s.adapter is not None for p in s.adapter.parameters()]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model: adapters are off inside the block and whole modules the originals; after it, as they were.

    Where the base was freed of a shift, the shift stands in the adapter's place: the model that there was before.
    """
    found = [(s, s.adapter, s.adapter.enabled) for s in segments(model).values() if s.adapter is not None]
    for segment, adapter, _ in found:
        removed = removed_from(segment)
        if removed is None:
            adapter.enabled = False
        else:
            segment.adapter = removed
    try:
        with saved_modules.originals(model):
            yield
    finally:
        for segment, adapter, enabled in found:
            segment.adapter, adapter.enabled = adapter, enabled


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors, and a classifier's head, under PEFT's names, float32, sharing the parameters' memory."""
    state: dict[str, Tensor] = {}
    for name, segment in segments(model).items():
        if segment.adapter is not None:
            state[f"base_model.model.{name}.lora_A.weight"] = segment.adapter.lora_A.detach()
            state[f"base_model.model.{name}.lora_B.weight"] = segment.adapter.lora_B.detach()
            if segment.adapter.magnitude is not None:
                state[f"base_model.model.{name}.lora_magnitude_vector"] = segment.adapter.magnitude.detach()
    return state | heads.head_state(model)


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors under PEFT's names into the attached adapters. UsageError on any difference in names or shapes."""
    mine = adapter_state(model)
    missing, extra = sorted(mine.keys() - state.keys()), sorted(state.keys() - mine.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model has no place for"
        raise UsageError(f"the adapter {what} ({len(missing)} missing, {len(extra)} unexpected): another model's?")
    for name, tensor in mine.items():
        if tensor.shape != state[name].shape:
            raise UsageError(
                f"the adapter's {name} is {tuple(state[name].shape)}, the model needs {tuple(tensor.shape)}"
            )
        tensor.copy_(state[name])
