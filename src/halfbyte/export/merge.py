"""Merging LoRA adapters into a folder that transformers loads.

Which base is right is measured where it can be (`bases`): a QLoRA adapter was trained against the dequantized weights,
the source's own 16-bit weights are a base that it has never seen. The sum is computed in float32 and rounded once,
W' = round(W + scaling * B A).

Everything is planned first (names, shapes, sizes, what goes where) and then streamed: a tensor is read, quantized and
dequantized as training did, and written in pieces of rows. Held at once are one tensor and its quantized form, not
the model; architectures without a decoder of ours are loaded whole, in the form they were trained in.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from halfbyte.errors import DoesNotFit, UsageError
from halfbyte.export.bases import Base, Candidate, Merging, OnEvent, ScoreTable, score_candidates
from halfbyte.export.card import already_quantized
from halfbyte.export.deltas import Delta, WeightedAdapter, read_deltas, read_sum
from halfbyte.export.folder import check_output, new_folder
from halfbyte.export.heads import read_head
from halfbyte.export.merged_tensors import base_is_the_sources_own, plan_tensors
from halfbyte.export.model_files import write_model_files
from halfbyte.export.safetensors_file import INDEX, Planned, plan_shards, shard_index, write_file
from halfbyte.export.score import HeldOut
from halfbyte.export.verify import MAX_KL, Comparison, check_written, compare_logits
from halfbyte.files import require_free_space
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import ModelSource, open_source
from halfbyte.options import Options
from halfbyte.quant import QuantOptions

__all__ = ["Delta", "MergeOptions", "MergeReport", "WeightedAdapter", "merge", "plan_tensors", "read_deltas"]

_SMALL_FILES = 64_000_000  # tokenizer, config and index, for the check of the disk


class MergeOptions(Options):
    """How an adapter becomes a part of its model."""

    base: Literal["auto", "16bit", "dequantized", "trained"] | None = Field(
        default=None,
        description="what to merge into: the source's own 16-bit weights, the weights that the adapter was trained on "
        "(dequantized, if it was QLoRA; also called trained), or auto: whichever is nearer to the unmerged model on "
        "held-out rows; by default auto for a QLoRA run with held-out rows, else dequantized",
    )
    requantized: bool = Field(
        default=False,
        description="score the result quantized once more, as in training: what a server sees that loads the merged "
        "folder in 4 bits; auto then chooses by that",
    )
    rows: int = Field(default=64, ge=1, description="held-out rows to score on, drawn by the run's seed")
    answer_tokens: int = Field(default=32, ge=1, description="longest greedy answer that is compared")
    metrics: tuple[str, ...] = Field(
        default=(), description="scores of the answers beside the KL, as in evaluate (accuracy comes by itself)"
    )
    max_kl: float = Field(
        default=MAX_KL,
        gt=0,
        description="refuse a merge whose KL from the unmerged model is larger, in nats a token",
    )
    merge_dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="type of the merged weights"
    )
    verify: bool = Field(default=True, description="compare the merged model's logits with the unmerged one's")
    overwrite: bool = Field(default=False, description="replace an existing model folder at the output")
    shard_gb: float = Field(default=5.0, gt=0, description="largest file, in GB")


@dataclass(frozen=True)
class MergeReport:
    """What was written, and how it compares. `base` says in words what the adapter was merged into.

    adapters    folders with their weights, as they were summed
    scores      the candidates on held-out rows; None where they were not scored, and `not_scored` says why ("" where
                nobody asked)
    comparison  the written folder on a short text; None where that was left out
    """

    path: Path
    base: str
    dtype: str
    nbytes: int
    tensors: int
    merged: int
    seconds: float
    comparison: Comparison | None
    adapters: tuple[str, ...] = ()
    scores: ScoreTable | None = None
    not_scored: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "path": str(self.path),
            "base": self.base,
            "adapters": list(self.adapters),
            "dtype": self.dtype,
            "bytes": self.nbytes,
            "tensors": self.tensors,
            "merged_linears": self.merged,
            "seconds": self.seconds,
            "scores": None if self.scores is None else self.scores.to_json(),
            "not_scored": self.not_scored or None,
            "comparison": None if self.comparison is None else self.comparison.to_json(),
        }


def merge(
    model: ModelOptions,
    adapter: Path | Sequence[WeightedAdapter],
    out: Path,
    quant: QuantOptions | None = None,
    options: MergeOptions | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    rows: HeldOut | None = None,
    source: ModelSource | None = None,
    on_event: OnEvent | None = None,
) -> MergeReport:
    """Write the model with the adapter merged in to the folder `out`.

    model, quant  the base as it was loaded for training; quant is None for LoRA on 16-bit weights
    adapter       a PEFT folder (a halfbyte run directory is one), or several with weights
    rows          what the candidates for a base are scored on; None: the options must not ask for it
    source        `model`, where it is open already
    on_progress   hears (bytes written, bytes in all)
    on_event      hears what is being scored

    Raises UsageError for an adapter that does not fit the model or an output that may not be written, DoesNotFit for
    a full disk, HalfbyteError where the result is not what was computed or (NotAsTrained) does not behave as trained;
    `out` is then untouched.
    """
    options = options or MergeOptions()
    started = time.monotonic()
    source = source or open_source(model.model, model.revision)
    adapters = [WeightedAdapter(adapter)] if isinstance(adapter, Path) else list(adapter)
    deltas = read_sum(adapters)
    check_output(out, options.overwrite, (source.path, *(one.folder for one in adapters)))
    head = read_head(adapters, source)
    merging = Merging(model, source, quant, deltas, getattr(torch, options.merge_dtype), head)
    base, scores, not_scored = _choose_base(merging, options, rows, on_event)
    plan = merging.plan(base)
    shards = plan_shards(plan, int(options.shard_gb * 1e9))
    total = sum(tensor.nbytes for tensor in plan)
    require_free_space(out.parent, total + _SMALL_FILES, f"the merged model ({out})")
    with new_folder(out) as folder:
        _write_weights(folder, shards, total, on_progress)
        labels = None if head is None else head.labels
        write_model_files(folder, source, adapters[0].folder, options.merge_dtype, labels)
        check_written(folder, plan)
        comparison = None
        if options.verify:
            comparison = compare_logits(model, deltas, folder, quant, options.merge_dtype, total, head)
            comparison.require_close(strict=base == "dequantized" or quant is None, limit=options.max_kl)
    return MergeReport(
        path=out,
        base=describe_base(source, quant, base),
        dtype=options.merge_dtype,
        nbytes=total,
        tensors=len(plan),
        merged=len(deltas),
        seconds=time.monotonic() - started,
        comparison=comparison,
        adapters=tuple(map(str, adapters)),
        scores=scores,
        not_scored=not_scored,
    )


def _choose_base(
    merging: Merging, options: MergeOptions, rows: HeldOut | None, on_event: OnEvent | None
) -> tuple[Base, ScoreTable | None, str]:
    """(what to merge into, the scores that say so, why there are none). UsageError where scores cannot be had."""
    asked = "dequantized" if options.base == "trained" else options.base
    one_base = base_is_the_sources_own(merging.source, merging.quant)
    if options.requantized and merging.quant is None:
        raise UsageError("--requantized is for adapters of a quantized base: there is no format to quantize to again")
    if rows is None:
        if asked == "auto" or options.requantized:
            flag = "--base auto" if asked == "auto" else "--requantized"
            raise UsageError(f"{flag} scores on held-out rows, and there are none: give --data, or --base dequantized")
        return asked or "dequantized", None, ""
    unasked = asked is None
    if asked is None:
        asked = "dequantized" if merging.quant is None else "auto"
    if asked != "auto" and not options.requantized:
        return asked, None, ""
    bases: tuple[Base, ...] = (asked,) if asked != "auto" else ("16bit", "dequantized")
    if one_base:
        bases = ("dequantized",)
    seen = (False, True) if options.requantized else (False,)
    candidates = [Candidate(base, again) for again in seen for base in bases]
    try:
        scores = score_candidates(
            merging, rows, candidates, options.max_kl, options.answer_tokens, options.metrics, on_event
        )
    except DoesNotFit as error:
        if not unasked or options.requantized:
            raise
        return "dequantized", None, str(error)
    scores.require_close()
    return scores.chosen.base, scores, ""


def _write_weights(
    folder: Path, shards: dict[str, list[Planned]], total: int, on_progress: Callable[[int, int], None] | None
) -> None:
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    for file, tensors in shards.items():
        write_file(folder / file, tensors, on_bytes)
    if len(shards) > 1:
        (folder / INDEX).write_text(shard_index(shards))


def describe_base(source: ModelSource, quant: QuantOptions | None, base: Base) -> str:
    """In words, what the adapter was merged into: what its user must know about the file."""
    own = f"the weights of {source.name}"
    was = already_quantized(source)
    if was is not None:
        own += f" ({was}, so already quantized once)"
    if quant is None:
        return f"{own}, as trained"
    if base_is_the_sources_own(source, quant):
        return f"{own}, dequantized: the base that the adapter was trained on"
    how = f"{quant.quant_type} in blocks of {quant.blocksize}{', double-quantized' if quant.double_quant else ''}"
    if base == "dequantized":
        return f"{own} in {how}, dequantized: the base that the adapter was trained on"
    return f"{own}, not in the {how} that the adapter was trained on: it has not seen this base"
