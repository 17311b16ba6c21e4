"""PEFT's adapter files, written (PEFT 0.21): what we trained, PEFT computes from them on the original base."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.adapters import heads, saved_modules
from halfbyte.adapters.lora import adapter_state, shift_of, short_targets
from halfbyte.adapters.options import LoraOptions
from halfbyte.adapters.peft_io import A_KEY, B_KEY, CONFIG, PREFIX, SHIFT, WEIGHTS
from halfbyte.errors import UsageError
from halfbyte.files import new_files, write_atomic
from halfbyte.linear import segments
from halfbyte.tensorfile import Planned, largest_items_first, write_file


def peft_config(model: nn.Module, options: LoraOptions, base: str, revision: str | None = None) -> dict[str, Any]:
    """adapter_config.json for the adapters on `model`. Every key that loaders look for is written, off or on.

    init_lora_weights is never pissa or loftq: PEFT would change its base again when it loads the file.
    """
    whole = saved_modules.names_of(model)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": options.lora_r,
        "lora_alpha": _whole(options.lora_alpha),
        "lora_dropout": options.lora_dropout,
        "target_modules": short_targets(model),
        "rank_pattern": dict(options.rank_pattern),
        "alpha_pattern": {name: _whole(alpha) for name, alpha in options.alpha_pattern.items()},
        "use_rslora": options.use_rslora,
        "init_lora_weights": "gaussian" if options.init_lora_weights == "gaussian" else True,
        "bias": "none",
        "use_dora": options.use_dora,
        "lora_bias": False,
        # How PEFT reads the *base* weight when it merges (GPT-2's Conv1D); the factors have the same shapes either way.
        "fan_in_fan_out": bool(getattr(model, "transposed", ())),
        "modules_to_save": whole or None,
        # Both names hold the one tensor, so an encoder-decoder is right without; with it PEFT puts a head in the place
        # of its shared embedding, and fails.
        "ensure_weight_tying": saved_modules.is_tied(model) and getattr(model, "task", "") != "seq2seq",
        "trainable_token_indices": None,
        "target_parameters": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
        **heads.task_fields(model, whole),
    }


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def save_adapter(
    model: nn.Module, folder: Path, options: LoraOptions, base: str, revision: str | None = None
) -> list[Path]:
    """Write the adapters on `model` as PEFT's two files; returns their paths. The config is written last.

    Factors and magnitudes are of `adapter_dtype`; what is trained whole, a classifier's head too, keeps its type.
    """
    state = {key: tensor.float() for key, tensor in adapter_state(model).items()}
    if not state:
        raise UsageError("the model has no adapter to save")
    metadata: dict[str, str] = {}
    shifted = {name: shift for name, segment in segments(model).items() if (shift := shift_of(segment)) is not None}
    if shifted:
        _append_shifts(state, shifted)
        own = {key: getattr(options, key) for key in ("lora_r", "lora_alpha", "rank_pattern", "alpha_pattern")}
        metadata[SHIFT] = json.dumps(own, sort_keys=True)
        options = _of_twice_the_rank(options)
    dtype = options.file_dtype
    if any(not torch.equal(part.to(dtype).float(), part) for shift in shifted.values() for part in (shift.a, shift.b)):
        dtype = torch.float32  # a continued adapter's: rounded, the shift would be of another base
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    state |= {PREFIX + name: tensor for name, tensor in saved_modules.state(model).items()} | heads.head_state(model)
    planned = largest_items_first([Planned.of(key, tensor) for key, tensor in state.items()])
    with new_files(folder) as part:  # tensor by tensor: serialized at once they would be in memory twice more
        write_file(part / WEIGHTS, planned, metadata=metadata)
    config = json.dumps(peft_config(model, options, base, revision), indent=2, sort_keys=True)
    heads.write_labels(model, folder)
    write_atomic(folder / CONFIG, config + "\n")
    return [folder / WEIGHTS, folder / CONFIG]


def _append_shifts(state: dict[str, Tensor], shifts: Mapping[str, Any]) -> None:
    """[A; A_s] and [B, -B_s] in the place of A and B; zeros where a linear has no shift: all have twice the rank."""
    for key in [key for key in state if key.endswith(A_KEY)]:
        name = key.removeprefix(PREFIX).removesuffix(A_KEY)
        other, shift = f"{PREFIX}{name}{B_KEY}", shifts.get(name)
        a, b = state[key], state[other]
        a_s, b_s = (torch.zeros_like(a), torch.zeros_like(b)) if shift is None else (shift.a, shift.b)
        state[key], state[other] = torch.cat([a, a_s]), torch.cat([b, -b_s], 1)


def _of_twice_the_rank(options: LoraOptions) -> LoraOptions:
    """The same scalings with every rank doubled, as PEFT converts: alpha / r, or alpha / sqrt(r)."""
    factor = math.sqrt(2) if options.use_rslora else 2
    return options.model_copy(
        update={
            "lora_r": 2 * options.lora_r,
            "lora_alpha": options.lora_alpha * factor,
            "rank_pattern": {name: 2 * rank for name, rank in options.rank_pattern.items()},
            "alpha_pattern": {name: alpha * factor for name, alpha in options.alpha_pattern.items()},
        }
    )
