"""What adapters do to a model, as values: read from PEFT folders, weighted, summed, and put beside a model's weights.

A sum of low-rank updates is a low-rank update: the factors side by side, [A1; A2] and [w1 s1 B1, w2 s2 B2]. PEFT calls
this combination "cat". So whatever takes one adapter takes several. What is not linear in its factors (DoRA's row
norms) or takes the weight's place (modules_to_save) stands alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from halfbyte.adapters import saved_modules
from halfbyte.adapters.initial import Initial, Shift
from halfbyte.adapters.lora import Base, put
from halfbyte.adapters.peft_io import Factors, read_adapter
from halfbyte.errors import UsageError
from halfbyte.linear import segments
from halfbyte.linear.dora import divisor


@dataclass(frozen=True)
class Delta:
    """One linear's update: scaling * B A, by rows of the output. `a` is [rank, in], `b` is [out, rank].

    magnitude  [out]: the length of every row of the weight with its update (DoRA); None: as it comes
    shift      what the base was freed of in training, [r, in] and [out, r] (PiSSA, LoftQ)
    """

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    shift: Shift | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        """scaling * B A of these rows, float32."""
        return (self.b[start:stop].float() @ self.a.float()) * self.scaling

    def applied(self, weight: Tensor, start: int, shifted: bool) -> Tensor:
        """Rows of the base from `start` on, float32, with the update; `shifted`: the shift is out of them already."""
        stop = start + weight.shape[0]
        merged = weight + self.rows(start, stop)
        if self.shift is not None and not shifted:
            merged -= self.shift.rows(start, stop)
        if self.magnitude is not None:
            merged *= (self.magnitude[start:stop].float() / divisor(merged.norm(dim=1)))[:, None]
        return merged

    def as_plain(self) -> "Delta":
        """Over the base before the shift."""
        plain = Factors(self.a, self.b, self.scaling, self.magnitude, self.shift).as_plain()
        return Delta(plain.a, plain.b, plain.scaling, plain.magnitude)


@dataclass(frozen=True, eq=False)
class Deltas(Mapping[str, Delta]):
    """Everything that an adapter changes: updates by the linear's name (the mapping itself), and whole tensors.

    whole  by full name: they take the place of the base's (modules_to_save)
    tied   tied embeddings among them are one tensor
    """

    updates: Mapping[str, Delta]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    tied: bool = False
    folder: Path = Path()

    def __getitem__(self, name: str) -> Delta:
        return self.updates[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.updates)

    def __len__(self) -> int:
        return len(self.updates)

    @property
    def off_the_base(self) -> frozenset[str]:
        """The tensors that are no small change of what the base's own blocks hold, by full name."""
        return frozenset(self.whole) | {f"{name}.weight" for name in self.shifts}

    @property
    def shifts(self) -> dict[str, Shift]:
        """By the linear's name."""
        return {name: delta.shift for name, delta in self.updates.items() if delta.shift is not None}


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


def read_deltas(adapter: Path) -> Deltas:
    """What a PEFT folder changes. UsageError for one that is broken, or is more than LoRA, DoRA and whole modules."""
    file = read_adapter(adapter)
    updates = {
        name: Delta(one.a, one.b, one.scaling, one.magnitude, one.shift) for name, one in sorted(file.factors.items())
    }
    return Deltas(updates, file.saved, file.tied, adapter)


def read_sum(adapters: Sequence[WeightedAdapter]) -> Deltas:
    """The weighted sum of the adapters' updates. UsageError where two do not fit one model, or cannot be summed.

    One adapter with weight 1 is itself; in a sum each is what it is over the model's own base, without a shift.
    """
    if not adapters:
        raise UsageError("there is nothing to merge: no adapter was given")
    if len(adapters) == 1 and adapters[0].weight == 1:
        return read_deltas(adapters[0].folder)
    total: dict[str, Delta] = {}
    seen: dict[Path, None] = {}
    first: dict[str, WeightedAdapter] = {}
    for adapter in adapters:
        if adapter.folder.resolve() in seen:
            raise UsageError(f"{adapter.folder} is given twice: give it once, with the sum of the weights")
        seen[adapter.folder.resolve()] = None
        for name, delta in _summable(adapter).items():
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
    return Deltas(total, folder=adapters[0].folder)


def _summable(adapter: WeightedAdapter) -> dict[str, Delta]:
    """The adapter's updates over the base itself, weighted. UsageError where they are not updates that can be added."""
    found = read_deltas(adapter.folder)
    if found.whole:
        raise UsageError(
            f"{adapter.folder} holds whole modules ({min(found.whole)}), which take the base's place: they cannot be "
            "weighted or summed with another adapter. Merge it alone, with weight 1"
        )
    if any(delta.magnitude is not None for delta in found.values()):
        raise UsageError(
            f"{adapter.folder} is a DoRA, whose row norms are of its own weight and update: it cannot be weighted "
            "or summed with another adapter. Merge it alone, and the others into the result"
        )
    plain = {name: delta.as_plain() for name, delta in found.items()}
    return {name: replace(delta, scaling=delta.scaling * adapter.weight) for name, delta in plain.items()}


def _side_by_side(one: Delta, two: Delta) -> Delta:
    a = torch.cat([one.a.float(), two.a.float()])
    b = torch.cat([one.b.float() * one.scaling, two.b.float() * two.scaling], 1)
    return Delta(a, b, 1.0)


def attach_deltas(model: nn.Module, deltas: Mapping[str, Delta], base: Base | None = None) -> None:
    """Put the changes beside the model's weights, unmerged. UsageError for a linear that the model has not.

    base  makes shifted bases again as training held them; not needed without shifts
    """
    found = segments(model)
    if isinstance(deltas, Deltas):
        saved_modules.load(model, deltas.whole, deltas.folder, deltas.tied)
    for name, delta in deltas.items():
        segment = found.get(name)
        if segment is None:
            raise UsageError(f"the adapter changes {name}, which the model has not: it is another model's")
        if delta.shift is not None:
            assert base is not None, "a shifted base is made from its source"
            segment.weight = base.held(name, delta.shift.rows)
        initial = Initial(delta.a, delta.b, delta.shift)
        put(segment, initial, delta.scaling, magnitude=delta.magnitude).eval()
