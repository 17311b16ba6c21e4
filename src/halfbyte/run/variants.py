"""The same run by other methods: what a plan compares. From a config and the methods' names to configs."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from halfbyte.errors import UsageError
from halfbyte.run import methods
from halfbyte.run.config import ADAPTERS_ALONE, QUANTIZED_ALONE, RunConfig

PLAIN = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Variant:
    """A config with a method of its own. `lost`: fields that the user set and that this method has no use for."""

    name: str
    config: RunConfig
    lost: tuple[str, ...] = ()


def known_methods(words: Iterable[str]) -> tuple[str, ...]:
    """Methods by their names, each once. UsageError for a name that is none."""
    found: list[str] = []
    for word in (part.strip() for text in words for part in text.split(",")):
        name = methods.known(word)
        if name is None or name == "auto":
            near = difflib.get_close_matches(word.lower(), methods.PRESETS, 1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(methods.PRESETS)}"
            raise UsageError(f"--methods: {word!r} is not a method: {known}")
        if name not in found:
            found.append(name)
    return tuple(found)


def variants(config: RunConfig, names: Iterable[str] = (), full: bool = True) -> list[Variant]:
    """What to compare: the methods of these names, else full, LoRA and QLoRA; and the config's own among them.

    Under `auto` the three keep what the config says of adapters: with `use_dora` they are full, dora and qdora.

    full   whether the model can be trained whole
    """
    names = tuple(names)
    own = None if config.method == "auto" else config.method_name
    if names or own is not None:
        wanted = dict.fromkeys([*(names or PLAIN), *([own] if own is not None else [])])
        found = [Variant(own, config) if name == own else _named(config, name) for name in wanted]
    else:
        found = [_held(config, base) for base in PLAIN if not (base == "lora" and config.init_lora_weights == "loftq")]
    return [one for one in found if full or one.config.method != "full" or one.name == own]


def _held(config: RunConfig, base: str) -> Variant:
    """The config with its base held in one way, and everything else as it is, as far as it goes with that."""
    lost = tuple(name for name in _useless(base) if _is_set(config, name))
    changed = config.without(lost, method=base)
    return Variant(changed.method_name, changed, lost)


def _named(config: RunConfig, name: str) -> Variant:
    """Exactly the method of that name: no other method's fields stay."""
    preset = methods.PRESETS[name]
    others = {
        field
        for other in methods.PRESETS.values()
        for field in other.fields
        if field not in preset.fields and methods.sets(other, field, getattr(config, field))
    }
    useless = _useless(preset.method)
    if name != "loftq":
        useless = (*useless, "loftq_iter")
    lost = tuple(dict.fromkeys([*sorted(others), *(field for field in useless if _is_set(config, field))]))
    changed = config.without(lost, **methods.expand({"method": name}))
    return Variant(name, changed, lost)


def _useless(base: str) -> tuple[str, ...]:
    adapters = (*ADAPTERS_ALONE, "loftq_iter") if base == "full" else ()
    return (*adapters, *(QUANTIZED_ALONE if base != "qlora" else ()))


def _is_set(config: RunConfig, name: str) -> bool:
    return bool(getattr(config, name) != RunConfig.model_fields[name].get_default(call_default_factory=True))
