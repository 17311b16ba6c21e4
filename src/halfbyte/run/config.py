"""`RunConfig`: a run as one frozen, serialisable value, and how files and flags become one.

It composes: every option is declared once, in the options class of the component that reads it, and only what
belongs to the run as a whole is declared here. One YAML file and flags carry the same fields; flags win. Unknown
keys are answered with the nearest known one, wrong values with the file, the line and what is allowed.
"""

import difflib
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from halfbyte.adapters.lora import LoraOptions
from halfbyte.data.options import DataOptions
from halfbyte.errors import UsageError
from halfbyte.evaluate.preference import DpoOptions
from halfbyte.files import write_atomic
from halfbyte.models.options import ModelOptions
from halfbyte.optim.options import OptimOptions
from halfbyte.options import Options, Size
from halfbyte.quant.options import QuantOptions
from halfbyte.run import aliases, methods
from halfbyte.train.options import TrainOptions
from halfbyte.yamlfile import Entry, read_yaml

SCHEMA_VERSION = 2
"""Of run.yaml. Before 2, QLoRA on a GGUF file quantized its dequantized weights anew."""
RECORD_KEY = "record"

AnyOptions = TypeVar("AnyOptions", bound=Options)


class RunOptions(Options):
    """What belongs to the run and to no component."""

    method: methods.Base = Field(
        "auto",
        description="auto (the plan chooses and says why), qlora (4-bit base), lora (16-bit base) or full; or a name "
        f"that is short for one of them with other fields: {', '.join(methods.named_presets())}",
    )
    memory: Size | None = Field(
        None, gt=0, description="Budget that the run must keep, as 6GiB or 6GB; by default 90 % of what is free"
    )
    adapter_path: str | None = Field(
        None, description="Start from this adapter (a folder in PEFT's format, or a run) instead of a fresh one"
    )

    @field_validator("method", mode="before")
    @classmethod
    def _built(cls, value: Any) -> Any:
        name = str(value).lower()
        if name in aliases.TASKS_ELSEWHERE:
            raise ValueError(f"{name} is a task here and no method: --task {name}")
        if name in aliases.LATER_METHODS:
            raise ValueError(f"{name} is not built: choose one of auto, {', '.join(methods.PRESETS)}")
        return name if isinstance(value, str) else value


ADAPTERS_ALONE = ("use_dora", "init_lora_weights", "modules_to_save", "loraplus_lr_ratio")
"""Fields that full fine-tuning would ignore; shapes (`lora_r`, …) may stand in a file that several methods share."""

QUANTIZED_ALONE = ("requantize", "quant_pattern")
"""Fields that a base in 16 bits would ignore; off by default."""


class RunConfig(
    ModelOptions, DataOptions, QuantOptions, LoraOptions, OptimOptions, DpoOptions, TrainOptions, RunOptions
):
    """One run: a frozen value. `model_dump()` gives it back as plain data; `run.yaml` is exactly that.

    `method` may be given as any name of `run.methods.PRESETS`; it is held written out.
    """

    @model_validator(mode="before")
    @classmethod
    def _presets(cls, values: Any) -> Any:
        return methods.expand(values) if isinstance(values, Mapping) else values

    @property
    def method_name(self) -> str:
        """The method's name for people: `qdora`, where `method` is qlora and `use_dora` is set."""
        return methods.name_of(self.model_dump())

    @model_validator(mode="after")
    def _fit_together(self) -> "RunConfig":
        """What options of two components cannot mean together."""
        if self.galore and self.method != "full":
            raise ValueError(f"optim: {self.optim} is for full fine-tuning: set method: full")
        for name in ADAPTERS_ALONE:
            value = getattr(self, name)
            if self.method == "full" and value != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name} is for adapters, and method full has none: leave it out")
        if self.method == "lora" and self.init_lora_weights == "loftq":
            raise ValueError("loftq starts from what quantization loses, and method lora does not quantize: take loftq")
        for name in QUANTIZED_ALONE:
            if self.method in ("lora", "full") and getattr(self, name):
                raise ValueError(
                    f"{name} is for method qlora, and method {self.method} does not quantize: set method: qlora, or "
                    f"leave {name} out"
                )
        if self.by_layer and (self.gradient_accumulation_steps or 1) > 1:
            raise ValueError(
                "gradient_accumulation_steps must be 1 with per_layer_updates (on with optim: galore_…): gradients are "
                "gone after each backward pass; raise per_device_train_batch_size, or set per_layer_updates to false"
            )
        return self

    def pick(self, options: type[Options]) -> Any:
        """The part of this config that a component declared, as that component's own class."""
        return options.model_validate({name: getattr(self, name) for name in options.model_fields})

    def given(self, name: str) -> bool:
        """Whether the user chose this field. In a config with every field (a run.yaml) only what is not the default
        tells."""
        if self.model_fields_set >= type(self).model_fields.keys():
            return bool(getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True))
        return name in self.model_fields_set

    def replace(self, **changes: Any) -> "RunConfig":
        """A copy with fields changed, validated again; what was left open stays so. UsageError for what cannot be."""
        return self.without((), **changes)

    def without(self, left_out: Iterable[str], **changes: Any) -> "RunConfig":
        """A copy with some fields left open again, and others changed."""
        own = {k: v for k, v in self.model_dump(exclude_unset=True).items() if k not in set(left_out)}
        try:
            return RunConfig.model_validate({**own, **methods.expand(changes)})
        except ValidationError as error:
            raise UsageError(
                _describe(error, {name: Entry(value, "argument") for name, value in changes.items()})
            ) from None
        except ValueError as error:  # a method that contradicts another change
            raise UsageError(str(error)) from None


