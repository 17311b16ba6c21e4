"""What lies beside the weights: config.json, generation_config.json, the tokenizer and its chat template."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from halfbyte.adapters.heads import label_fields
from halfbyte.models.source import ModelSource
from halfbyte.models.spec import ModelSpec

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md")


def write_model_files(
    folder: Path, source: ModelSource, adapter: Path, dtype: str, labels: tuple[str, ...] | None = None
) -> None:
    """Everything but the weights. Files of the adapter's folder (its chat template) replace the source's.

    labels   of a classifier; None: a language model
    """
    config = merged_config(source.config, dtype)
    _write_json(folder / "config.json", config if labels is None else classifier_config(config, source, labels))
    if source.generation:
        _write_json(folder / "generation_config.json", source.generation)
    if source.path.is_dir():
        _copy(source.path, folder, (*TOKENIZER_FILES, *LICENCE_FILES))
    else:
        source.tokenizer().save_pretrained(folder)
    _copy(adapter, folder, TOKENIZER_FILES)


def merged_config(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The source's config.json for unquantized weights in `dtype`; of a multimodal model, its text model's."""
    out = dict(config)
    if "text_config" in out and ModelSpec.serves(config):
        text = dict(out.pop("text_config"))
        shared = {key: out[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if out.get(key) is not None}
        out = {**shared, **text, "model_type": text.get("model_type", f"{config['model_type']}_text")}
        out["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[out["model_type"]]]
    for key in ("quantization_config", "torch_dtype", "_name_or_path", "auto_map"):
        out.pop(key, None)
    out["dtype"] = dtype
    pair = bool(out.get("is_encoder_decoder"))
    names = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES if pair else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    out.setdefault("architectures", [names.get(out["model_type"], "")])
    return out


def classifier_config(config: dict[str, Any], source: ModelSource, labels: tuple[str, ...]) -> dict[str, Any]:
    """A merged config.json as of transformers' model for sequence classification.

    Its padding decides which token is a text's last: the tokenizer's own, or (as a text does not end with it) its end.
    """
    out = config | label_fields(labels) | {"num_labels": len(labels), "problem_type": "single_label_classification"}
    out["architectures"] = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[out["model_type"]]]
    if out.get("pad_token_id") is None:
        tokenizer = source.tokenizer()
        out["pad_token_id"] = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return out


def _copy(source: Path, folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
