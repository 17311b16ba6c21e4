"""PEFT's adapter files, read: adapter_config.json and adapter_model.safetensors (PEFT 0.21). `peft_save` writes them.

Keys are `base_model.model.<module path>.lora_A.weight`, `.lora_B.weight` and DoRA's `.lora_magnitude_vector`; whole
modules (`modules_to_save`) have their tensors' own names. The adapter's own name is not part of a file. What we cannot
express faithfully we refuse to read: a wrong adapter is worse than none.

A shifted base (PiSSA, LoftQ of several steps) is not PEFT's to know: the file is a plain LoRA of twice the rank over
the unchanged base, [A; A_s] and [B, -B_s], as PEFT's own conversion makes it. That its second half is a shift stands in
the weights file's metadata, under SHIFT.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from halfbyte.adapters import heads, saved_modules
from halfbyte.adapters.initial import Initial, Shift
from halfbyte.adapters.lora import Base, freeze, put, short_targets, target_names
from halfbyte.adapters.options import ALL_LINEAR, LoraOptions
from halfbyte.errors import UsageError
from halfbyte.linear import segments
from halfbyte.quant import DenseWeight

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SHIFT = "halfbyte.base_shift"
"""Key of the weights file's metadata: the adapter's options before its rank was doubled, as JSON."""

A_KEY, B_KEY, MAGNITUDE_KEY = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

# Switches of PEFT's LoraConfig whose "on" changes the arithmetic in a way that we do not compute.
_REFUSED = {
    "lora_bias": "a bias on lora_B",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "adapters on bare parameters",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
}

# Initial values with which PEFT changes its base, and changes it again when it loads the adapter.
_SHIFTING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """One linear's adapter: a [r, in], b [out, r], magnitude [out] (DoRA), and what its base was freed of."""

    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    shift: Shift | None = None

    def as_plain(self) -> "Factors":
        """Over the base before the shift: the rank of both, as a file has it."""
        if self.shift is None:
            return self
        shift, ratio = self.shift, self.shift.scaling / self.scaling
        a, b = torch.cat([self.a, shift.a], 0), torch.cat([self.b, -shift.b * ratio], 1)
        return replace(self, a=a, b=b, shift=None)


