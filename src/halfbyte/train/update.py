"""The gradient of one update: micro-batches weighted by supervised tokens, numbers checked, culprits named.

The loss of an update is the sum of the negative log-likelihoods of all its supervised tokens divided by their number.
Each micro-batch therefore contributes its sum divided by the tokens of the *update*; the mean of the micro-batches'
means would weight tokens by how rows happened to be cut.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from halfbyte.batch import Batch
from halfbyte.errors import HalfbyteError
from halfbyte.optim.adamw import AdamW, global_norm


class Model(Protocol):
    """What the loop asks of a model: `halfbyte.models.Decoder`, `Fallback`, or any nn.Module with this `loss`."""

    def loss(self, batch: Batch) -> tuple[Tensor, int]: ...

    def train(self, mode: bool = True) -> object: ...


FIRST_LOSS_SCALE = 2.0**16


class NonFinite(HalfbyteError):
    """A loss or a gradient is NaN or infinite; the weights are those of the update before.

    weights_are_finite    False where the trained weights themselves already were not
    """

    def __init__(self, message: str, weights_are_finite: bool = True) -> None:
        super().__init__(message)
        self.weights_are_finite = weights_are_finite


class Stopped(Exception):
    """Somebody asked to stop between two micro-batches; the gradient is incomplete and to be thrown away."""


@dataclass(frozen=True)
class Update:
    """What `backward` found; the gradient itself is in the parameters, times `1 / unscale`."""

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
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
    supervised = sum(batch.supervised_tokens for batch in batches)
    if supervised == 0:
        raise HalfbyteError(f"step {step}: nothing is supervised in {_where(batches, locate)}: remove these rows")
    while True:
        optimizer.zero_grad()
        nlls: list[Tensor] = []
        for index, batch in enumerate(batches):
            if stop():
                raise Stopped
            nlls.append(_backward_one(model, batch, seed_for(seed, step, index), scale.value / supervised))
        loss = float(torch.stack(nlls).double().sum()) / supervised
        norm = global_norm(optimizer.gradients()) / scale.value
        if math.isfinite(loss) and math.isfinite(norm):
            break
        if not (math.isfinite(loss) and scale.shrink()):
            raise explain(model, optimizer, batches, seed, step, loss, scale, locate)
    return Update(loss, norm, sum(b.tokens for b in batches), supervised, 1.0 / scale.value)


def _backward_one(model: Model, batch: Batch, seed: int, factor: float) -> Tensor:
    """Add one micro-batch's gradient; returns its sum of negative log-likelihoods, without a graph."""
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
        nll = _backward_one(model, batch, seed_for(seed, step, index), scale.value / max(1, batch.supervised_tokens))
        return not (math.isfinite(float(nll)) and math.isfinite(global_norm(optimizer.gradients())))

    guilty: list[Batch] = []
    documents = 0
    for index, batch in enumerate(batches):
        documents += len(batch.lengths)
        if is_bad(batch, index):
            alone = [document for document in split(batch) if is_bad(document, index)]
            guilty += alone or [batch]
    optimizer.zero_grad()
    advice = "check the row, or lower learning_rate"
    if not guilty:
        cause, advice = "No micro-batch shows it alone: the sum of their gradients overflows", "lower learning_rate"
    elif sum(len(batch.lengths) for batch in guilty) == documents > 1:
        cause, advice = f"Every row shows it ({_where(guilty, locate)})", "lower learning_rate, or check the model"
    else:
        cause = f"Caused by {_where(guilty, locate)}"
    return NonFinite(f"{stopped}. {cause}: {advice}")


def split(batch: Batch) -> list[Batch]:
    """The documents of a batch, each as a batch of its own."""
    borders = [0]
    for length in batch.lengths:
        borders.append(borders[-1] + length)
    return [
        replace(
            batch,
            input_ids=batch.input_ids[start:stop],
            position_ids=batch.position_ids[start:stop],
            targets=batch.targets[start:stop],
            lengths=(stop - start,),
            rows=batch.rows[i : i + 1],
            sources=batch.sources[i : i + 1],
        )
        for i, (start, stop) in enumerate(pairwise(borders))
    ]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    if batch.input_ids.device == device:
        return batch
    moved = (t.to(device, non_blocking=True) for t in (batch.input_ids, batch.position_ids, batch.targets))
    input_ids, position_ids, targets = moved
    return replace(batch, input_ids=input_ids, position_ids=position_ids, targets=targets)


def _where(batches: Sequence[Batch], locate: Callable[[int], str]) -> str:
    """The rows of some batches in words; at most five by name."""
    rows = [locate(row) for batch in batches for row in batch.rows]
    if not rows:
        return f"{sum(len(batch.lengths) for batch in batches)} rows without a known place"
    rest = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return ", ".join(rows[:5]) + rest
