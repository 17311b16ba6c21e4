"""Other tools' spellings of our options, as a table: name there → field here, and how its value converts.

Read from the documentation of Axolotl, LLaMA-Factory, TRL and PEFT, Unsloth, torchtune and mlx-lm, so that a file
that works there mostly works here. An alias is only taken where it means the same thing: mlx-lm's `lora_scale`,
for one, is alpha over r, and is therefore not an alias of `lora_alpha`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from halfbyte.run.methods import PRESETS, QUANTIZED


@dataclass(frozen=True)
class Alias:
    """`field` is ours; `convert` maps their value onto ours and raises ValueError where it cannot."""

    field: str
    convert: Callable[[Any], Any] = lambda value: value


def _flag(value: Any) -> bool:
    """A boolean as YAML, a flag or a person writes it."""
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "1", "yes", "on"):
        return True
    if str(value).lower() in ("false", "0", "no", "off"):
        return False
    raise ValueError("expected true or false")


def _not(value: Any) -> bool:
    return not _flag(value)


def _checkpointing(value: Any) -> bool:
    return True if value == "unsloth" else _flag(value)


def _targets(value: Any) -> Any:
    """LLaMA-Factory writes `all`, Axolotl `linear`, PEFT `all-linear`; a comma list is a list."""
    if value in ("all", "linear", "all-linear"):
        return "all-linear"
    return [part.strip() for part in value.split(",")] if isinstance(value, str) and "," in value else value


def _target_linear(value: Any) -> str:
    if not _flag(value):
        raise ValueError("false says nothing: name the modules with target_modules")
    return "all-linear"


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


def _dtype(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    return _DTYPES.get(name, name)


def _dtype_switch(name: str) -> Callable[[Any], Any]:
    """`bf16: true` chooses bf16; `auto` and false leave the choice to us."""

    def convert(value: Any) -> Any:
        return "auto" if value == "auto" or not _flag(value) else name

    return convert


def _datasets(value: Any) -> Any:
    """Axolotl's list of {path, type}: the paths. A further key there would change the rows, so it is refused."""
    if not isinstance(value, list):
        return value
    paths = []
    for item in value:
        if isinstance(item, dict):
            extra = sorted(set(item) - {"path", "type", "ds_type", "weight"})
            if "path" not in item or extra:
                raise ValueError(f"each data set is a path, or a mapping with path (not understood: {extra})")
            paths.append({"path": item["path"], "weight": item["weight"]} if "weight" in item else item["path"])
        else:
            paths.append(item)
    return paths[0] if len(paths) == 1 and isinstance(paths[0], str) else paths


_TASKS = {"causal_lm": "causal", "seq_cls": "classification", "seq_2_seq_lm": "seq2seq"}


