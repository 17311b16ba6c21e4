"""What a finished run leaves in its folder: adapter or weights, tokenizer, template, model card, result.json last."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.adapters import save_adapter
from halfbyte.adapters.lora import LoraOptions
from halfbyte.evaluate import rows_file
from halfbyte.evaluate.evaluate import BaseAndTuned
from halfbyte.export.card import model_card
from halfbyte.export.model_files import write_model_files
from halfbyte.export.safetensors_file import INDEX, Planned, plan_shards, shard_index, write_file
from halfbyte.files import new_files, require_free_space, write_atomic
from halfbyte.models.classifier import Classifier
from halfbyte.models.load import LoadedModel
from halfbyte.run.config import RunConfig
from halfbyte.run.planning import Survey
from halfbyte.train.events import read_events
from halfbyte.train.memory import process_memory
from halfbyte.train.run_directory import EVENTS, PLAN, RESULT
from halfbyte.train.state import TrainResult

SCHEMA_VERSION = 1
SHARD_BYTES = 5_000_000_000
CARD = "README.md"
TEMPLATE = "chat_template.jinja"
PHASE_OF = {"eval": "evaluate", "checkpoint": "save", "rehearsal": "rehearsal"}
"""The phase of an event that takes time beside the updates."""


def write(
    path: Path,
    config: RunConfig,
    record: dict[str, Any],
    found: Survey,
    loaded: LoadedModel,
    trained: TrainResult,
    scores: BaseAndTuned | None,
    beside: Mapping[str, float],
    held: Mapping[str, int],
) -> dict[str, Any]:
    """Write everything; returns result.json's content.

    beside  seconds of what was not training, by phase
    held    bytes by component (`run.components`)
    """
    started = time.perf_counter()
    if config.method == "full":
        write_weights(path, loaded, config.dtype)
    else:
        write_adapter(path, config, loaded)
    write_tokenizer(path, found, loaded)
    if scores is not None:
        rows_file.write_rows(path / rows_file.NAME, scores)
    beside = {**beside, "save": time.perf_counter() - started}
    result = result_of(path, config, trained, scores, beside, held)
    write_atomic(path / CARD, model_card(config.model_dump(mode="json"), record, result, found.source))
    write_atomic(path / RESULT, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def write_adapter(path: Path, config: RunConfig, loaded: LoadedModel) -> None:
    """The adapter in PEFT's two files; the base is named as the user named it."""
    save_adapter(loaded.model, path, config.pick(LoraOptions), config.model, loaded.source.revision)


def write_weights(path: Path, loaded: LoadedModel, dtype: str) -> None:
    """All weights in safetensors under Hugging Face names, with config.json: a folder that transformers loads."""

    def pieces(dense: Callable[[], Tensor]) -> Callable[[], Iterator[Tensor]]:
        return lambda: iter((dense(),))

    planned = []
    for name, dense in loaded.model.named_tensors():  # type: ignore[operator]
        tensor = dense()
        planned.append(Planned(name, tuple(tensor.shape), tensor.dtype, pieces(dense)))
    require_free_space(path, sum(tensor.nbytes for tensor in planned), "the trained model")
    shards = plan_shards(planned, SHARD_BYTES)
    with new_files(path) as part:
        for file, tensors in shards.items():
            write_file(part / file, tensors)
        if len(shards) > 1:
            (part / INDEX).write_text(shard_index(shards))
        labels = loaded.model.labels if isinstance(loaded.model, Classifier) else None
        write_model_files(part, loaded.source, loaded.source.path, dtype, labels)


def write_tokenizer(path: Path, found: Survey, loaded: LoadedModel) -> None:
    """The tokenizer's files, and the template that the run was trained with, whichever it was."""
    tokenizer = loaded.tokenizer
    if tokenizer.pad_token is None and isinstance(loaded.model, Classifier):
        tokenizer.pad_token = tokenizer.eos_token  # transformers' classifiers find the last token by the padding
    with new_files(path) as part:
        tokenizer.save_pretrained(part)
    template = found.prepared.template if found.prepared is not None else None
    if template is not None:
        write_atomic(path / TEMPLATE, template.source)


def result_of(
    path: Path,
    config: RunConfig,
    trained: TrainResult,
    scores: BaseAndTuned | None,
    beside: Mapping[str, float],
    held: Mapping[str, int],
) -> dict[str, Any]:
    """result.json: what happened, beside what was predicted."""
    predicted: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a spoilt plan costs no run
        plan = json.loads((path / PLAN).read_bytes())
        predicted = {key: {at: plan[key][at] for at in ("p50", "p95")} for key in ("peak_memory_bytes", "seconds")}
    return {
        "schema_version": SCHEMA_VERSION,
        "method": config.method,
        "method_name": config.method_name,
        **trained.to_json(),
        "seconds": round(trained.seconds + sum(beside.values()), 3),
        "training_seconds": round(trained.seconds, 3),
        "seconds_by_phase": _by_phase(path, trained, beside),
        "peak_memory_bytes": process_memory()[1],
        "memory_by_component": dict(held),
        "eval_loss": scores.tuned.loss if scores is not None else trained.eval_loss,
        "base_eval_loss": scores.base.loss if scores is not None else None,
        "metrics": scores.to_json() if scores is not None else {},
        "predicted": predicted,
    }


def _by_phase(path: Path, trained: TrainResult, beside: Mapping[str, float]) -> dict[str, float]:
    """Seconds by the plan's phases; of training only the updates, its evaluations and checkpoints by their events."""
    found = {"load": 0.0, "train": trained.update_seconds, "evaluate": 0.0, "save": 0.0}
    told = ((PHASE_OF.get(event["event"]), event.get("seconds", 0.0)) for event in read_events(path / EVENTS))
    for phase, seconds in [*beside.items(), *told]:
        if phase is not None:
            found[phase] = found.get(phase, 0.0) + seconds
    return {phase: round(seconds, 3) for phase, seconds in found.items()}
