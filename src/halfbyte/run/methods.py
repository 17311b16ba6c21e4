"""The methods by the names that the field gives them, each a preset over the same fields.

A run's config has three ways to hold a base (`method`: full, lora, qlora) and fields for everything else. A name such
as `qdora` is short for some of them: reading a config writes them out, so that run.yaml says `method: qlora` and
`use_dora: true`, and `name_of` finds the name again for people. Nothing in halfbyte asks for a preset.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Base = Literal["auto", "full", "lora", "qlora"]


@dataclass(frozen=True)
class Preset:
    """method       how the base is held
    fields       what else is set, where the config does not set it itself
    is_one       whether a field's value still is this method: `pissa_niter_16` is PiSSA, `gaussian` is not
    summary      one line for people
    source       the paper
    """

    method: Base
    summary: str
    source: str
    fields: Mapping[str, Any]
    is_one: Callable[[str, Any], bool] = lambda field, value: True


def _equals(**expected: Any) -> Callable[[str, Any], bool]:
    return lambda field, value: field not in expected or value == expected[field]


def _pissa(field: str, value: Any) -> bool:
    return field != "init_lora_weights" or str(value).startswith("pissa")


def _galore(field: str, value: Any) -> bool:
    return field != "optim" or str(value).startswith("galore")


def _ratio(field: str, value: Any) -> bool:
    return field != "loraplus_lr_ratio" or value is not None


_RANK_STABLE = _equals(use_rslora=True)
_DORA = _equals(use_dora=True)
_LOFTQ = _equals(init_lora_weights="loftq")

PRESETS: dict[str, Preset] = {
    "full": Preset("full", "every weight is trained, in 16 or 32 bits", "", {}),
    "galore": Preset(
        "full",
        "every weight, with gradients projected to a low rank for the optimizer",
        "arXiv 2403.03507",
        {"optim": "galore_adamw"},
        _galore,
    ),
    "lora": Preset("lora", "low-rank adapters on a base in 16 bits", "arXiv 2106.09685", {}),
    "qlora": Preset("qlora", "low-rank adapters on a base in 4 bits or a file's own blocks", "arXiv 2305.14314", {}),
    "rslora": Preset("lora", "LoRA scaled by alpha / sqrt(r)", "arXiv 2312.03732", {"use_rslora": True}, _RANK_STABLE),
    "qrslora": Preset(
        "qlora", "QLoRA scaled by alpha / sqrt(r)", "arXiv 2312.03732", {"use_rslora": True}, _RANK_STABLE
    ),
    "loraplus": Preset(
        "lora", "LoRA with a higher learning rate for B", "arXiv 2402.12354", {"loraplus_lr_ratio": 16.0}, _ratio
    ),
    "qloraplus": Preset(
        "qlora", "QLoRA with a higher learning rate for B", "arXiv 2402.12354", {"loraplus_lr_ratio": 16.0}, _ratio
    ),
    "dora": Preset("lora", "LoRA with a trained magnitude a row", "arXiv 2402.09353", {"use_dora": True}, _DORA),
    "qdora": Preset("qlora", "QLoRA with a trained magnitude a row", "arXiv 2402.09353", {"use_dora": True}, _DORA),
    "pissa": Preset(
        "lora",
        "LoRA that starts from the weight's largest singular vectors",
        "arXiv 2404.02948",
        {"init_lora_weights": "pissa"},
        _pissa,
    ),
    "qpissa": Preset(
        "qlora",
        "PiSSA with the rest of the weight quantized",
        "arXiv 2404.02948",
        {"init_lora_weights": "pissa"},
        _pissa,
    ),
    "loftq": Preset(
        "qlora",
        "QLoRA that starts from what quantization lost",
        "arXiv 2310.08659",
        {"init_lora_weights": "loftq"},
        _LOFTQ,
    ),
}
"""Name → preset, from the most memory to the least. Also the rows of docs/methods.md."""

SPELLINGS = {
    "lora+": "loraplus",
    "lora_plus": "loraplus",
    "qlora+": "qloraplus",
    "qlora_plus": "qloraplus",
}
"""Other spellings of the same names."""


def named_presets() -> list[str]:
    """The names that are no way to hold a base by themselves."""
    return [name for name, preset in PRESETS.items() if preset.fields]


def known(name: str) -> str | None:
    """Our name for a method's name in any of its spellings; None where it is not one."""
    name = name.lower()
    name = SPELLINGS.get(name, name)
    return name if name == "auto" or name in PRESETS else None


def expand(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a config with the preset that its `method` names written out. ValueError where they contradict it.

    What a config sets itself stays, as long as it still is that method: `galore` with `optim: galore_adamw_8bit`.
    """
    name = known(str(values.get("method", "")))
    if name is None or name == "auto":
        return dict(values)
    preset, expanded = PRESETS[name], dict(values)
    expanded["method"] = preset.method
    for field, value in preset.fields.items():
        if expanded.get(field) is None:
            expanded[field] = value
        elif not preset.is_one(field, expanded[field]):
            raise ValueError(f"{name} means {field}: {_plain(value)}, and {field} is {_plain(expanded[field])}")
    return expanded


QUANTIZED = {"lora": "qlora", **{name: "q" + name for name in ("rslora", "loraplus", "dora", "pissa")}}
"""The same method on a quantized base."""


def name_of(values: Mapping[str, Any]) -> str:
    """The method's name for people: the preset that sets the most of these fields; several are joined with a plus.

    LoRA with `use_dora` and `use_rslora` is `dora+rslora`.
    """
    method = str(values["method"])
    found = [
        name
        for name, preset in PRESETS.items()
        if preset.method == method
        and preset.fields
        and all(sets(preset, field, values.get(field)) for field in preset.fields)
    ]
    return "+".join(sorted(found)) or method


def sets(preset: Preset, field: str, value: Any) -> bool:
    """Whether this value of a field is the preset's, or one that still is this method."""
    return value is not None and value is not False and preset.is_one(field, value)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
