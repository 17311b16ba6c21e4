"""When is a run that is there already the run that is wanted?

What a run computes follows from its config without paths, folders and reporting, from the base's weights, the data and
the template; what the config leaves to the machine (the micro-batch, the dtype) may be anything as long as an update
sees the same rows. `wanted` says this as plain values; a cell's id is their hash, so that it is the same on every
machine, and `mismatch` holds a finished run against them.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from halfbyte.adapters.options import LoraOptions
from halfbyte.evaluate.preference import DpoOptions
from halfbyte.optim.options import ADAPTER_LEARNING_RATE, FULL_LEARNING_RATE
from halfbyte.quant.options import QuantOptions
from halfbyte.run.config import RunConfig
from halfbyte.train.dpo import PREFERENCE_LEARNING_RATE
from halfbyte.train.options import TrainOptions, batch_rows

ELSEWHERE = (
    "model", "revision", "data", "eval_data", "chat_template", "adapter_path", "output_dir", "report_to", "memory",
    "logging_steps", "save_steps", "save_minutes", "save_total_limit", "optim_offload_dir", "max_bad_share",
    "per_device_train_batch_size", "gradient_accumulation_steps", "task", "data_format", "columns", "eval_batch_tokens",
)  # fmt: skip
"""Fields that say where something is or how it is told (what is there is in the fingerprints), or that are held
otherwise here (rows of an update, the source of a chain)."""
OPEN = {"dtype": "auto", "device": "auto", "gradient_checkpointing": None}
"""Fields that a config may leave to the machine, and what that looks like."""


def rows_per_update(config: RunConfig) -> int:
    """Rows of an update, as the options give them where memory is no limit."""
    options: TrainOptions = config.pick(TrainOptions)
    if config.by_layer:
        options = options.model_copy(update={"gradient_accumulation_steps": 1})
    per_device, accumulation = batch_rows(options)
    return per_device * accumulation


def learning_rate(config: RunConfig, pairs: bool = False) -> float:
    """The learning rate that a run of this config takes (`run.planning.resolve`)."""
    if config.learning_rate is not None:
        return config.learning_rate
    if pairs:
        return PREFERENCE_LEARNING_RATE
    rate = FULL_LEARNING_RATE if config.method == "full" else ADAPTER_LEARNING_RATE
    return rate / config.galore_scale if config.galore else rate


def wanted(config: RunConfig, identity: Mapping[str, str], pairs: bool, source: str | None = None) -> dict[str, Any]:
    """What decides a run's result, as plain values. `identity`: fingerprints; `source`: id of the cell it goes on from.

    Fields that this method ignores are left out, so that the full fine-tuning of two ranks is one run.
    """
    values = config.model_dump(mode="json")
    ignored = set(ELSEWHERE)
    if config.method == "full":
        ignored |= LoraOptions.model_fields.keys()
    if config.method != "qlora":
        ignored |= QuantOptions.model_fields.keys()
    if not config.galore:
        ignored |= {name for name in values if name.startswith("galore_")}
    if not pairs:
        ignored |= DpoOptions.model_fields.keys()
    if not config.paged:
        ignored |= {"optim_memory"}
    if config.max_steps is not None:
        ignored |= {"num_train_epochs"}
    fields = {name: value for name, value in values.items() if name not in ignored}
    fields |= {
        "learning_rate": learning_rate(config, pairs),
        "max_grad_norm": config.clip_norm,
        "per_layer_updates": config.by_layer,
    }
    open_fields = [name for name, value in OPEN.items() if fields.get(name) == value]
    return {
        "fields": {name: value for name, value in sorted(fields.items()) if name not in open_fields},
        "rows_per_update": rows_per_update(config),
        "identity": dict(identity),
        "continues": source,
    }


def id_of(want: Mapping[str, Any]) -> str:
    """Twelve hex digits."""
    return hashlib.sha256(json.dumps(want, sort_keys=True).encode()).hexdigest()[:12]


def mismatch(want: Mapping[str, Any], config: RunConfig, record: Mapping[str, Any], pairs: bool) -> str | None:
    """Why a run with this config and record (of its run.yaml) is not the wanted one; None: it is.

    Whether a continued adapter was the right one is not in a run.yaml: a chain's runs are never taken from elsewhere.
    """
    found = identity_of(record)
    for name, value in want["identity"].items():
        if found.get(name) != value:
            return f"another {name}"
    theirs = wanted(config, found, pairs)
    if theirs["rows_per_update"] != want["rows_per_update"]:
        return f"{theirs['rows_per_update']} rows an update, not {want['rows_per_update']}"
    for name, value in want["fields"].items():
        if theirs["fields"].get(name) != value:
            return f"{name} {theirs['fields'].get(name)!r}, not {value!r}"
    if want["continues"] is not None or config.adapter_path is not None:
        return "it goes on from an adapter"
    return None


def identity_of(record: Mapping[str, Any]) -> dict[str, str]:
    """The fingerprints of a run.yaml's record, or of one that is made now (`run.folder.record_of`)."""
    return {
        "base model": str(record.get("base_model", {}).get("fingerprint")),
        "data": str(record.get("data", {}).get("fingerprint")),
        "chat template": str(record.get("chat_template", {}).get("sha256")),
    }
