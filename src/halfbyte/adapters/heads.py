"""A classifier's trained head beside its adapters: PEFT's `modules_to_save` of task_type SEQ_CLS, and the labels.

The head is a linear without bias at the model's attribute `score`, trained whole. Its tensor is
`base_model.model.score.weight`; PEFT keeps no names of classes, so they are in a file of ours beside its two.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from halfbyte.errors import UsageError
from halfbyte.files import write_atomic

HEAD = "score"
KEY = f"base_model.model.{HEAD}.weight"
LABELS = "labels.json"
_PEFT_HEADS = frozenset({"classifier", HEAD})  # what PEFT saves with SEQ_CLS unasked, whether the model has it or not
_TASK_TYPES = {"classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}


def head_of(model: nn.Module) -> nn.Linear | None:
    """The head of a classifier; None for any other model."""
    head = getattr(model, HEAD, None)
    return head if isinstance(head, nn.Linear) else None


def make_trainable(model: nn.Module) -> None:
    """The head is trained wherever adapters are."""
    head = head_of(model)
    if head is not None:
        head.requires_grad_(True)


def head_state(model: nn.Module) -> dict[str, Tensor]:
    """The head under PEFT's name, sharing memory with the parameter; nothing for a model without."""
    head = head_of(model)
    return {} if head is None else {KEY: head.weight.detach()}


def task_fields(model: nn.Module, whole: Iterable[str] = ()) -> dict[str, Any]:
    """What adapter_config.json says of the task; `whole` are the other modules that are trained whole."""
    fields: dict[str, Any] = {"task_type": _TASK_TYPES.get(str(getattr(model, "task", "")), "CAUSAL_LM")}
    return fields if head_of(model) is None else fields | {"modules_to_save": sorted({*whole, *_PEFT_HEADS})}


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json is of a classifier."""
    return str(config.get("task_type")).upper() == "SEQ_CLS"


def without_head(model: nn.Module, names: Iterable[str]) -> list[str]:
    """`modules_to_save` without a classifier's head, which is trained in any case."""
    return [name for name in names if head_of(model) is None or name not in _PEFT_HEADS]


def other_modules(config: Mapping[str, Any]) -> Any:
    """The modules_to_save of a config, without the head that a classifier's always has; a damaged value as it is."""
    names = config.get("modules_to_save") or []
    if not is_classifier(config) or not isinstance(names, list):
        return names
    return [name for name in names if not (isinstance(name, str) and name in _PEFT_HEADS)]


def take_head(tensors: dict[str, Tensor], config: Mapping[str, Any], folder: Path) -> Tensor | None:
    """Remove the head from an adapter's tensors; None for an adapter that has none. UsageError for a damaged one."""
    head = tensors.pop(KEY, None)
    if head is None:
        if is_classifier(config):
            raise UsageError(f"{folder}: a classifier's adapter without {KEY}: halfbyte reads that head only")
        return None
    if not is_classifier(config):
        raise UsageError(f"{folder}: holds {KEY}, and its task_type is {config.get('task_type')!r}, not SEQ_CLS")
    if head.ndim != 2:
        raise UsageError(f"{folder}: {KEY} is no matrix: the file is damaged")
    return head


def require_fit(model: nn.Module, value: Tensor | None, folder: Path) -> None:
    """UsageError where only one of the model and an adapter has a head, or they are of different shapes."""
    head = head_of(model)
    if (head is None) != (value is None):
        has, lacks = ("the model", "the adapter") if value is None else ("the adapter", "the model")
        raise UsageError(f"{folder}: {has} has a classifier's head and {lacks} has none: they are of different tasks")
    if head is not None and value is not None and head.weight.shape != value.shape:
        raise UsageError(
            f"{folder}: its head is {list(value.shape)} and the model's {list(head.weight.shape)}: trained on another "
            "base, or with other labels"
        )


def put_head(model: nn.Module, value: Tensor | None) -> None:
    """Copy an adapter's head, which `require_fit`, into the model's; it is trained, as adapters are."""
    head = head_of(model)
    if head is not None and value is not None:
        head.weight.data.copy_(value)
    make_trainable(model)


# -- the classes' names -----------------------------------------------------------------------------------------------


def label_fields(labels: tuple[str, ...]) -> dict[str, Any]:
    """`id2label` and `label2id` as transformers writes them."""
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


def write_labels(model: nn.Module, folder: Path) -> None:
    """Keep a classifier's labels beside its adapter; nothing for any other model."""
    labels = getattr(model, "labels", None)
    if head_of(model) is not None and labels is not None:
        text = json.dumps(label_fields(tuple(labels)), indent=2, ensure_ascii=False)
        write_atomic(folder / LABELS, text + "\n")


def read_labels(folder: Path) -> tuple[str, ...] | None:
    """The labels beside an adapter, in the head's order; None where there are none. UsageError for a damaged file."""
    path = folder / LABELS
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_bytes())["id2label"]
        labels = tuple(names[str(index)] for index in range(len(names)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path} is damaged: it should have id2label, a name for each number from 0 on") from None
    if not labels or not all(isinstance(label, str) for label in labels) or len(set(labels)) < len(labels):
        raise UsageError(f"{path} is damaged: labels are different texts, and at least one")
    return labels
