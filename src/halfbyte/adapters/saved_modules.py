"""Modules that are trained whole beside the adapters: embeddings, the output head, norms, single linears.

PEFT's `modules_to_save`. The model says where its tensors are (`places`); a chosen one is exchanged for a trainable
copy in the type of the computation, and the frozen original stays, so that the base model can still be asked. Tied
embeddings are one tensor with two names, trained as one: PEFT's `ensure_weight_tying`, whose files name both.
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from halfbyte.errors import UsageError
from halfbyte.quant import DenseWeight, Weight

_KEPT = "saved_modules"
Value = Weight | nn.Parameter


@dataclass(frozen=True)
class Place:
    """A tensor of the model: its names (two where embeddings are tied), and the modules' attributes that are it."""

    names: tuple[str, ...]
    owners: tuple[tuple[nn.Module, str], ...]

    @property
    def modules(self) -> set[str]:
        return {module_of(name) for name in self.names}

    def get(self) -> Value:
        owner, attribute = self.owners[0]
        value: Value = getattr(owner, attribute)
        return value

    def set(self, value: Value) -> None:
        for owner, attribute in self.owners:
            setattr(owner, attribute, value)

    def shape(self) -> tuple[int, ...]:
        return tuple(self.get().shape)

    def tensor(self) -> Tensor:
        """The value as it is held, detached."""
        value = self.get()
        return value.dequantize(value.source_dtype).detach() if isinstance(value, Weight) else value.detach()


class _Originals(nn.Module):
    """What was exchanged, as a part of the model, so that it moves with it. Order: that of `changed`."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: list[Place] = []

    def keep(self, place: Place, value: Value) -> None:
        name = str(len(self.changed))
        if isinstance(value, Weight):
            self.add_module(name, value)
        else:
            self.register_buffer(name, value.detach())
        self.changed.append(place)

    def value(self, index: int) -> Value:
        held = getattr(self, str(index))
        return held if isinstance(held, Weight) else nn.Parameter(held, requires_grad=False)


def module_of(tensor_name: str) -> str:
    return tensor_name.rsplit(".", 1)[0]


def places(model: nn.Module) -> list[Place]:
    """Every tensor that can be trained whole, in the model's order."""
    found: dict[int, Place] = {}
    for name, owner, attribute in model.places():  # type: ignore[operator]
        key = id(getattr(owner, attribute))
        held = found.get(key, Place((), ()))
        found[key] = Place((*held.names, name), (*held.owners, (owner, attribute)))
    return list(found.values())


def names_in(model: nn.Module, wanted: Iterable[str]) -> frozenset[str]:
    """The modules whose name ends in one of `wanted`: PEFT's rule, "norm" is every norm. UsageError for none such."""
    wanted = list(wanted)
    if not wanted:
        return frozenset()
    available = list(dict.fromkeys(module_of(name) for place in places(model) for name in place.names))
    for end in wanted:
        if not any(name.endswith(end) for name in available):
            leaves = sorted({name.rsplit(".", 1)[-1] for name in available})
            near = difflib.get_close_matches(end, leaves, 1)
            hint = f"did you mean {near[0]}?" if near else f"the model has {', '.join(leaves)}"
            raise UsageError(
                f"modules_to_save: no module with weights of its own has a name that ends in {end!r}; {hint}"
            )
    return frozenset(name for name in available if any(name.endswith(end) for end in wanted))


def train(model: nn.Module, names: frozenset[str]) -> None:
    """Exchange these modules' tensors for trainable copies; one tensor with two names where either is meant."""
    for place in places(model) if names else []:  # a part of a model has adapters, and need not know its places
        if place.modules & names:
            _exchange(model, place, place.tensor())


def load(model: nn.Module, tensors: Mapping[str, Tensor], folder: Path, tied: bool) -> None:
    """Exchange tensors for those of an adapter's file, by their full names; trainable, as adapters are.

    tied   the file's writer trained tied embeddings as one (PEFT: ensure_weight_tying)

    UsageError, before anything changes, for a name or a shape that the model has not, and where tied embeddings
    came apart.
    """
    if not tensors:
        return
    remaining, chosen = dict(tensors), []
    for place in places(model):
        values = {name: remaining.pop(name) for name in place.names if name in remaining}
        if not values:
            continue
        name, value = next(iter(values.items()))
        if any(tuple(other.shape) != place.shape() for other in values.values()):
            raise UsageError(
                f"{folder}: {name} is {list(value.shape)}, and the model's {list(place.shape())}: it was trained on "
                "another base"
            )
        apart = [other for other in list(values.values())[1:] if not torch.equal(other, value)]
        if apart or (len(values) < len(place.names) and not tied):
            raise UsageError(
                f"{folder} trained {name} apart from {next(n for n in place.names if n != name)}, and in this model "
                "the two are one tensor: train it with PEFT's ensure_weight_tying, which keeps them one"
            )
        chosen.append((place, value))
    if remaining:
        raise UsageError(f"{folder}: the model has no place for {min(remaining)}: another base model?")
    for place, value in chosen:
        _exchange(model, place, value)


def _exchange(model: nn.Module, place: Place, tensor: Tensor) -> None:
    kept = model._modules.get(_KEPT)
    if not isinstance(kept, _Originals):
        kept = _Originals()
        model.add_module(_KEPT, kept)
    original = place.get()
    dtype = _trained_dtype(getattr(model, "dtype", torch.float32))
    if isinstance(original, Weight):
        made = DenseWeight(tensor.to(_device(original), dtype, copy=True), trainable=True)
        kept.keep(place, original)
        place.set(made)
        return
    own = tensor.to(original.device, _trained_dtype(original.dtype), copy=True)
    kept.keep(place, original)
    place.set(nn.Parameter(own))


def _trained_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 swallows small updates, and the optimizer refuses it."""
    return torch.float32 if dtype == torch.float16 else dtype


def _device(weight: Weight) -> torch.device:
    return next((t.device for t in (*weight.parameters(), *weight.buffers())), torch.device("cpu"))


def state(model: nn.Module) -> dict[str, Tensor]:
    """The exchanged tensors by their full names, as they are held; both names of tied embeddings."""
    return {name: place.tensor() for place in _changed(model) for name in place.names}


def is_tied(model: nn.Module) -> bool:
    """Whether one of the exchanged tensors has two names."""
    return any(len(place.names) > 1 for place in _changed(model))


def names_of(model: nn.Module) -> list[str]:
    """The exchanged modules, by their full names."""
    return list(dict.fromkeys(module_of(name) for place in _changed(model) for name in place.names))


def _changed(model: nn.Module) -> list[Place]:
    kept = model._modules.get(_KEPT)
    return kept.changed if isinstance(kept, _Originals) else []


def remove(model: nn.Module) -> None:
    """Put the originals back for good."""
    kept = model._modules.pop(_KEPT, None)
    if isinstance(kept, _Originals):
        for index, place in enumerate(kept.changed):
            place.set(kept.value(index))


@contextmanager
def originals(model: nn.Module) -> Iterator[None]:
    """The frozen originals stand in their places inside the block."""
    kept = model._modules.get(_KEPT)
    if not isinstance(kept, _Originals):
        yield
        return
    trained = [place.get() for place in kept.changed]
    for index, place in enumerate(kept.changed):
        place.set(kept.value(index))
    try:
        yield
    finally:
        for place, value in zip(kept.changed, trained, strict=True):
            place.set(value)
