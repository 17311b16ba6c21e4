"""Writing the folder of a model whose linears are in integer codes: GPTQ's and AWQ's common part.

The sizes of all tensors are known before the first is computed, so the safetensors files are written in one pass
while the quantization goes from layer to layer: what is held is a layer's tensors.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.folder import new_folder
from halfbyte.export.model_files import write_model_files
from halfbyte.export.safetensors_file import INDEX, Planned, plan_shards, shard_index, write_file
from halfbyte.files import require_free_space
from halfbyte.models.safetensors_source import read_json_object
from halfbyte.models.source import ModelSource
from halfbyte.models.spec import ModelSpec

GROUP_SIZES = (128, 64, 32)
"""Group sizes that GPTQModel's, vLLM's and ExLlama's kernels all know, the usual one first."""
SHARD_BYTES = 5_000_000_000
_SMALL_FILES = 64_000_000  # tokenizer, config and index, for the check of the disk

OnProgress = Callable[[int, int], None]
"""Hears (linears quantized, linears in all)."""
Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Int4Report:
    """What was written.

    method       "gptq" or "awq"
    linears      how many were quantized; embedding, head, norms and biases keep their type
    tokens       calibration tokens
    notes        what the user should know, each a sentence
    """

    path: Path
    method: str
    bits: int
    group_size: int
    nbytes: int
    tensors: int
    linears: int
    tokens: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "path": str(self.path),
            "method": self.method,
            "bits": self.bits,
            "group_size": self.group_size,
            "bytes": self.nbytes,
            "tensors": self.tensors,
            "quantized_linears": self.linears,
            "calibration_tokens": self.tokens,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def decoder_spec(source: ModelSource, method: str) -> ModelSpec:
    """The spec of a model that can be calibrated layer by layer; UsageError for an architecture that cannot."""
    if not ModelSpec.serves(source.config):
        raise UsageError(
            f"{source.name}: {method} calibrates layer by layer, which halfbyte does for the families that its own "
            f"decoder runs, and model_type {source.config.get('model_type')!r} is not one; export hf or bnb-4bit"
        )
    return ModelSpec.from_config(source.config)


def choose_group_size(spec: ModelSpec, asked: int | None, word: int) -> int:
    """The group size for all linears: `asked`, or the largest usual one that divides every linear's inputs.

    word  codes in an int32, which must divide inputs and outputs

    UsageError where a linear's shape cannot be stored.
    """
    for linear in spec.linears():
        if linear.in_features % word or linear.out_features % word:
            raise UsageError(
                f"{linear.name} is {linear.out_features} x {linear.in_features}: both must be multiples of {word} to "
                "be packed into int32 words; export to gguf instead"
            )
    legal = [size for size in GROUP_SIZES if all(linear.in_features % size == 0 for linear in spec.linears())]
    if asked is not None and asked in legal:
        return asked
    widths = sorted({linear.in_features for linear in spec.linears()})
    named = f"this model's linears have {', '.join(map(str, widths))} inputs"
    if not legal:
        raise UsageError(f"{named}, which groups of {GROUP_SIZES[-1]} do not divide; export to gguf instead")
    if asked is not None:
        raise UsageError(f"{named}, which groups of {asked} do not divide: use group_size {legal[0]}")
    return legal[0]


def write_int4_folder(
    folder: Path,
    source: ModelSource,
    planned: Sequence[Planned],
    adapter: Path | None,
    shapes: Mapping[str, Shapes],
    changed: frozenset[str],
    made: Iterator[tuple[str, Tensor]],
    quantization_config: Mapping[str, Any],
) -> tuple[int, int]:
    """Write everything below `folder`, which is whole or not there; returns (bytes of tensors, how many).

    shapes   linear -> suffix -> (shape, dtype) of the tensors that take the place of its .weight
    changed  names of planned tensors that `made` brings too, in the same shape and type (AWQ's norms)
    made     (name, tensor) of all of those, in about the order of the planned tensors
    adapter  the adapter's folder, whose tokenizer files replace the source's
    """
    supply = _Supply(made)

    def quantized(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Planned:
        return Planned(name, shape, dtype, lambda: supply.take(name, shape, dtype))

    tensors: list[Planned] = []
    for tensor in planned:
        linear = tensor.name.removesuffix(".weight")
        if linear in shapes and linear != tensor.name:
            tensors += [quantized(f"{linear}.{key}", *form) for key, form in shapes[linear].items()]
        elif tensor.name in changed:
            tensors.append(quantized(tensor.name, tensor.shape, tensor.dtype))
        else:
            tensors.append(tensor)
    total = sum(tensor.nbytes for tensor in tensors)
    require_free_space(folder.parent, total + _SMALL_FILES, f"the quantized model ({folder})")
    with new_folder(folder) as partial:
        shards = plan_shards(tensors, SHARD_BYTES)
        for file, content in shards.items():
            write_file(partial / file, content)
        if len(shards) > 1:
            (partial / INDEX).write_text(shard_index(shards))
        dtype = next(tensor.dtype for tensor in planned)
        write_model_files(partial, source, adapter or source.path, str(dtype).removeprefix("torch."))
        config = read_json_object(partial / "config.json")
        config["quantization_config"] = dict(quantization_config)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (partial / "config.json").write_text(text)
    return total, len(tensors)


class _Supply:
    """Tensors by name out of an iterator, which runs as far as the next one that is asked for."""

    def __init__(self, made: Iterator[tuple[str, Tensor]]) -> None:
        self._made, self._ready = made, dict[str, Tensor]()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
        while name not in self._ready:
            key, tensor = next(self._made)
            self._ready[key] = tensor
        tensor = self._ready.pop(name)
        assert tensor.shape == shape, f"{name} is {list(tensor.shape)}, {list(shape)} was planned"
        assert tensor.dtype == dtype, f"{name} is {tensor.dtype}, {dtype} was planned"
        if dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            raise HalfbyteError(f"{name} is not finite in {dtype}: the weights are too large to quantize")
        yield tensor


def seconds_since(started: float) -> float:
    return round(time.monotonic() - started, 1)
