from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import flags
from halfbyte.cli.flags import kind_of
from halfbyte.errors import UsageError
from halfbyte.run.config import RunConfig, load_config


@pytest.mark.parametrize(
    ("annotation", "kind"),
    [
        (bool, "bool"), (bool | None, "bool"), (int | None, "str"), (str | list[str], "list"), (Path | None, "str"),
        (dict[str, int] | None, "dict"), (tuple[str, ...], "list"), (Sequence[str] | None, "str"), (bool | str, "str"),
    ],
)  # fmt: skip
def test_kinds(annotation: Any, kind: str) -> None:
    assert kind_of(annotation) == kind


def given(**values: Any) -> RunConfig:
    """A config from flags as the command line hands them over."""
    fields = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    converted = {name: flags._value(name, value, fields) for name, value in values.items()}
    return load_config(None, {"model": "m"} | converted)


def test_values() -> None:
    assert given(target_modules=["q_proj,v_proj", "o_proj"]).target_modules == ["q_proj", "v_proj", "o_proj"]
    assert given(target_modules=["all-linear"]).target_modules == "all-linear"
    assert given(lora_target=["all"]).target_modules == "all-linear"
    assert given(quant_pattern=["down_proj=bf16", "o_proj=int8"]).quant_pattern == {
        "down_proj": "bf16",
        "o_proj": "int8",
    }
    assert given(blocksize="4096").blocksize == 4096
    assert given(data=["a,b.jsonl"]).data == "a,b.jsonl"
    assert [s.path for s in given(data=["a", "b"]).data or () if not isinstance(s, str)] == ["a", "b"]
    assert given(report_to=["tensorboard,wandb"]).report_to == ("tensorboard", "wandb")
    with pytest.raises(UsageError, match="--quant-pattern x: write it as KEY=VALUE"):
        given(quant_pattern=["x"])


def test_help_shows_words_units_and_defaults() -> None:
    fields = RunConfig.model_fields
    assert flags._metavar(fields["quant_type"], "str") == "nf4|fp4|e2m1|int4|int8"
    assert flags._metavar(fields["memory"], "str") == "SIZE"
    assert flags._metavar(fields["learning_rate"], "str") == "X"
    assert flags._metavar(fields["lora_r"], "str") == "N"
    assert flags._help(fields["lora_r"]).endswith("\\[default: 16]")
    assert "default: None" not in "".join(flags._help(field) for field in fields.values())