COMPONENTS: dict[str, type[Options]] = {
    "run": RunOptions,
    "model": ModelOptions,
    "data": DataOptions,
    "quantization": QuantOptions,
    "adapter": LoraOptions,
    "optimizer": OptimOptions,
    "preference": DpoOptions,
    "training": TrainOptions,
}
"""Title → options class, in the order in which a person fills them in."""


def load_config(file: Path | None = None, flags: Mapping[str, Any] | None = None, **values: Any) -> RunConfig:
    """The config of a YAML file, with flags and keyword values over it. UsageError names what is wrong, and where.

    flags   values by option name, as the command line gives them; errors call them `--name`
    values  the same from Python; errors call them by their name
    """
    of_file = translate(read_yaml(file)) if file is not None else {}
    of_flags = translate({k: Entry(v, "--" + k.replace("_", "-")) for k, v in (flags or {}).items()})
    return build(of_file, of_flags, translate({k: Entry(v, "argument") for k, v in values.items()}))


def build(*layers: Mapping[str, Entry]) -> RunConfig:
    """Validate translated entries, of which a later layer wins; every wrong value is named with its place, in one line.

    A method's name is written out last: what a weaker layer says is no contradiction.
    """
    found: dict[str, Entry] = {}
    strength: dict[str, int] = {}
    for number, layer in enumerate(layers):
        found |= layer
        strength |= dict.fromkeys(layer, number)
    return _validated(RunConfig, _with_preset(found, strength))


def options_from_flags(options: type[AnyOptions], flags: Mapping[str, Any]) -> AnyOptions:
    """An options class outside of the config (of `evaluate`, `generate`, `merge`) from its flags."""
    return _validated(options, {name: Entry(value, "--" + name.replace("_", "-")) for name, value in flags.items()})


def _validated(options: type[AnyOptions], entries: Mapping[str, Entry]) -> AnyOptions:
    try:
        return options.model_validate({key: entry.value for key, entry in entries.items()})
    except ValidationError as error:
        raise UsageError(_describe(error, entries)) from None


def _describe(error: ValidationError, entries: Mapping[str, Entry]) -> str:
    reasons: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        field = str(item["loc"][0]) if item["loc"] else ""
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "missing":
            text = "is needed: give it on the command line or in the YAML file"
        else:
            text = text[0].lower() + text[1:]
        if text not in reasons.setdefault(field, []):
            reasons[field].append(text)
    parts = []
    for field, texts in reasons.items():
        entry = entries.get(field)
        where = f"{entry.where}: " if entry and not entry.where.startswith("--") and entry.where != "argument" else ""
        name = entry.where if entry and entry.where.startswith("--") else field
        got = f", not {entry.value!r}" if entry and not any("not built" in t or "no method" in t for t in texts) else ""
        parts.append(f"{where}{name + ' ' if name else ''}{' or '.join(texts)}{got}")
    return "; ".join(parts)


def translate(raw: Mapping[str, Entry]) -> dict[str, Entry]:
    """Our field names for whatever spelling was used. UsageError for unknown keys and for two that disagree."""
    found: dict[str, Entry] = {}
    methods_given: dict[str, Entry] = {}
    for written, entry in raw.items():
        key = written.replace("-", "_")
        if key in (RECORD_KEY, "schema_version"):
            _check_schema(key, entry)
        elif key in aliases.METHOD_KEYS or key in aliases.BITS_KEYS:
            methods_given[key] = entry
        elif key in aliases.LATER_KEYS:
            if entry.value not in (False, None):
                raise UsageError(f"{entry.where}: {written}: {aliases.LATER_KEYS[key]} is not built")
        elif key in RunConfig.model_fields:
            _put(found, key, Entry(aliases.own_value(key, entry.value), entry.where), written)
        elif key in aliases.ALIASES:
            alias = aliases.ALIASES[key]
            _put(found, alias.field, Entry(_convert(alias, written, entry), entry.where), written)
        elif key in aliases.IGNORED and entry.value in aliases.IGNORED[key]:
            continue
        else:
            raise UsageError(f"{entry.where}: {written} is not a key that halfbyte knows{did_you_mean(key)}")
    method, bits = _method_and_bits(methods_given)
    if method is not None:
        _put(found, "method", method, " and ".join(methods_given))
        if bits == 8:
            _put(found, "quant_type", Entry("int8", method.where), " and ".join(methods_given))
    return found


