"""The options of adapters: where they go, what they look like, what they begin with. Names and meaning are PEFT's."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator

from halfbyte.errors import UsageError
from halfbyte.options import Options, nearest

ALL_LINEAR = "all-linear"
_PISSA = re.compile(r"pissa(?:_niter_([1-9][0-9]?))?")


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


def _known_initial(name: str) -> str:
    if name not in ("default", "gaussian", "loftq") and not _PISSA.fullmatch(name):
        raise ValueError(f"{name!r} is none of default, gaussian, pissa, pissa_niter_N (N from 1 to 99), loftq")
    return name


def _no_empty_name(names: list[str]) -> list[str]:
    if "" in names:
        raise ValueError("an empty module name")
    return names


Pattern = Annotated[str, AfterValidator(_compiles)]


class LoraOptions(Options):
    """Where adapters go and what they look like. Defaults follow the field's common recipe."""

    lora_r: int = Field(16, ge=1, le=4096, description="Rank of the adapters.")
    lora_alpha: float = Field(
        32, gt=0, allow_inf_nan=False, description="Scale: the update is multiplied by alpha / r."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' inputs while training.")
    target_modules: str | list[str] = Field(
        ALL_LINEAR,
        description="Linears that get an adapter: all-linear (every one but the output head), "
        "names such as q_proj,v_proj, or one regular expression over full names.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r) instead (rank-stabilised LoRA).")
    use_dora: bool = Field(
        False, description="Train the length of every row of the adapted weight beside its direction (DoRA)."
    )
    init_lora_weights: Annotated[str, AfterValidator(_known_initial)] = Field(
        "default",
        description="Initial values: default (A Kaiming uniform as in PEFT, B zero), gaussian (A normal), pissa (the "
        "weight's largest singular components; pissa_niter_N finds them faster, in N iterations), or loftq (what "
        "quantizing the base lost).",
    )
    loftq_iter: int = Field(
        1, ge=1, le=100, description="Steps of loftq; more than 1 change the quantized base, 5 are typical."
    )
    modules_to_save: Annotated[list[str], AfterValidator(_no_empty_name)] = Field(
        default_factory=list,
        description="Modules trained whole beside the adapters, by name or its end: embed_tokens, lm_head, norm (every "
        "name that ends so, as in PEFT), or linears.",
    )
    rank_pattern: dict[Pattern, Annotated[int, Field(ge=1, le=4096)]] = Field(
        default_factory=dict, description="Rank for names that end in a key, or match it as a regular expression."
    )
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="Alpha by name, like rank_pattern."
    )
    adapter_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the saved adapter's factors; training keeps float32 either way."
    )

    def rank_of(self, name: str) -> int:
        return int(_pattern(self.rank_pattern, name, self.lora_r))

    def alpha_of(self, name: str) -> float:
        return float(_pattern(self.alpha_pattern, name, self.lora_alpha))

    def scaling_of(self, name: str) -> float:
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)

    def require_linears(self, names: Iterable[str]) -> None:
        """UsageError for a key of the patterns that matches none of these linears."""
        names = list(names)
        for option in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, option):
                if not any(_is_meant(key, name) for name in names):
                    raise UsageError(f"{option}: {key!r} matches no linear of the model; {nearest(key, names)}")

    @property
    def pissa_iterations(self) -> int | None:
        """N of pissa_niter_N; None for the exact decomposition."""
        found = _PISSA.fullmatch(self.init_lora_weights)
        return int(found[1]) if found and found[1] else None

    @property
    def shifts_base(self) -> bool:
        """Whether the base changes with the initial values (PiSSA; LoftQ of more than one step)."""
        return bool(_PISSA.fullmatch(self.init_lora_weights)) or (
            self.init_lora_weights == "loftq" and self.loftq_iter > 1
        )

    @property
    def file_dtype(self) -> torch.dtype:
        """The type of the saved factors."""
        return torch.bfloat16 if self.adapter_dtype == "bfloat16" else torch.float32

    @model_validator(mode="after")
    def _expressible(self) -> Self:
        if self.loftq_iter != 1 and self.init_lora_weights != "loftq":
            raise ValueError("loftq_iter is for init_lora_weights loftq: set that, or leave loftq_iter out")
        if self.use_dora and self.shifts_base:
            what = "pissa" if self.init_lora_weights != "loftq" else "loftq with loftq_iter above 1"
            raise ValueError(
                f"{what} does not go with use_dora: it changes the base, and a DoRA that is written for the unchanged "
                "base would have to undo that inside the row norms, which no adapter file expresses; use loftq with "
                "loftq_iter 1, or plain LoRA"
            )
        if self.shifts_base and max((self.lora_r, *self.rank_pattern.values())) > 2048:
            raise ValueError("a shifted base (pissa, loftq) is saved as an adapter of twice the rank: at most 2048")
        return self


def _pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The first key that matches."""
    for key, value in patterns.items():
        if _is_meant(key, name):
            return value
    return default


def _is_meant(key: str, name: str) -> bool:
    """PEFT's rule: a key matches the name or its end after a dot."""
    return re.match(rf"(.*\.)?({key})$", name) is not None