@dataclass(frozen=True)
class AdapterFile:
    """A PEFT folder's content. `options`: shape and patterns of the trained factors, without a shift's.

    factors   by the linear's name
    saved     whole tensors by their full names
    tied      tied embeddings among them were trained as one tensor
    head      a classifier's, [classes, width]; None for language models
    """

    folder: Path
    options: LoraOptions
    factors: dict[str, Factors]
    saved: dict[str, Tensor]
    tied: bool
    head: Tensor | None = None


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
        if config.get(key):
            raise UsageError(f"{path}: {key} is set, and halfbyte does not read {what} yet")
    if config.get("bias", "none") != "none":
        raise UsageError(f"{path}: bias is {config['bias']!r}; halfbyte reads adapters without trained biases")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_SHIFTING):
        raise UsageError(
            f"{path}: init_lora_weights is {initial!r}: the adapter is for a base that PEFT changed, so save it again "
            "as plain LoRA, with save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        )
    return config


def lora_options(config: Mapping[str, Any]) -> LoraOptions:
    """Our options with the meaning of a PEFT config (initialisation aside: the values come from the file).

    UsageError for values that are none.
    """
    whole = config.get("modules_to_save") or []
    named = isinstance(whole, list) and all(isinstance(name, str) for name in whole)
    return _options(
        {
            "lora_r": config.get("r", 8),
            "lora_alpha": config.get("lora_alpha", 8),
            "lora_dropout": config.get("lora_dropout", 0.0) or 0.0,
            "use_rslora": bool(config.get("use_rslora", False)),
            "use_dora": bool(config.get("use_dora", False)),
            "rank_pattern": config.get("rank_pattern") or {},
            "alpha_pattern": config.get("alpha_pattern") or {},
            "modules_to_save": heads.other_modules(config) if named else whole,
        },
        CONFIG,
    )


def _options(values: Mapping[str, Any], where: str) -> LoraOptions:
    try:
        return LoraOptions(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = first["loc"][0] if first["loc"] else "the options"
        raise UsageError(f"{where}: {place} cannot be {first['input']!r}: {first['msg']}") from None


def read_options(folder: Path) -> LoraOptions:
    """The options of a PEFT folder's adapter as it is trained: a shift's half of the rank is not counted."""
    config = read_adapter_config(folder)
    in_file = lora_options(config)
    options = _unshifted(folder, in_file) or in_file
    return options.model_copy(update={"target_modules": _targets(folder, config)})


def _targets(folder: Path, config: Mapping[str, Any]) -> str | list[str]:
    """Which linears the adapter is on: the config's patterns where they say it, else the linears' full names.

    PEFT takes patterns that match nothing, and leaves out layers and modules by further keys.
    """
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            keys = file.keys()
    except (OSError, SafetensorError):
        return ALL_LINEAR  # who reads the tensors says what is wrong with the file
    names = sorted(key.removeprefix(PREFIX).removesuffix(A_KEY) for key in keys if key.endswith(A_KEY))
    wanted = config.get("target_modules")
    if isinstance(wanted, list):
        wanted = sorted({str(one) for one in wanted if any(f".{name}".endswith(f".{one}") for name in names)})
    narrowed = any(config.get(key) for key in ("exclude_modules", "layers_to_transform"))
    if names and isinstance(wanted, str | list) and not narrowed:
        with contextlib.suppress(UsageError):
            if target_names(names, wanted) == names:
                return wanted
    return names


def _unshifted(folder: Path, options: LoraOptions) -> LoraOptions | None:
    """The options before the rank was doubled for a shift; None where there is no shift."""
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(SHIFT)
    except (OSError, SafetensorError):
        return None  # who reads the tensors says what is wrong with the file
    if text is None:
        return None
    try:
        own = json.loads(text)
    except (ValueError, RecursionError):
        own = None
    if not isinstance(own, dict):
        raise UsageError(f"{path}: its metadata {SHIFT} is not a JSON object: the file is damaged")
    return _options({**options.model_dump(), **own}, f"{path}, metadata {SHIFT}")


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


def read_adapter(folder: Path) -> AdapterFile:
    """A PEFT folder as values, checked against itself. UsageError for what is broken, or is more than LoRA and DoRA."""
    config = read_adapter_config(folder)
    in_file = lora_options(config)
    own = _unshifted(folder, in_file)
    options = own or in_file
    tensors = read_adapter_tensors(folder)
    head = heads.take_head(tensors, config, folder)
    names = sorted(
        {
            key.removeprefix(PREFIX).removesuffix(suffix)
            for key in tensors
            for suffix in (A_KEY, B_KEY, MAGNITUDE_KEY)
            if key.startswith(PREFIX) and key.endswith(suffix)
        }
    )
    factors = {}
    for name in names:
        found = _factors(folder, name, tensors, in_file)
        factors[name] = found if own is None else _split(folder, name, found, own)
    saved = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    strange = [key for key in tensors if not key.startswith(PREFIX) or ".lora_" in key or ".token_adapter." in key]
    if strange or (saved and not in_file.modules_to_save):
        odd = min(strange or (PREFIX + key for key in saved))
        raise UsageError(f"{folder} holds {odd}, which is no part of a LoRA or DoRA: the model has no place for it")
    if not factors:
        raise UsageError(f"{folder}: {WEIGHTS} holds no adapter")
    for end in in_file.modules_to_save:
        if not any(prefix.endswith(end) for name in saved for prefix in _prefixes(name)):
            raise UsageError(f"{folder}: {CONFIG} has {end!r} in modules_to_save, and {WEIGHTS} does not hold it")
    return AdapterFile(folder, options, factors, saved, bool(config.get("ensure_weight_tying")), head)


def _prefixes(tensor_name: str) -> list[str]:
    """The modules that a tensor is in, by their full names."""
    parts = tensor_name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _factors(folder: Path, name: str, tensors: dict[str, Tensor], options: LoraOptions) -> Factors:
    """One linear's tensors, taken out of `tensors`."""
    a, b = (tensors.pop(f"{PREFIX}{name}{key}", None) for key in (A_KEY, B_KEY))
    magnitude = tensors.pop(f"{PREFIX}{name}{MAGNITUDE_KEY}", None)
    if a is None or b is None:
        raise UsageError(f"{folder}: lora_{'A' if a is None else 'B'} of {name} is missing: the file is incomplete")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise UsageError(f"{folder}: the factors of {name} do not belong together: the file is damaged")
    if a.shape[0] != options.rank_of(name):
        raise UsageError(
            f"{folder}: {name} has rank {a.shape[0]} in the file and {options.rank_of(name)} in its {CONFIG}: the two "
            "are not of one adapter"
        )
    if (magnitude is not None) != options.use_dora:
        what = "has no lora_magnitude_vector" if magnitude is None else "has a lora_magnitude_vector"
        raise UsageError(f"{folder}: {name} {what}, and {CONFIG} says use_dora {options.use_dora}: not of one adapter")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise UsageError(f"{folder}: the magnitudes of {name} are {list(magnitude.shape)}: the file is damaged")
    return Factors(a, b, options.scaling_of(name), magnitude)


def _split(folder: Path, name: str, both: Factors, options: LoraOptions) -> Factors:
    """The trained half and the shift of a file with a shift. A shift of zeros is none."""
    rank = options.rank_of(name)
    if both.a.shape[0] != 2 * rank:
        raise UsageError(f"{folder}: {name} has rank {both.a.shape[0]}, and with its shift 2 x {rank}: it is damaged")
    scaling = options.scaling_of(name)
    shift = Shift(both.a[rank:].float(), -both.b[:, rank:].float(), scaling)
    a, b = both.a[:rank].clone(), both.b[:, :rank].contiguous()
    return Factors(a, b, scaling, None, shift if bool(shift.b.any()) else None)


def load_adapter(model: nn.Module, folder: Path | str, base: Base | None = None) -> LoraOptions:
    """Attach the adapter of a PEFT folder to `model`, with its values; returns its options.

    The file decides which linears are adapted and with what rank: PEFT's target patterns are not interpreted again.

    base   makes the base anew where the adapter was trained on a shifted one. Without it such an adapter is its plain
           form over the weights as they are, which only an unquantized base has the meaning for
    """
    folder = Path(folder)
    file = read_adapter(folder)
    options, factors = file.options, file.factors
    _require_places(model, file)
    heads.require_fit(model, file.head, folder)
    if base is None and any(one.shift is not None for one in factors.values()):
        options, factors = _as_plain(model, file)
    freeze(model)
    saved_modules.remove(model)
    saved_modules.load(model, file.saved, folder, file.tied)
    heads.put_head(model, file.head)
    found = segments(model)
    for name in (name for name in found if name in factors):
        segment, one = found[name], factors[name]
        if base is not None and one.shift is not None:
            segment.weight = base.held(name, one.shift.rows)
        adapter = put(segment, Initial(one.a, one.b, one.shift), one.scaling, options.lora_dropout, one.magnitude)
        adapter.train(model.training)
    whole = saved_modules.names_of(model)
    return options.model_copy(update={"target_modules": short_targets(model), "modules_to_save": whole})


def _require_places(model: nn.Module, file: AdapterFile) -> None:
    """UsageError for the first linear that the model has not, or has in another size."""
    found = segments(model)
    strange = sorted(name for name in file.factors if name not in found)
    if strange:
        raise UsageError(
            f"{file.folder}: the model has no place for {strange[0]} ({len(strange)} such): another base model?"
        )
    for name, one in file.factors.items():
        segment = found[name]
        if one.a.shape[1] != segment.in_features or one.b.shape[0] != segment.out_features:
            raise UsageError(
                f"{file.folder}: the adapter of {name} is {tuple(one.b.shape)} x {tuple(one.a.shape)}, and the model's "
                f"linear {segment.out_features} x {segment.in_features}: it was trained on another base"
            )


def _as_plain(model: nn.Module, file: AdapterFile) -> tuple[LoraOptions, dict[str, Factors]]:
    found = segments(model)
    quantized = [name for name in file.factors if not isinstance(found[name].weight, DenseWeight)]
    if quantized:
        raise UsageError(
            f"{file.folder} was trained on a base that PiSSA or LoftQ had shifted, and {quantized[0]} is quantized "
            "here: the base must be made again from its source (load_adapter's `base`)"
        )
    return lora_options(read_adapter_config(file.folder)), {n: one.as_plain() for n, one in file.factors.items()}
