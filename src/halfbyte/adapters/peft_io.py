"""PEFT's adapter files, both ways: adapter_config.json and adapter_model.safetensors (PEFT 0.21).

Keys are `base_model.model.<module path>.lora_A.weight` and `.lora_B.weight`; the adapter's own name is not part
of a file. What we cannot express faithfully we refuse to read: a wrong adapter is worse than none.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from halfbyte.adapters import heads
from halfbyte.adapters.lora import LoraOptions, adapter_state, device_of
from halfbyte.errors import UsageError
from halfbyte.files import write_atomic
from halfbyte.linear import LoraAdapter, segments

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Switches of PEFT's LoraConfig whose "on" changes the arithmetic in a way that we do not compute.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "adapters on bare parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
}


def peft_config(model: nn.Module, options: LoraOptions, base: str, revision: str | None = None) -> dict[str, Any]:
    """adapter_config.json for the adapters on `model`. Every key that loaders look for is written, off or on."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": options.lora_r,
        "lora_alpha": _whole(options.lora_alpha),
        "lora_dropout": options.lora_dropout,
        "target_modules": _targets(model),
        "rank_pattern": dict(options.rank_pattern),
        "alpha_pattern": {name: _whole(alpha) for name, alpha in options.alpha_pattern.items()},
        "use_rslora": options.use_rslora,
        "init_lora_weights": "gaussian" if options.init_lora_weights == "gaussian" else True,
        "bias": "none",
        "use_dora": False,
        "lora_bias": False,
        # How PEFT reads the *base* weight when it merges (GPT-2's Conv1D); the factors have the same shapes either way.
        "fan_in_fan_out": bool(getattr(model, "transposed", ())),
        "modules_to_save": None,
        "trainable_token_indices": None,
        "target_parameters": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
        **heads.task_fields(model),
    }


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _targets(model: nn.Module) -> list[str]:
    """Short names (q_proj, ...) where they select exactly the adapted linears, else full names."""
    found = segments(model)
    adapted = {name for name, segment in found.items() if segment.adapter is not None}
    leaves = {name.rsplit(".", 1)[-1] for name in adapted}
    selected = {name for name in found if name.rsplit(".", 1)[-1] in leaves}
    return sorted(leaves if selected == adapted else adapted)


def save_adapter(
    model: nn.Module, folder: Path, options: LoraOptions, base: str, revision: str | None = None
) -> list[Path]:
    """Write the adapters on `model` as PEFT's two files; returns their paths. The config is written last."""
    dtype = torch.bfloat16 if options.adapter_dtype == "bfloat16" else torch.float32
    state = {name: t.to(device="cpu", dtype=dtype).contiguous() for name, t in adapter_state(model).items()}
    if not state:
        raise UsageError("the model has no adapter to save")
    write_atomic(folder / WEIGHTS, save_tensors(state, metadata={"format": "pt"}))
    config = json.dumps(peft_config(model, options, base, revision), indent=2, sort_keys=True)
    heads.write_labels(model, folder)
    write_atomic(folder / CONFIG, config + "\n")
    return [folder / WEIGHTS, folder / CONFIG]


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder. UsageError if it is missing, broken, or not a LoRA that we compute."""
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"{folder} has no {CONFIG}: it is not an adapter's folder")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}): copy the adapter again") from None
    if not isinstance(config, dict) or str(config.get("peft_type")).upper() != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise UsageError(f"{path}: peft_type is {kind!r}; halfbyte reads LORA adapters")
    for key, what in _REFUSED.items():
        if heads.other_modules(config) if key == "modules_to_save" else config.get(key):
            raise UsageError(f"{path}: {key} is set, and halfbyte does not read {what} yet")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{path}: bias is {config['bias']!r}; halfbyte reads adapters without trained biases")
    return config


def lora_options(config: Mapping[str, Any]) -> LoraOptions:
    """Our options with the meaning of a PEFT config (initialisation aside: the values come from the file).

    UsageError for values that are none.
    """
    try:
        return LoraOptions(
            lora_r=config.get("r", 8),
            lora_alpha=config.get("lora_alpha", 8),
            lora_dropout=config.get("lora_dropout", 0.0) or 0.0,
            use_rslora=bool(config.get("use_rslora", False)),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UsageError(f"{CONFIG}: {first['loc'][0]} cannot be {first['input']!r}: {first['msg']}") from None


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """adapter_model.safetensors of a folder. Pickles (adapter_model.bin) are never loaded."""
    path = folder / WEIGHTS
    if not path.is_file():
        hint = "; it has adapter_model.bin, a pickle, which halfbyte never loads: save it again as safetensors"
        raise UsageError(f"{folder} has no {WEIGHTS}{hint if (folder / 'adapter_model.bin').exists() else ''}")
    try:
        return load_tensors(path.read_bytes())
    except SafetensorError as error:
        raise UsageError(f"{path} is broken ({error}): copy the adapter again") from None


def load_adapter(model: nn.Module, folder: Path | str) -> LoraOptions:
    """Attach the adapter of a PEFT folder to `model`, with its values; returns its options.

    The file decides which linears are adapted and with what rank: PEFT's target patterns are not interpreted again.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    options = lora_options(config)
    tensors = read_adapter_tensors(folder)
    head = heads.take_head(tensors, config, folder)
    found = segments(model)
    names = _adapted_names(tensors, list(found), folder)
    for name in names:
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        segment = found[name]
        if a.ndim != 2 or b.ndim != 2:
            raise UsageError(f"{folder}: the factors of {name} are no matrices: the file is damaged")
        if a.shape[1] != segment.in_features or b.shape[0] != segment.out_features or a.shape[0] != b.shape[1]:
            raise UsageError(
                f"{folder}: the adapter of {name} is {tuple(b.shape)} x {tuple(a.shape)}, and the model's linear "
                f"{segment.out_features} x {segment.in_features}: it was trained on another base"
            )
        if a.shape[0] != options.rank_of(name):
            raise UsageError(
                f"{folder}: {name} has rank {a.shape[0]} in {WEIGHTS} and {options.rank_of(name)} in {CONFIG}"
            )
    heads.put_head(model, head, folder)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    heads.make_trainable(model)
    for name in names:
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        b = tensors[f"base_model.model.{name}.lora_B.weight"]
        adapter = LoraAdapter(a, b, options.scaling_of(name), options.lora_dropout).to(device_of(found[name]))
        adapter.train(model.training)
        found[name].adapter = adapter
    return options.model_copy(update={"target_modules": _targets(model)})


def _adapted_names(tensors: Mapping[str, Tensor], available: list[str], folder: Path) -> list[str]:
    """The segments that the file has both factors for. UsageError on anything that has no place in the model."""
    known = {f"base_model.model.{n}.lora_{f}.weight": (n, f) for n in available for f in "AB"}
    strange = sorted(key for key in tensors if key not in known)
    if strange:
        raise UsageError(
            f"{folder}: the model has no place for {strange[0]} ({len(strange)} such): another base model?"
        )
    have = {known[key] for key in tensors}
    names = [n for n in available if (n, "A") in have or (n, "B") in have]
    for name in names:
        for factor in "AB":
            if (name, factor) not in have:
                raise UsageError(f"{folder}: lora_{factor} of {name} is missing: the file is incomplete")
    if not names:
        raise UsageError(f"{folder}: {WEIGHTS} holds no adapter")
    return names
