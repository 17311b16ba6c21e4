"""From a request to its variants: every one a name and the entries that make its runs' config.

A grid's variants are named by what varies (`qlora-r8`); those of a list have names of their own or are named the same
way. Two that would be the same run are an error: the second would tell nothing.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.adapters.options import LoraOptions
from halfbyte.compare.options import Request
from halfbyte.errors import UsageError
from halfbyte.run import methods
from halfbyte.run.config import QUANTIZED_ALONE, RunConfig, build, translate
from halfbyte.run.continued import SHAPE
from halfbyte.yamlfile import Entry

SHORT_NAMES = {
    "lora_r": "r",
    "learning_rate": "lr",
    "target_modules": "targets",
    "quant_type": "",
    "blocksize": "block",
}
"""How a varied field is called in a variant's name."""
OWN = ("name", "continue_from", "only_a_start")
"""Keys of a variant that are no fields of a run."""


@dataclass(frozen=True)
class Variant:
    """One of the things that are compared.

    key            its name, unique, good for a file
    fields         what makes it differ from the others, as given
    config         its run, without a seed and a folder of its own
    continue_from  the key of the variant whose adapter, of the same seed, its runs start from
    only_a_start   it is run for others to go on from, and not compared
    """

    key: str
    fields: Mapping[str, Any]
    config: RunConfig
    continue_from: str | None = None
    only_a_start: bool = False
    shape: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.key


def variants_of(request: Request) -> list[Variant]:
    """All variants, in the order in which they are asked for. UsageError for what does not make one."""
    options = request.options
    axes: dict[str, Sequence[Any]] = dict(options.vary)
    if options.methods:
        if "method" in axes:
            raise UsageError("methods are given twice, as methods and in vary: leave one out")
        axes = {"method": options.methods} | axes
    elif "method" not in axes and not options.variants:
        axes = {"method": ("lora", "qlora")} | axes
    made: list[Variant] = []
    if axes:
        names = list(translate({name: Entry(None, "vary") for name in axes}))
        if len(names) < len(axes):
            raise UsageError(f"vary: {', '.join(axes)}: two of them are the same field: leave one out")
        if any(not values for values in axes.values()):
            raise UsageError(f"vary: {next(n for n, v in axes.items() if not v)} has no values: give at least one")
        grid = itertools.product(*axes.values())
        made += [_variant(request, dict(zip(axes, values, strict=True)), "vary", {}) for values in grid]
    for number, given in enumerate(options.variants, 1):
        own = {name: given[name] for name in OWN if name in given}
        rest = {name: value for name, value in given.items() if name not in OWN}
        made.append(_variant(request, rest, f"variants[{number}]", own))
    seen: set[str] = set()
    for variant in made:
        if variant.key in seen:
            raise UsageError(f"two variants are called {variant.key}: give them different names")
        seen.add(variant.key)
    made = _chained(made)
    _require_different(made, options.tune_lr)
    return made


def _variant(request: Request, fields: Mapping[str, Any], where: str, own: Mapping[str, Any]) -> Variant:
    for name, kind in (("name", str), ("continue_from", str), ("only_a_start", bool)):
        if name in own and not isinstance(own[name], kind):
            raise UsageError(f"{where}: {name} must be {'true or false' if kind is bool else 'a word'}")
    entries = translate({key: Entry(value, where) for key, value in fields.items()})
    for name in ("seed", "model", "revision", "output_dir", "adapter_path", "report_to"):
        if name in entries:
            raise UsageError(f"{where}: {name} cannot vary: {_reason(name)}")
    if "method" not in entries:
        raise UsageError(f"{where}: no method: give one of {', '.join(methods.PRESETS)}")
    config = build(*shared(request, str(entries["method"].value)), entries)
    if config.method == "auto":
        raise UsageError(f"{where}: method auto leaves open what is compared: name the methods")
    given = {key: entry.value for key, entry in entries.items()}
    name = str(own.get("name") or _name(given))
    return Variant(_word(name), given, config, own.get("continue_from"), bool(own.get("only_a_start", False)))


