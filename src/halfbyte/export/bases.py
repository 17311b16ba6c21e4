"""Which base is right? Every candidate for a merge, scored on held-out rows, and the nearest to what was trained.

    16bit                      the source's own weights, which a QLoRA adapter has not seen
    dequantized                the 4-bit weights that it was trained on, dequantized
    ..., requantized           the merged result quantized once more: what a server sees that loads it in 4 bits

The last is another question with another answer: dequantized weights lie on the format's levels, and quantizing them
again rounds a small update away, while around the 16-bit weights, which lie between levels, part of it survives.

Nothing is written for this. A candidate is loaded from its plan (`planned_source`) as it would be from its folder, one
at a time, and beside it lies only the unmerged model's output matrix.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psutil
import torch

from halfbyte.errors import DoesNotFit, HalfbyteError
from halfbyte.export.deltas import Delta, attach_deltas
from halfbyte.export.heads import Head
from halfbyte.export.merged_tensors import plan_tensors
from halfbyte.export.planned_source import PlannedSource
from halfbyte.export.safetensors_file import Planned
from halfbyte.export.score import HeldOut, Said, Score, compare, listen
from halfbyte.heap import give_back
from halfbyte.models.load import load_model, resolve_device, resolve_dtype
from halfbyte.models.options import ModelOptions
from halfbyte.models.shifted_source import LinearBase
from halfbyte.models.source import ModelSource
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import QuantOptions

Base = Literal["16bit", "dequantized"]
OnEvent = Callable[[str], None]
Listener = Callable[[Any, Any], Said]
"""Asks a model, with its tokenizer, everything that is compared; the model is gone when it returns."""


@dataclass(frozen=True)
class Candidate:
    """A way to merge: into which base, and whether the result is seen in 4 bits."""

    base: Base
    requantized: bool = False

    @property
    def name(self) -> str:
        return f"{self.base}, requantized" if self.requantized else self.base


@dataclass(frozen=True)
class Merging:
    """What is merged: the model, how its base was held in training, the updates, and the type of the result."""

    model: ModelOptions
    source: ModelSource
    quant: QuantOptions | None
    deltas: Mapping[str, Delta]
    dtype: torch.dtype
    head: Head | None = None

    def plan(self, base: Base) -> list[Planned]:
        quant = self.quant if base == "dequantized" else None
        return plan_tensors(self.model, self.source, self.deltas, quant, self.dtype, self.head)

    @property
    def compute_dtype(self) -> torch.dtype:
        """As in training, but float16, which is for GPUs: on a CPU it would add its own overflow to the scores."""
        device = resolve_device(self.model.device)
        found = resolve_dtype(self.model.dtype, device)
        return torch.float32 if found == torch.float16 and device.type == "cpu" else found


@dataclass(frozen=True)
class ScoreTable:
    """All candidates' scores. `chosen` is the one to merge; `max_kl` the limit beyond which none is taken."""

    rows: HeldOut
    unmerged: Score
    scores: tuple[tuple[Candidate, Score], ...]
    chosen: Candidate
    max_kl: float

    @property
    def best(self) -> Score:
        return dict(self.scores)[self.chosen]

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": len(self.rows.examples),
            "held_out_rows": self.rows.available,
            "seed": self.rows.seed,
            "tokens": self.rows.tokens,
            "supervised_tokens": self.rows.positions,
            "max_kl": self.max_kl,
            "chosen": self.chosen.name,
            "unmerged": self.unmerged.to_json(),
            "candidates": [score.to_json() for _, score in self.scores],
        }

    def require_close(self) -> None:
        """NotAsTrained where even the best candidate is further from the unmerged model than `max_kl`."""
        if not self.best.kl <= self.max_kl:
            raise NotAsTrained(
                f"merged into the best base ({self.chosen.name}) the model does not behave as trained: KL "
                f"{self.best.kl:.3g} nats a token on {len(self.rows.examples)} held-out rows, and {self.max_kl:g} is "
                "the limit; nothing was written. Serve base and adapter unmerged, or accept it with --max-kl",
                self,
            )


class NotAsTrained(HalfbyteError):
    """No candidate behaves as the model that was trained. `table` says by how much."""

    def __init__(self, message: str, table: ScoreTable) -> None:
        super().__init__(message)
        self.table = table


def score_candidates(
    merging: Merging,
    rows: HeldOut,
    candidates: Sequence[Candidate],
    max_kl: float,
    answer_tokens: int = 32,
    metrics: Sequence[str] = (),
    on_event: OnEvent | None = None,
) -> ScoreTable:
    """Score each candidate against the unmerged model and choose the one of least KL.

    Where candidates are requantized, the choice is among those: they are what will be served.

    Raises DoesNotFit, before anything is loaded, where a candidate exceeds the free memory.
    """
    say = on_event or (lambda what: None)
    require_memory(merging)

    def heard(model: Any, tokenizer: Any) -> Said:
        return listen(model, tokenizer, rows, answer_tokens, metrics)

    started = time.monotonic()
    say("scoring the unmerged model")
    reference = unmerged_says(merging, heard)
    unmerged = compare("unmerged", reference, reference, rows, time.monotonic() - started)
    scores = []
    for candidate in candidates:
        if not ModelSpec.serves(merging.source.config):
            gc.collect()  # transformers' models refer to themselves; the decoder is gone with its last name
        give_back()
        started = time.monotonic()
        say(f"scoring {candidate.name}")
        said = merged_says(merging, candidate, heard)
        scores.append((candidate, compare(candidate.name, said, reference, rows, time.monotonic() - started)))
        del said
    served = [c for c in candidates if c.requantized] or list(candidates)
    found = dict(scores)
    return ScoreTable(rows, unmerged, tuple(scores), min(served, key=lambda c: found[c].kl), max_kl)


def require_memory(merging: Merging) -> None:
    """DoesNotFit where a merged model exceeds the free memory."""
    numel = sum(math.prod(info.shape) for info in merging.source.tensors().values())
    needed = 1.2 * numel * merging.compute_dtype.itemsize
    free = psutil.virtual_memory().available
    if resolve_device(merging.model.device).type == "cpu" and needed > free:
        raise DoesNotFit(
            f"scoring a merged model needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free: give "
            "--base dequantized to merge without scores"
        )


def unmerged_says(merging: Merging, listener: Listener) -> Said:
    """What the model says as it was trained: the base as training held it, the updates beside it."""
    loaded = load_model(merging.model, merging.quant, merging.compute_dtype, source=merging.source)
    attach_deltas(loaded.model, merging.deltas, LinearBase(loaded, merging.quant))
    return listener(loaded.model.eval(), loaded.tokenizer)


def merged_says(merging: Merging, candidate: Candidate, listener: Listener) -> Said:
    """What a candidate says, loaded from its plan as from its folder."""
    source = PlannedSource(merging.plan(candidate.base), merging.source)
    quant = merging.quant if candidate.requantized else None
    loaded = load_model(merging.model, quant, merging.compute_dtype, source=source)
    return listener(loaded.model.eval(), loaded.tokenizer)
