"""The model card: what was trained on what, with which numbers, and how to load it. Written from facts only."""

from pathlib import Path
from typing import Any

import yaml

from halfbyte.run.config import RunConfig
from halfbyte.run.planning import Survey


def model_card(config: RunConfig, found: Survey, result: dict[str, Any]) -> str:
    """README.md of a run's folder, with the front matter that the Hub reads."""
    front: dict[str, Any] = {
        "base_model": config.model,
        "library_name": "transformers" if config.method == "full" else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["halfbyte", config.method],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {Path(config.model).name}, tuned with {_method(config)}",
        _table([("figure", "value"), *_figures(result)]),
        "## How it was trained",
        _table([("option", "value"), *_options(config)]),
        _data(found),
        "## How to load it",
        _loading(config),
        "Trained with halfbyte; `run.yaml` in this folder repeats the run.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _method(config: RunConfig) -> str:
    if config.method == "full":
        return "full fine-tuning"
    return "LoRA" if config.method == "lora" else f"QLoRA ({config.quant_type}, blocks of {config.blocksize})"


def _figures(result: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("training loss", _number(result["train_loss"]))]
    if result["base_eval_loss"] is not None:
        low, high = result["metrics"]["intervals"].get("loss", (None, None))
        interval = f" (95 %: {low:.4f} to {high:.4f})" if low is not None else ""
        rows.append(("held-out loss, base", _number(result["base_eval_loss"])))
        rows.append(("held-out loss, tuned", _number(result["eval_loss"]) + interval))
    rows += [
        ("steps", f"{result['step']:,}"),
        ("tokens", f"{result['tokens']:,}, of which {result['supervised_tokens']:,} supervised"),
        ("time", f"{result['seconds']:,.0f} s, {result['tokens_per_second']:,.0f} tokens/s"),
        ("peak memory", f"{result['peak_memory_bytes'] / 1e9:.2f} GB"),
    ]
    return rows


def _options(config: RunConfig) -> list[tuple[str, str]]:
    rows = [
        ("learning rate", f"{config.learning_rate:g}, {config.lr_scheduler_type}"),
        ("optimizer", config.optim),
        (
            "rows in an update",
            f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} accumulated",
        ),
        ("longest row", f"{config.max_seq_length} tokens"),
        ("computed in", config.dtype),
        ("seed", str(config.seed)),
    ]
    if config.method != "full":
        target = config.target_modules
        named = target if isinstance(target, str) else ", ".join(target)
        rows.insert(0, ("adapter", f"r {config.lora_r}, alpha {config.lora_alpha:g}, {named}"))
    return rows


def _data(found: Survey) -> str:
    prepared = found.prepared
    if prepared is None:
        return ""
    template = f", template {prepared.template.name}" if prepared.template else ""
    return (
        f"Data: {len(prepared.train):,} rows to train on and {len(prepared.eval):,} held out, in the format "
        f"{prepared.data_format}{template}; fingerprint `{prepared.fingerprint[:16]}`."
    )


def _loading(config: RunConfig) -> str:
    if config.method == "full":
        load = "model = AutoModelForCausalLM.from_pretrained(FOLDER)"
        return f"```python\nfrom transformers import AutoModelForCausalLM\n\n{load}\n```"
    note = ""
    if config.method == "qlora":
        note = (
            f"\n\nThe adapter was trained on a base in {config.quant_type}; `halfbyte merge` writes one model folder "
            "of exactly that base and this adapter."
        )
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{config.model}")\n'
        f"model = PeftModel.from_pretrained(base, FOLDER)\n```{note}"
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _table(rows: list[tuple[str, str]]) -> str:
    head, *body = rows
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in body)]
    return "\n".join(lines)
