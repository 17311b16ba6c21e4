"""The gradient of one update: micro-batches weighted by their terms, numbers checked, culprits named.

The loss of an update is the sum of the negative log-likelihoods of all its supervised tokens divided by their number
(of pairs of answers: of all their losses, by the number of pairs). Each micro-batch therefore contributes its sum
divided by the terms of the *update*; the mean of the micro-batches' means would weight them by how rows happened to be
cut.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.batch import Batch
from halfbyte.errors import HalfbyteError
from halfbyte.heap import give_back
from halfbyte.optim.adamw import AdamW, NonFiniteGradient


class Model(Protocol):
    """What the loop asks of a model: `halfbyte.models.Decoder`, `Fallback`, or any nn.Module with this `loss`.

    It returns the sum over a batch's terms and how many they are: `Batch.loss_terms`.
    """

    def loss(self, batch: Batch) -> tuple[Tensor, int]: ...

    def train(self, mode: bool = True) -> object: ...


FIRST_LOSS_SCALE = 2.0**16


class NonFinite(HalfbyteError):
    """A loss or a gradient is NaN or infinite.

    worth_saving    the weights in memory are those of the update before, and finite; False where they themselves
                    already were not, or where a part of them is an update further (per-layer updates)
    """

    def __init__(self, message: str, worth_saving: bool = True) -> None:
        super().__init__(message)
        self.worth_saving = worth_saving


class Stopped(Exception):
    """Somebody asked to stop between two micro-batches; the gradient is incomplete and to be thrown away."""


@dataclass(frozen=True)
class Update:
    """What `backward` found; the gradient itself is in the parameters, times `1 / unscale`.

    loss    the mean over `terms`: supervised tokens, or pairs
    """

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    terms: int
    unscale: float


@dataclass
class LossScale:
    """Keeps fp16 gradients in range: the loss is multiplied by `value` before the backward pass.

    An overflow halves it and the same update is computed again, so no rows are lost; after `interval` updates in a row
    without one it doubles. Micikevicius et al. 2018, arXiv 1710.03740, section 3.2.
    """

    value: float
    good_updates: int = 0
    enabled: bool = True
    interval: int = 2000

    def grow(self) -> None:
        """Count an update without overflow."""
        self.good_updates += 1
        if self.enabled and self.good_updates >= self.interval:
            self.value, self.good_updates = self.value * 2.0, 0

    def shrink(self) -> bool:
        """Halve; False where that cannot help any more (or there is no scaling), so the overflow is real."""
        self.good_updates = 0
        if not self.enabled or self.value <= 1.0:
            return False
        self.value /= 2.0
        return True


def seed_for(seed: int, step: int, micro_batch: int) -> int:
    """The seed of torch's generators for one micro-batch; a hash, so that neighbours are unrelated."""
    digest = hashlib.blake2b(f"{seed}/{step}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def backward(
    model: Model,
    optimizer: AdamW,
    batches: Sequence[Batch],
    seed: int,
    step: int,
    scale: LossScale,
    stop: Callable[[], bool],
    locate: Callable[[int], str],
) -> Update:
    """Put the gradient of one update into the parameters of `optimizer`.

    Randomness (dropout) depends on (seed, step, micro-batch) alone. Raises `Stopped` after the micro-batch during which
    `stop()` became true, and `NonFinite` with the rows that cause it.
    """
    terms = sum(batch.loss_terms for batch in batches)
    if terms == 0:
        raise HalfbyteError(f"step {step}: nothing is supervised in {_where(batches, locate)}: remove these rows")
    while True:
        optimizer.zero_grad()
        nlls: list[Tensor] = []
        for index, batch in enumerate(batches):
            if stop():
                raise Stopped
            nlls.append(_backward_one(model, batch, seed_for(seed, step, index), scale.value / terms))
            if optimizer.takes_gradients:
                give_back()  # the room of gradients that came and went, which the loss of the next pass cannot use
        loss = float(torch.stack(nlls).double().sum()) / terms
        norm = optimizer.grad_norm() / scale.value
        if math.isfinite(loss) and math.isfinite(norm):
            break
        if not (math.isfinite(loss) and scale.shrink()):
            raise explain(model, optimizer, batches, seed, step, loss, scale, locate)
    tokens, supervised = sum(b.tokens for b in batches), sum(b.supervised_tokens for b in batches)
    return Update(loss, norm, tokens, supervised, terms, 1.0 / scale.value)


