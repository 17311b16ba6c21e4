"""A classifier's trained head on its way into a merged model: a tensor of its own, and names for its classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.adapters.heads import LABELS, is_classifier, read_labels, take_head
from halfbyte.adapters.peft_io import read_adapter_config, read_adapter_tensors
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.safetensors_file import Planned
from halfbyte.models.classifier import SCORE, HeadOptions, head_of_file
from halfbyte.models.source import ModelSource


@dataclass(frozen=True)
class Head:
    """The classes in order, and the head's weight, float32 [classes, width]."""

    labels: tuple[str, ...]
    weight: Tensor

    @property
    def options(self) -> HeadOptions:
        """How a model that is to get this head is loaded."""
        return HeadOptions(self.labels)

    def planned(self, dtype: torch.dtype) -> Planned:
        """The tensor as a merged model holds it."""

        def rows() -> Iterator[Tensor]:
            if not bool(self.weight.isfinite().all()):
                raise HalfbyteError(f"{SCORE} is not finite: the training has diverged")
            yield self.weight.to(dtype)

        return Planned(SCORE, tuple(self.weight.shape), dtype, rows)


def read_head(adapters: Sequence[Path], source: ModelSource) -> Head | None:
    """The head of a classifier's adapter; None for language models. UsageError for several: heads do not add up."""
    classifiers = [folder for folder in adapters if is_classifier(read_adapter_config(folder))]
    if not classifiers:
        return None
    if len(adapters) > 1:
        raise UsageError(f"{classifiers[0]} is a classifier's adapter: it is merged alone, for heads do not add up")
    folder = classifiers[0]
    weight = take_head(read_adapter_tensors(folder), read_adapter_config(folder), folder)
    assert weight is not None
    labels = read_labels(folder) or head_of_file(source) or tuple(f"LABEL_{i}" for i in range(weight.shape[0]))
    if len(labels) != weight.shape[0]:
        raise UsageError(f"{folder}: its head has {weight.shape[0]} classes and {LABELS} {len(labels)}: damaged")
    return Head(labels, weight.float())
