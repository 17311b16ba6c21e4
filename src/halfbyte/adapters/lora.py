"""LoRA on a model's segments: which linears, what rank, what initial values.

Knows a segment's name and shape and nothing of its weight's format. Names and meaning of the options are PEFT's
(0.21), so that a user's habits and files carry over.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from halfbyte.adapters import heads
from halfbyte.errors import UsageError
from halfbyte.linear import LoraAdapter, Segment, segments
from halfbyte.options import Options

ALL_LINEAR = "all-linear"


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


class LoraOptions(Options):
    """Where adapters go and what they look like. Defaults follow the field's common recipe."""

    lora_r: int = Field(16, ge=1, le=4096, description="Rank of the adapters.")
    lora_alpha: float = Field(
        32, gt=0, allow_inf_nan=False, description="Scale: the update is multiplied by alpha / r."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' inputs while training.")
    target_modules: str | list[str] = Field(
        ALL_LINEAR,
        description="Linears that get an adapter: all-linear (every one but the output head), "
        "names such as q_proj,v_proj, or one regular expression over full names.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (rank-stabilised LoRA).")
    init_lora_weights: Literal["default", "gaussian"] = Field(
        "default", description="Initial A: default (Kaiming uniform, as PEFT) or gaussian. B starts at zero."
    )
    rank_pattern: dict[Pattern, Annotated[int, Field(ge=1, le=4096)]] = Field(
        default_factory=dict, description="Rank for names that end in a key, or match it as a regular expression."
    )
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="Alpha by name, like rank_pattern."
    )
    adapter_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the saved adapter's numbers; training keeps float32 either way."
    )

    def rank_of(self, name: str) -> int:
        return int(_pattern(self.rank_pattern, name, self.lora_r))

    def alpha_of(self, name: str) -> float:
        return float(_pattern(self.alpha_pattern, name, self.lora_alpha))

    def scaling_of(self, name: str) -> float:
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)


def _pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """PEFT's rule: the first key that matches the name or its end after a dot."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


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
    leaves = sorted({name.rsplit(".", 1)[-1] for name in available})
    for target in wanted:
        if not any(name == target or name.endswith("." + target) for name in available):
            near = difflib.get_close_matches(target, leaves, 1)
            hint = f"did you mean {near[0]}?" if near else f"the model has {', '.join(leaves)}"
            raise UsageError(f"target_modules: the model has no linear named {target!r}; {hint}")
    return [n for n in available if any(n == t or n.endswith("." + t) for t in wanted)]


def attach(model: nn.Module, options: LoraOptions, seed: int = 42) -> AttachReport:
    """Put a fresh adapter on every targeted segment; everything else is frozen.

    The initial values depend on the seed and the model's order of linears, not on torch's global generator.
    """
    found = segments(model)
    names = target_names(list(found), options.target_modules)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        segment = found[name]
        a, b = _initial(segment, options, generator)
        adapter = LoraAdapter(a, b, options.scaling_of(name), options.lora_dropout)
        segment.adapter = adapter.to(device_of(segment))
    heads.make_trainable(model)
    return report(model, tuple(names))


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


def _initial(segment: Segment, options: LoraOptions, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B, float32. Kaiming uniform with a = sqrt(5) is U(-1/sqrt(in), 1/sqrt(in)); gaussian is N(0, 1/r)."""
    rank = options.rank_of(segment.name)
    shape = (rank, segment.in_features)
    if options.init_lora_weights == "gaussian":
        a = torch.randn(shape, generator=generator) / rank
    else:
        a = (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(segment.in_features)
    return a, torch.zeros(segment.out_features, rank)


def detach(model: nn.Module) -> None:
    """Remove all adapters."""
    for segment in segments(model).values():
        segment.adapter = None


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters, in the model's order."""
    return [p for s in segments(model).values() if s.adapter is not None for p in s.adapter.parameters()]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model: adapters are off inside the block, and as they were after it."""
    adapters = [s.adapter for s in segments(model).values() if s.adapter is not None]
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors, and a classifier's head, under PEFT's names, float32, sharing the parameters' memory."""
    state: dict[str, Tensor] = {}
    for name, segment in segments(model).items():
        if segment.adapter is not None:
            state[f"base_model.model.{name}.lora_A.weight"] = segment.adapter.lora_A.detach()
            state[f"base_model.model.{name}.lora_B.weight"] = segment.adapter.lora_B.detach()
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