ALIASES: dict[str, Alias] = {
    # the model
    "base_model": Alias("model"),
    "model_name": Alias("model"),
    "model_name_or_path": Alias("model"),
    "model_id": Alias("model"),
    "model_path": Alias("model"),
    "base_model_name_or_path": Alias("model"),
    "model_revision": Alias("revision"),
    "torch_dtype": Alias("dtype", _dtype),
    "compute_dtype": Alias("dtype", _dtype),
    "bnb_4bit_compute_dtype": Alias("dtype", _dtype),
    "bf16": Alias("dtype", _dtype_switch("bfloat16")),
    "fp16": Alias("dtype", _dtype_switch("float16")),
    # data
    "dataset": Alias("data", _datasets),
    "datasets": Alias("data", _datasets),
    "dataset_name": Alias("data"),
    "dataset_path": Alias("data"),
    "dataset_id": Alias("data"),
    "data_path": Alias("data"),
    "train_file": Alias("data"),
    "train_data": Alias("data"),
    "test_datasets": Alias("eval_data", _datasets),
    "eval_dataset": Alias("eval_data"),
    "validation_file": Alias("eval_data"),
    "valid_data": Alias("eval_data"),
    "val_set_size": Alias("eval_split"),
    "val_size": Alias("eval_split"),
    "validation_split": Alias("eval_split"),
    "test_size": Alias("eval_split"),
    "cutoff_len": Alias("max_seq_length"),
    "max_length": Alias("max_seq_length"),
    "max_seq_len": Alias("max_seq_length"),
    "sequence_len": Alias("max_seq_length"),
    "model_max_length": Alias("max_seq_length"),
    "seq_length": Alias("max_seq_length"),
    "sample_packing": Alias("packing"),
    "pack": Alias("packing"),
    "packed": Alias("packing"),
    "mask_prompt": Alias("train_on_inputs", _not),
    "completion_only_loss": Alias("train_on_inputs", _not),
    "assistant_only_loss": Alias("train_on_inputs", _not),
    "train_on_responses_only": Alias("train_on_inputs", _not),
    "chat_template_path": Alias("chat_template"),
    "task_type": Alias("task", lambda value: _TASKS.get(str(value).lower(), value)),
    # preferences
    "pref_beta": Alias("dpo_beta"),
    "beta": Alias("dpo_beta"),
    "pref_loss": Alias("dpo_loss"),
    "label_smoothing": Alias("dpo_label_smoothing"),
    "rpo_alpha": Alias("dpo_nll_weight"),
    "pref_ftx": Alias("dpo_nll_weight"),
    "rl": Alias("task"),
    # the adapter
    "r": Alias("lora_r"),
    "rank": Alias("lora_r"),
    "lora_rank": Alias("lora_r"),
    "alpha": Alias("lora_alpha"),
    "dropout": Alias("lora_dropout"),
    "lora_target": Alias("target_modules", _targets),
    "lora_target_modules": Alias("target_modules", _targets),
    "lora_target_linear": Alias("target_modules", _target_linear),
    "peft_use_rslora": Alias("use_rslora"),
    "lora_use_rslora": Alias("use_rslora"),
    "peft_init_lora_weights": Alias("init_lora_weights"),
    "peft_use_dora": Alias("use_dora"),
    "lora_use_dora": Alias("use_dora"),
    "lora_modules_to_save": Alias("modules_to_save"),
    "additional_target": Alias("modules_to_save"),
    "loraplus_ratio": Alias("loraplus_lr_ratio"),
    "adapter_name_or_path": Alias("adapter_path"),
    "lora_model_dir": Alias("adapter_path"),
    "resume_adapter_file": Alias("adapter_path"),
    # quantization
    "bnb_4bit_quant_type": Alias("quant_type"),
    "quantization_type": Alias("quant_type"),
    "bnb_4bit_use_double_quant": Alias("double_quant"),
    "use_bnb_nested_quant": Alias("double_quant"),
    # optimizer and schedule
    "optimizer": Alias("optim", lambda value: own_value("optim", value)),
    "lr": Alias("learning_rate"),
    "lr_scheduler": Alias("lr_scheduler_type"),
    "scheduler": Alias("lr_scheduler_type"),
    "num_warmup_steps": Alias("warmup_steps"),
    "wd": Alias("weight_decay"),
    "gradient_clipping": Alias("max_grad_norm"),
    "clip_grad_norm": Alias("max_grad_norm"),
    # the loop
    "batch_size": Alias("per_device_train_batch_size"),
    "micro_batch_size": Alias("per_device_train_batch_size"),
    "train_batch_size": Alias("per_device_train_batch_size"),
    "gradient_accumulation": Alias("gradient_accumulation_steps"),
    "grad_accumulation_steps": Alias("gradient_accumulation_steps"),
    "grad_accum": Alias("gradient_accumulation_steps"),
    "epochs": Alias("num_train_epochs"),
    "num_epochs": Alias("num_train_epochs"),
    "iters": Alias("max_steps"),
    "max_iters": Alias("max_steps"),
    "num_steps": Alias("max_steps"),
    "use_gradient_checkpointing": Alias("gradient_checkpointing", _checkpointing),
    "grad_checkpoint": Alias("gradient_checkpointing", _flag),
    "enable_activation_checkpointing": Alias("gradient_checkpointing", _flag),
    "activation_checkpointing": Alias("gradient_checkpointing", _flag),
    "save_every": Alias("save_steps"),
    "steps_per_eval": Alias("eval_steps"),
    "eval_every": Alias("eval_steps"),
    "steps_per_report": Alias("logging_steps"),
    "log_every_n_steps": Alias("logging_steps"),
    "log_every": Alias("logging_steps"),
    "random_state": Alias("seed"),
    "random_seed": Alias("seed"),
    "out_dir": Alias("output_dir"),
    "output_path": Alias("output_dir"),
    "max_memory": Alias("memory"),
}

