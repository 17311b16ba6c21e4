"""Preference tuning: direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) for the training loop.

    reference = references(directory, model, prepared, rows, batch_tokens, identity, device, on_event)
    train(PairedModel(model, reference.train, options), plan, ...)

The reference is the model as the run finds it: without its adapter where that is fresh and adds nothing yet, with it
where it does (a run that continues an adapter). It never changes, so it is asked once, before the first step, and what
it said is kept: two numbers a pair, in memory and in RUN/reference_logprobs.safetensors. No second model is held. A
step then costs what any other of so many tokens does; asking the reference anew in each step would add a forward pass
to it in every epoch. The price is that pass over the rows before the first step (only over those that the run will
see), and that a resumed run reads the file: another reference would be another loss.

The loss of an update is the mean over its pairs. It is no sum over tokens, but it needs no more than the sum of each
answer's: the pairs' losses are computed from those in float64, and autograd takes their slopes back to the tokens, so
that the logits are held no longer than in any other run.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from halfbyte.adapters import disabled, saved_modules
from halfbyte.batch import Batch
from halfbyte.data import Example
from halfbyte.evaluate.intervals import mean_interval
from halfbyte.evaluate.preference import DpoOptions, Pairs, figures, pair_losses, rewards, score_pairs, wins
from halfbyte.files import write_atomic
from halfbyte.linear import segments

PREFERENCE_LEARNING_RATE = 2e-5
"""The default for adapters under `task: dpo`: a tenth of what they otherwise get.

TRL's own example of DPO with LoRA takes 5e-6 at alpha / r = 0.5 (its default, 1e-6, is for all weights), Axolotl's 2e-4
at the same scale; ours is 2. See docs/tasks.md.
"""

REFERENCE = "reference_logprobs.safetensors"


class TokenModel(Protocol):
    """A language model that says how likely each token is: `Decoder` and `Fallback`."""

    def token_nll(self, batch: Batch) -> Tensor: ...

    def token_logprobs(self, batch: Batch) -> Tensor: ...

    def train(self, mode: bool = True) -> object: ...


@dataclass(frozen=True)
class Reference:
    """What the reference says of training and held-out pairs: float64 [pairs, 2]; NaN where it was not asked."""

    train: Tensor
    eval: Tensor


class PairedModel:
    """The training loop's model: the loss of batches of pairs against what the reference says of them.

    reference  float64 [rows, 2] by `Batch.rows`
    """

    def __init__(self, model: TokenModel, reference: Tensor, options: DpoOptions) -> None:
        self.model, self.reference, self.options = model, reference, options
        self._seen: list[tuple[Tensor, Tensor]] = []

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """(sum of the pairs' losses, float32 scalar with a graph; how many pairs there are)."""
        pairs = Pairs.of(batch, -self.model.token_nll(batch))
        reference = self.reference[list(batch.rows[::2])].to(pairs.logprobs.device)
        self._seen.append((pairs.logprobs.detach(), reference))
        return pair_losses(pairs, reference, self.options).sum().float(), batch.loss_terms

    def train(self, mode: bool = True) -> "PairedModel":
        self.model.train(mode)
        self._seen.clear()
        return self

    def figures(self) -> dict[str, float]:
        """Rewards and their like, means over the pairs that were seen since `train` was called."""
        logprobs, reference = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        return figures(logprobs, reference, self.options)


def evaluate_pairs(
    model: TokenModel,
    examples: Sequence[Example],
    reference: Tensor,
    options: DpoOptions,
    batch_tokens: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """The loop's `evaluate`: the mean loss of held-out pairs, rewards, and how often the better answer wins.

    The last comes with its 95 % interval over pairs. None if `stop()` became true on the way.
    """
    model.train(False)

    def check(_: int) -> None:
        if stop():
            raise _Stop

    try:
        pairs = score_pairs(model, examples, batch_tokens, device, check)
    except _Stop:
        return None
    found = rewards(pairs.logprobs, reference, options)
    low, high = mean_interval(wins(found[:, 0] - found[:, 1]).tolist())
    return {
        "loss": float(pair_losses(pairs, reference, options).mean()),
        "supervised_tokens": int(pairs.tokens.sum()),
        **figures(pairs.logprobs, reference, options),
        "rewards/accuracies_low": low,
        "rewards/accuracies_high": high,
    }


class _Stop(Exception):
    pass


# ---------------------------------------------------------------- the reference


def references(
    directory: Path,
    model: nn.Module,
    train: Sequence[Example],
    held_out: Sequence[Example],
    rows: Sequence[int],
    batch_tokens: int,
    identity: Mapping[str, str],
    device: torch.device,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Reference:
    """What the reference says, from the run's folder, or of `model` as it is: call it before the first step.

    rows      the training rows that the run will see; only these are asked for
    identity  what the numbers depend on; a file of another base or other rows is not taken
    on_event  hears {"event": "reference", "pairs": to be asked about, "pairs_done"} as it goes
    """
    known = read_references(directory, identity, train, held_out)
    missing, unseen = lacking(known, rows)
    asked: Any = model
    total, done = len(missing) + len(unseen), 0
    if total == 0:
        return known

    def tell(count: int) -> None:
        nonlocal done
        done += count
        on_event({"event": "reference", "pairs": total, "pairs_done": done})

    tell(0)
    model.train(False)
    with nullcontext() if adds_something(model) else disabled(model):
        for table, examples, wanted in ((known.train, train, missing), (known.eval, held_out, unseen)):
            found = score_pairs(asked, [examples[row] for row in wanted], batch_tokens, device, tell)
            table[wanted] = found.logprobs
    write_references(directory / REFERENCE, known, identity)
    return known


def adds_something(model: nn.Module) -> bool:
    """Whether some adapter is not, as a fresh one is, zero; what is trained whole or has magnitudes may be changed."""
    adapters = [segment.adapter for segment in segments(model).values() if segment.adapter is not None]
    changed = bool(saved_modules.names_of(model)) or any(adapter.magnitude is not None for adapter in adapters)
    return changed or any(bool(adapter.lora_B.any()) for adapter in adapters)


def lacking(known: Reference, rows: Sequence[int]) -> tuple[list[int], list[int]]:
    """(those of the training rows `rows`, the held-out rows) that the reference was not asked about."""
    missing = [row for row in sorted(set(rows)) if bool(known.train[row].isnan().any())]
    return missing, [row for row in range(len(known.eval)) if bool(known.eval[row].isnan().any())]


def read_references(
    directory: Path, identity: Mapping[str, str], train: Sequence[Example], held_out: Sequence[Example]
) -> Reference:
    """What a run's folder keeps of these rows; NaN throughout where it has no file, or one that does not fit."""
    fresh = Reference(*(torch.full((len(rows), 2), torch.nan, dtype=torch.float64) for rows in (train, held_out)))
    try:
        with safe_open(directory / REFERENCE, framework="pt") as file:
            if file.metadata() != dict(identity):
                return fresh
            found = Reference(file.get_tensor("train"), file.get_tensor("eval"))
    except (OSError, SafetensorError):
        return fresh
    fits = found.train.shape == fresh.train.shape and found.eval.shape == fresh.eval.shape
    return found if fits else fresh


def write_references(path: Path, reference: Reference, identity: Mapping[str, str]) -> None:
    """Keep what the reference said, with what it depends on."""
    write_atomic(path, save({"train": reference.train, "eval": reference.eval}, dict(identity)))
