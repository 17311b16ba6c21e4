"""Adapters on a model's linears: creation, PEFT-format files, and switching them off."""

from halfbyte.adapters.lora import (
    AttachReport,
    LoraOptions,
    adapter_state,
    attach,
    detach,
    disabled,
    load_adapter_state,
    parameters,
    target_names,
)
from halfbyte.adapters.peft_io import load_adapter, read_adapter, read_adapter_config, read_options
from halfbyte.adapters.peft_save import save_adapter

__all__ = [
    "AttachReport",
    "LoraOptions",
    "adapter_state",
    "attach",
    "detach",
    "disabled",
    "load_adapter",
    "load_adapter_state",
    "parameters",
    "read_adapter",
    "read_adapter_config",
    "read_options",
    "save_adapter",
    "target_names",
]