IGNORED: dict[str, tuple[Any, ...]] = {
    "stage": ("sft",),
    "do_train": (True,),
    "do_eval": (True,),
    "trust_remote_code": (False, None),
    "strict": (False, None),
    "dpo": (False,),
}
"""Keys of other tools that, with these values, ask for what happens here anyway."""

_OWN_VALUES: dict[str, dict[str, str]] = {
    "optim": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "paged_adamw_32bit": "paged_adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw8bit": "adamw_8bit",
        "galore_adamw_layerwise": "galore_adamw",
        "galore_adamw_8bit_layerwise": "galore_adamw_8bit",
    },
    "dtype": _DTYPES,
    "target_modules": {"all": "all-linear", "linear": "all-linear"},
}


def own_value(field: str, value: Any) -> Any:
    """Our name for a value that other tools call otherwise (`optim: adamw_torch`)."""
    if field == "gradient_checkpointing" and value == "unsloth":
        return True
    return _OWN_VALUES.get(field, {}).get(value, value) if isinstance(value, str) else value


METHOD_KEYS = ("adapter", "finetuning_type", "use_peft", "full_finetuning", "peft_method", "fine_tune_type")
BITS_KEYS = ("load_in_4bit", "load_in_8bit", "quantization_bit")
SWITCHES = frozenset(
    {"load_in_4bit", "load_in_8bit", "use_peft", "full_finetuning", "bf16", "fp16", "sample_packing", "pack", "packed"}
    | {"mask_prompt", "completion_only_loss", "assistant_only_loss", "train_on_responses_only"}
    | {"lora_target_linear", "peft_use_rslora", "lora_use_rslora", "peft_use_dora", "lora_use_dora"}
    | {"bnb_4bit_use_double_quant", "use_bnb_nested_quant"}
    | {"grad_checkpoint", "enable_activation_checkpointing", "activation_checkpointing", "use_gradient_checkpointing"}
)
"""Names above that a command line gives without a value."""
LATER_KEYS = {"neftune_noise_alpha": "NEFTune", "use_galore": "use_galore (method: galore is)"}
LATER_KEYS |= {"loftq": "loftq as a switch (method: loftq is)"}
LATER_METHODS = ("eva", "qgalore", "adalora", "vera", "ia3", "freeze", "prefix", "prompt", "orpo", "kto")
"""Names that other tools know and that are not built: each is answered with that."""
TASKS_ELSEWHERE = ("dpo",)
"""What other tools call a method, and is a task here."""


def method_and_bits(key: str, value: Any) -> tuple[str | None, int | None]:
    """What one of METHOD_KEYS or BITS_KEYS says: (full | lora | qlora | None, bits of the base or None).

    None means that the key leaves it open, as `load_in_4bit: false` leaves the adapter open and says 16 bits.
    """
    if key == "quantization_bit":
        if str(value) not in ("4", "8"):
            raise ValueError("expected 4 or 8")
        return None, int(value)
    if key in ("load_in_4bit", "load_in_8bit"):
        return None, (4 if "4" in key else 8) if _flag(value) else 16
    if key == "use_peft":
        return ("lora" if _flag(value) else "full"), None
    if key == "full_finetuning":
        return ("full" if _flag(value) else None), None
    name = str(value).lower()
    if name in ("full", "none", ""):
        return "full", None
    return name, None


def combined_method(names: set[str], bits: set[int]) -> str | None:
    """The method that all METHOD_KEYS and BITS_KEYS of a config mean together; ValueError where they disagree.

    Elsewhere QLoRA is `lora` plus a 4-bit base; here it is a method of its own.
    """
    if len(bits) > 1 and 16 in bits:
        bits = bits - {16}  # load_in_8bit: false beside load_in_4bit: true
    if len(bits) > 1:
        raise ValueError("they ask for a 4-bit and an 8-bit base at once")
    quantized = bool(bits & {4, 8})
    if quantized or "qlora" in names:
        names = {QUANTIZED.get(name, name) for name in names}
    if len(names) > 1:
        raise ValueError(f"they mean {' and '.join(sorted(names))}")
    name = next(iter(names), None)
    if name is not None and name in PRESETS and PRESETS[name].method == "full" and quantized:
        raise ValueError("full fine-tuning needs a 16-bit base")
    if name is not None and name in PRESETS and PRESETS[name].method == "qlora" and bits == {16}:
        raise ValueError(f"{'QLoRA' if name == 'qlora' else name} needs a 4-bit or 8-bit base")
    return name or ("qlora" if quantized else None)
