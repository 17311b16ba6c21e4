"""A classifier's trained head on its way into a merged model: a tensor of its own, and names for its classes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.adapters.heads import LABELS, is_classifier, read_labels
from halfbyte.adapters.peft_io import read_adapter, read_adapter_config
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.deltas import WeightedAdapter
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


def read_head(adapters: Sequence[WeightedAdapter], source: ModelSource) -> Head | None:
    """The head of a classifier's adapter; None for language models. UsageError for several: heads do not add up."""
    classifiers = [one for one in adapters if is_classifier(read_adapter_config(one.folder))]
    if not classifiers:
        return None
    folder = classifiers[0].folder
    if len(adapters) > 1 or classifiers[0].weight != 1:
        raise UsageError(f"{folder} is a classifier's adapter: it is merged alone and whole, for heads do not add up")
    weight = read_adapter(folder).head
    assert weight is not None
    labels = read_labels(folder) or head_of_file(source) or tuple(f"LABEL_{i}" for i in range(weight.shape[0]))
    if len(labels) != weight.shape[0]:
        raise UsageError(f"{folder}: its head has {weight.shape[0]} classes and {LABELS} {len(labels)}: damaged")
    return Head(labels, weight.float())