def update_by_layer(
    model: Model,
    optimizer: AdamW,
    batches: Sequence[Batch],
    seed: int,
    step: int,
    learning_rate: float,
    stop: Callable[[], bool],
    locate: Callable[[int], str],
) -> Update:
    """One update whose layers are updated during the backward pass; see `AdamW.updating`.

    There is one micro-batch, as no gradient outlives the pass. A loss that is not finite stops before any weight moves;
    a gradient stops before its own layer, and then the weights in memory are of no step (`NonFinite.worth_saving`).
    """
    if len(batches) != 1:
        raise HalfbyteError(f"step {step}: per-layer updates need one micro-batch an update, not {len(batches)}")
    (batch,) = batches
    if batch.supervised_tokens == 0:
        raise HalfbyteError(f"step {step}: nothing is supervised in {_where(batches, locate)}: remove these rows")
    if stop():
        raise Stopped
    optimizer.zero_grad()
    torch.manual_seed(seed_for(seed, step, 0))
    nll, _ = model.loss(batch)
    loss = float(nll.detach()) / batch.loss_terms
    if not math.isfinite(loss):
        del nll
        raise explain(model, optimizer, batches, seed, step, loss, LossScale(1.0, enabled=False), locate)
    try:
        with optimizer.updating(learning_rate):
            (nll * (1.0 / batch.loss_terms)).backward()
    except NonFiniteGradient as error:
        raise NonFinite(
            f"step {step}: {error}; stopped before this layer's update, and as layers after it already have theirs the "
            f"weights in memory are not saved: the last checkpoint counts. It is in {_where(batches, locate)}: check "
            "the rows, or lower learning_rate",
            worth_saving=False,
        ) from None
    give_back()
    return Update(loss, optimizer.grad_norm(), batch.tokens, batch.supervised_tokens, batch.loss_terms, 1.0)


def _backward_one(model: Model, batch: Batch, seed: int, factor: float) -> Tensor:
    """Add one micro-batch's gradient; returns the sum of its terms, without a graph."""
    torch.manual_seed(seed)
    if batch.supervised_tokens == 0:
        return torch.zeros((), device=batch.input_ids.device)
    nll, _ = model.loss(batch)
    (nll * factor).backward()
    return nll.detach().float()


def explain(
    model: Model,
    optimizer: AdamW,
    batches: Sequence[Batch],
    seed: int,
    step: int,
    loss: float,
    scale: LossScale,
    locate: Callable[[int], str],
) -> NonFinite:
    """Find the rows behind a NaN or an infinity by computing the micro-batches, then their documents, one by one."""
    broken = [slot.name for slot in optimizer.slots if not bool(slot.parameter.isfinite().all())]
    what = "gradient" if math.isfinite(loss) else "loss"
    stopped = (
        f"step {step}: the {what} is not finite; stopped before the update, the weights are those of step {step - 1}"
    )
    if broken:
        return NonFinite(f"{stopped}. {len(broken)} trained tensors already were not finite, {broken[0]} first", False)

    def is_bad(batch: Batch, index: int) -> bool:
        optimizer.zero_grad()
        nll = _backward_one(model, batch, seed_for(seed, step, index), scale.value / max(1, batch.loss_terms))
        return not (math.isfinite(float(nll)) and math.isfinite(optimizer.grad_norm()))

    guilty: list[Batch] = []
    documents = 0
    for index, batch in enumerate(batches):
        documents += len(batch.lengths) // (1 + batch.paired)
        if is_bad(batch, index):
            alone = [document for document in split(batch) if is_bad(document, index)]
            guilty += alone or [batch]
    optimizer.zero_grad()
    advice = "check the row, or lower learning_rate"
    if not guilty:
        cause, advice = "No micro-batch shows it alone: the sum of their gradients overflows", "lower learning_rate"
    elif sum(len(batch.lengths) // (1 + batch.paired) for batch in guilty) == documents > 1:
        cause, advice = f"Every row shows it ({_where(guilty, locate)})", "lower learning_rate, or check the model"
    else:
        cause = f"Caused by {_where(guilty, locate)}"
    return NonFinite(f"{stopped}. {cause}: {advice}")


def split(batch: Batch) -> list[Batch]:
    """The documents of a batch (the pairs, where it has such), each as a batch of its own."""
    together = 2 if batch.paired else 1
    borders = [0, *accumulate(batch.lengths)][::together]
    return [
        replace(
            batch,
            input_ids=batch.input_ids[start:stop],
            position_ids=batch.position_ids[start:stop],
            targets=batch.targets[start:stop],
            lengths=batch.lengths[together * i : together * (i + 1)],
            rows=batch.rows[together * i : together * (i + 1)],
            sources=batch.sources[together * i : together * (i + 1)],
        )
        for i, (start, stop) in enumerate(pairwise(borders))
    ]


def _where(batches: Sequence[Batch], locate: Callable[[int], str]) -> str:
    """The rows of some batches in words; at most five by name."""
    rows = [locate(row) for batch in batches for row in batch.rows[:: 1 + batch.paired]]
    if not rows:
        return f"{sum(len(batch.lengths) for batch in batches)} rows without a known place"
    rest = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return ", ".join(rows[:5]) + rest
