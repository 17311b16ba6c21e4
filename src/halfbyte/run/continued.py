"""A run that goes on from an adapter (`adapter_path`): where the adapter is, and what of the config is its own."""

import re
from pathlib import Path
from typing import Any

from halfbyte.adapters import read_options
from halfbyte.adapters.options import ALL_LINEAR
from halfbyte.adapters.peft_io import CONFIG as ADAPTER_CONFIG
from halfbyte.errors import UsageError
from halfbyte.run.config import RunConfig
from halfbyte.train.checkpoint import list_checkpoints

SHAPE = (
    "lora_r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)
"""Fields that a given adapter has already."""


def adapter_folder(path: Path) -> Path:
    """A folder with PEFT's files: this one, or an unfinished run's last checkpoint."""
    for candidate in (path, *reversed(list_checkpoints(path) if path.is_dir() else [])):
        if (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    raise UsageError(f"{path} has no adapter yet (no {ADAPTER_CONFIG}, and no checkpoint with one)")


def with_adapter(config: RunConfig) -> RunConfig:
    """With `adapter_path`, the adapter's own shape is the run's. UsageError for another one: it would be ignored.

    `adapter_path` then is the folder with PEFT's files, also where an unfinished run was meant. `all-linear` stands for
    the adapter's own targets: which linears the model has is not known here.
    """
    if config.adapter_path is None:
        return config
    if config.method == "full":
        raise UsageError("adapter_path continues an adapter, and method full has none: leave one out")
    folder = adapter_folder(Path(config.adapter_path).expanduser())
    if config.init_lora_weights != "default":
        raise UsageError(
            f"init_lora_weights is {config.init_lora_weights!r}, and the adapter in {folder} has its values already: "
            "leave it out"
        )
    options = read_options(folder)
    for name in SHAPE:
        asked, own = getattr(config, name), getattr(options, name)
        if config.given(name) and not _same(name, asked, own):
            raise UsageError(f"{name} is {asked!r}, and the adapter in {folder} has {own!r}: leave it out")
    changes = {name: getattr(options, name) for name in SHAPE}
    if not config.given("lora_dropout"):
        changes["lora_dropout"] = options.lora_dropout
    return config.replace(adapter_path=str(folder.resolve()), **changes)


def _same(name: str, asked: Any, own: Any) -> bool:
    if name != "target_modules":
        return bool(asked == own)
    return asked in (ALL_LINEAR, [ALL_LINEAR]) or _names(asked) == _names(own)


def _names(targets: str | list[str]) -> set[str]:
    """Names in whatever order; a regular expression is itself."""
    if isinstance(targets, str) and not re.search(r"[^\w.,\s-]", targets):
        return {target.strip() for target in targets.split(",")}
    return {targets} if isinstance(targets, str) else set(targets)