def shared(request: Request, method: str) -> list[dict[str, Entry]]:
    """The entries of file and flags that go for a method: how a base is quantized is for methods that do."""
    preset = methods.PRESETS.get(method)
    left_out = () if preset is None or preset.method == "qlora" else QUANTIZED_ALONE
    return [{k: v for k, v in entries.items() if k not in left_out} for entries in (request.of_file, request.of_flags)]


def _name(fields: Mapping[str, Any]) -> str:
    """`qlora-r8-lr0.0001`: the method, then what else the variant sets."""
    parts = [str(fields["method"])]
    for name, value in fields.items():
        if name != "method":
            text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            parts.append(SHORT_NAMES.get(name, name.replace("_", "-") + "-") + text)
    return "-".join(parts)


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name).strip("-.") or "variant"


def _reason(name: str) -> str:
    return {
        "seed": "every variant is run with the same seeds (seeds, and seed for the first)",
        "model": "a comparison is of one model; compare each, and accept the other's cells for one report",
        "revision": "a comparison is of one model",
        "adapter_path": "name the variant that it goes on from with continue_from",
        "report_to": "cells are not shown in dashboards",
    }.get(name, "a comparison chooses it")


def _chained(made: Sequence[Variant]) -> list[Variant]:
    """With the shape of the adapter that a variant goes on from, which is its own then."""
    by_key = {variant.key: variant for variant in made}
    out: dict[str, Variant] = {}
    for variant in made:
        if variant.continue_from is None:
            out[variant.key] = variant
            continue
        source = by_key.get(_word(variant.continue_from))
        if source is None or source.key not in out:
            known = ", ".join(out) or "none"
            raise UsageError(
                f"{variant.key}: continue_from {variant.continue_from}: no variant before it has that name ({known})"
            )
        if "full" in (variant.config.method, source.config.method):
            raise UsageError(f"{variant.key}: continue_from goes on from an adapter, and method full has none")
        source = out[source.key]
        if source.config.pick(LoraOptions).shifts_base:
            raise UsageError(
                f"{variant.key}: continue_from {source.key}: its initial values change the base, and its adapter is "
                "saved for the unchanged one at twice the rank: go on from another variant"
            )
        fixed = [name for name in (*SHAPE, "init_lora_weights") if name in variant.fields]
        if fixed:
            raise UsageError(f"{variant.key}: {fixed[0]} is that of the adapter of {source.key}: leave it out")
        shape = dict(source.shape) or {name: getattr(source.config, name) for name in SHAPE}
        changes = shape | {"init_lora_weights": "default"}
        if not variant.config.given("lora_dropout"):
            changes["lora_dropout"] = source.config.lora_dropout  # as a run does that goes on from an adapter
        out[variant.key] = Variant(
            variant.key, variant.fields, variant.config.replace(**changes), source.key, variant.only_a_start, shape
        )
    return list(out.values())


def _require_different(made: Sequence[Variant], tuned: bool) -> None:
    compared = [variant for variant in made if not variant.only_a_start]
    if len(compared) < 2:
        raise UsageError(
            f"{len(compared)} variant is nothing to compare: give at least two methods, or vary a field: "
            "--methods lora,qlora or --vary lora_r=8,16"
        )
    searched = {"learning_rate"} if tuned else None
    for one, other in itertools.combinations(compared, 2):
        if one.continue_from != other.continue_from:
            continue
        if one.config.model_dump() == other.config.model_dump():
            raise UsageError(f"{one.key} and {other.key} are the same run: leave one out")
        if one.config.model_dump(exclude=searched) == other.config.model_dump(exclude=searched):
            raise UsageError(
                f"{one.key} and {other.key} differ in nothing but the learning rate, which --tune-lr searches: leave "
                "one out"
            )