def _with_preset(found: dict[str, Entry], strength: Mapping[str, int]) -> dict[str, Entry]:
    """The method's preset written out, each field at the place that named the method; `strength` tells layers apart."""
    entry = found.get("method")
    name = None if entry is None else methods.known(str(entry.value))
    if entry is None or name is None or name == "auto":
        return found
    preset = methods.PRESETS[name]
    for field, value in preset.fields.items():
        own = found.get(field)
        weaker = own is not None and strength[field] < strength["method"] and not preset.is_one(field, own.value)
        if own is None or own.value is None or weaker:
            found[field] = Entry(value, entry.where)
        elif not preset.is_one(field, own.value):
            raise UsageError(
                f"{entry.where}: method {name} means {field}: {_scalar(value)}, but {own.where} says "
                f"{_scalar(own.value)}: remove one"
            )
    found["method"] = Entry(preset.method, entry.where)
    return found


def _check_schema(key: str, entry: Entry) -> None:
    """A run.yaml carries a record of what it ran on; its schema must be one that this version reads."""
    version = entry.value.get("schema_version") if isinstance(entry.value, dict) else entry.value
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UsageError(f"{entry.where}: {key} has schema version {version}, newer than this halfbyte: upgrade it")


def _convert(alias: aliases.Alias, written: str, entry: Entry) -> Any:
    try:
        return alias.convert(entry.value)
    except ValueError as error:
        raise UsageError(f"{entry.where}: {written}: {error}, not {entry.value!r}") from None


def _put(found: dict[str, Entry], field: str, entry: Entry, written: str) -> None:
    """Add a value; a second spelling of the same field may repeat it but not contradict it."""
    old = found.get(field)
    if old is not None and str(old.value).lower() != str(entry.value).lower():
        raise UsageError(
            f"{entry.where}: {written} says {field} is {entry.value!r}, but {old.where} says {old.value!r}: remove one"
        )
    found[field] = entry


def _method_and_bits(keys: Mapping[str, Entry]) -> tuple[Entry | None, int | None]:
    """The method that other tools' keys (`adapter`, `load_in_4bit`, …) mean together, and the bits they ask for."""
    if not keys:
        return None, None
    names: set[str] = set()
    bits: set[int] = set()
    for written, entry in keys.items():
        try:
            name, width = aliases.method_and_bits(written, entry.value)
        except ValueError as error:
            raise UsageError(f"{entry.where}: {written}: {error}, not {entry.value!r}") from None
        names |= {name} if name else set()
        bits |= {width} if width else set()
    where = next(iter(keys.values())).where
    try:
        method = aliases.combined_method(names, bits)
    except ValueError as error:
        listed = ", ".join(f"{k}: {e.value!r} ({e.where})" for k, e in keys.items())
        raise UsageError(f"{listed} disagree: {error}") from None
    width = max(bits - {16}, default=None)
    return None if method is None else Entry(method, where), width


def did_you_mean(key: str) -> str:
    """`: did you mean …?` for an unknown key, or nothing where no known one is near."""
    known = [*RunConfig.model_fields, *aliases.ALIASES, *aliases.METHOD_KEYS, *aliases.BITS_KEYS]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        return " (`halfbyte init` writes all that there are)"
    alias = aliases.ALIASES.get(near[0])
    return f": did you mean {alias.field if alias else near[0]}?"


# -- writing ----------------------------------------------------------------------------------------------------------


def to_yaml(config: RunConfig, record: Mapping[str, Any] | None = None) -> str:
    """`run.yaml`: every field by its name, then what the run was recorded on. Reading it gives the same config."""
    values = config.model_dump(mode="json")
    body = {name: values[name] for options in COMPONENTS.values() for name in options.model_fields}
    if record is not None:
        body[RECORD_KEY] = dict(record)
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=1000)


def template_yaml(values: Mapping[str, Any]) -> str:
    """A commented YAML for `halfbyte init`: the given values set, every other field there as a comment."""
    lines = [
        "# halfbyte train --config THIS_FILE. A line that starts with #: shows a default: remove the mark to change it."
    ]
    for title, options in COMPONENTS.items():
        lines += ["", f"# -- {title} {'-' * (112 - len(title))}", ""]
        for name, field in options.model_fields.items():
            lines += [f"# {part}" for part in textwrap.wrap(str(field.description), 114)]
            if name in values:
                lines.append(f"{name}: {_scalar(values[name])}")
            elif field.is_required():
                lines.append(f"{name}:  # needed")
            else:
                lines.append(f"#: {name}: {_scalar(field.get_default(call_default_factory=True))}")
    return "\n".join(lines) + "\n"


def write_template(file: Path | None, flags: Mapping[str, Any], overwrite: bool = False) -> str:
    """`template_yaml` with the values that were given, into `file` (None: nowhere); an existing file is kept."""
    translated = translate({k: Entry(v, "--" + k.replace("_", "-")) for k, v in flags.items()})
    _validated(RunConfig, {"model": Entry("MODEL", "default")} | translated)
    text = template_yaml({key: entry.value for key, entry in translated.items()})
    if file is not None:
        if file.exists() and not overwrite:
            raise UsageError(f"{file} exists: choose another name, or replace it with --overwrite")
        write_atomic(file, text)
    return text


def _scalar(value: Any) -> str:
    """A value as YAML on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    return (
        yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
    )
