"""A planned model read like one on disk, so that it can be loaded and measured before anything is written.

What `models.load` makes of it is what it would make of the written folder: the same tensors, rounded to the same type,
under the same config; with `quant`, what a server makes of that folder that loads it in 4 bits.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.export.model_files import merged_config
from halfbyte.export.safetensors_file import Planned
from halfbyte.models.model_source import ModelSource, Stored, TensorInfo


class PlannedSource(ModelSource):
    """`planned` as a source; the tokenizer and the generation defaults are those of `source`, its base."""

    def __init__(self, planned: Sequence[Planned], source: ModelSource) -> None:
        self._planned = {tensor.name: tensor for tensor in planned}
        self._base = source
        dtype = str(planned[0].dtype).removeprefix("torch.")
        super().__init__(source.name, "folder", source.path, merged_config(source.config, dtype))

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in self._planned.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        planned = self._planned[name]
        return self.read(name)[start:stop].clone() if planned.read is None else planned.read(start, stop)

    def read(self, name: str) -> Tensor:
        info = self.info(name)
        if not info.shape:
            return next(self._planned[name].rows()).reshape(())
        out = torch.empty(info.shape, dtype=info.dtype)
        at = 0
        for piece in self._planned[name].rows():
            out[at : at + piece.shape[0]] = piece
            at += piece.shape[0]
        return out

    def stored(self) -> Iterator[Stored]:
        return iter(())  # nothing lies anywhere yet

    @property
    def generation(self) -> dict[str, Any]:
        return self._base.generation

    def tokenizer(self) -> Any:
        return self._base.tokenizer()
