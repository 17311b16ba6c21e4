"""LoRA updates as values: read from PEFT folders, weighted, summed, and put beside a model's weights.

A sum of low-rank updates is a low-rank update: the factors side by side, [A1; A2] and [w1 s1 B1, w2 s2 B2]. PEFT calls
this combination "cat". So whatever takes one adapter takes several.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from halfbyte.adapters.heads import take_head
from halfbyte.adapters.lora import device_of
from halfbyte.adapters.peft_io import lora_options, read_adapter_config, read_adapter_tensors
from halfbyte.errors import UsageError
from halfbyte.linear import LoraAdapter, segments


@dataclass(frozen=True)
class Delta:
    """One linear's update: scaling * B A, by rows of the output. `a` is [rank, in], `b` is [out, rank]."""

    a: Tensor
    b: Tensor
    scaling: float

    def rows(self, start: int, stop: int) -> Tensor:
        return (self.b[start:stop].float() @ self.a.float()) * self.scaling


@dataclass(frozen=True)
class WeightedAdapter:
    """A PEFT folder, and how much of its update is added."""

    folder: Path
    weight: float = 1.0

    def __str__(self) -> str:
        return str(self.folder) if self.weight == 1 else f"{self.folder} x {self.weight:g}"


def parse_adapter(text: str) -> WeightedAdapter:
    """FOLDER or FOLDER:WEIGHT, as a command line gives it. UsageError for a weight that adds nothing or is not finite.

    A folder whose own name ends in a colon and a number is that folder.
    """
    name, colon, tail = text.rpartition(":")
    if not colon or not name or Path(text).expanduser().exists():
        return WeightedAdapter(Path(text).expanduser())
    try:
        weight = float(tail)
    except ValueError:
        return WeightedAdapter(Path(text).expanduser())
    if not math.isfinite(weight) or weight == 0:
        raise UsageError(f"--adapter {text}: the weight is a number other than 0, as in {name}:0.5")
    return WeightedAdapter(Path(name).expanduser(), weight)


def read_deltas(adapter: Path) -> dict[str, Delta]:
    """The updates of a PEFT folder by the linear's name. UsageError for one that is broken or not plain LoRA."""
    config = read_adapter_config(adapter)
    options = lora_options(config)
    tensors = read_adapter_tensors(adapter)
    take_head(tensors, config, adapter)  # which `export.heads` reads
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = sorted(key.removeprefix(prefix).removesuffix(suffix) for key in tensors if key.endswith(suffix))
    deltas: dict[str, Delta] = {}
    for name in names:
        a, b = tensors.get(f"{prefix}{name}{suffix}"), tensors.get(f"{prefix}{name}.lora_B.weight")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise UsageError(f"{adapter}: the factors of {name} do not belong together: the file is damaged")
        if a.shape[0] != options.rank_of(name):
            raise UsageError(
                f"{adapter}: {name} has rank {a.shape[0]} in the file and {options.rank_of(name)} in its "
                "adapter_config.json: the two are not of one adapter"
            )
        deltas[name] = Delta(a, b, options.scaling_of(name))
    if not deltas or len(tensors) != 2 * len(deltas):
        odd = next((k for k in tensors if ".lora_A." not in k and ".lora_B." not in k), "no factors")
        raise UsageError(f"{adapter} holds {odd}, which is not part of a plain LoRA: it cannot be merged")
    return deltas


def read_sum(adapters: Sequence[WeightedAdapter]) -> dict[str, Delta]:
    """The weighted sum of the adapters' updates. UsageError where two do not fit one model."""
    if not adapters:
        raise UsageError("there is nothing to merge: no adapter was given")
    total: dict[str, Delta] = {}
    seen: dict[Path, None] = {}
    first: dict[str, WeightedAdapter] = {}
    for adapter in adapters:
        if adapter.folder.resolve() in seen:
            raise UsageError(f"{adapter.folder} is given twice: give it once, with the sum of the weights")
        seen[adapter.folder.resolve()] = None
        for name, delta in read_deltas(adapter.folder).items():
            if adapter.weight != 1:
                delta = Delta(delta.a, delta.b, delta.scaling * adapter.weight)
            held = total.get(name)
            if held is None:
                total[name], first[name] = delta, adapter
                continue
            sizes = [f"{d.b.shape[0]} x {d.a.shape[1]}" for d in (held, delta)]
            if sizes[0] != sizes[1]:
                raise UsageError(
                    f"the adapters are of different bases: {name} is {sizes[0]} in {first[name].folder} and {sizes[1]} "
                    f"in {adapter.folder}"
                )
            total[name] = _side_by_side(held, delta)
    return total


def _side_by_side(one: Delta, two: Delta) -> Delta:
    a = torch.cat([one.a.float(), two.a.float()])
    b = torch.cat([one.b.float() * one.scaling, two.b.float() * two.scaling], 1)
    return Delta(a, b, 1.0)


def attach_deltas(model: nn.Module, deltas: Mapping[str, Delta]) -> None:
    """Put the updates beside the model's weights, unmerged. UsageError for a linear that the model has not."""
    found = segments(model)
    for name, delta in deltas.items():
        segment = found.get(name)
        if segment is None:
            raise UsageError(f"the adapter changes {name}, which the model has not: it is another model's")
        segment.adapter = LoraAdapter(delta.a, delta.b, delta.scaling).to(device_of(segment)).eval()
