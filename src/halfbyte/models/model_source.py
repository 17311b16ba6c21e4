"""What every place that a model can come from looks like: names, shapes, and tensors on demand.

A source never holds weights. It knows where each tensor lies and reads it when asked, whole or by
rows, so that whoever builds the model decides what is in memory at once. Names are the ones of the
family's text model in transformers (`model.layers.0.self_attn.q_proj.weight`), whatever the file
calls them.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.quant import Weight

FULL_HASH_BYTES = 4 * 10**9
"""Below this many bytes of weights a fingerprint reads all of them, above it samples."""
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16
_HASH_CHUNK = 1 << 22


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as `read` returns it: its shape, and its dtype in the source (bfloat16 for block-quantized ones)."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """Where a tensor's bytes lie, for the fingerprint: `format` is the file's own name for the element type."""

    name: str
    format: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


class ModelSource(ABC):
    """A model on disk.

    name      what the user asked for (a path or a Hub id)
    kind      "folder", "hub" or "gguf"
    path      the folder or file that is read
    config    the model's config as transformers writes it to config.json
    revision  the Hub's commit hash, None for local files
    """

    def __init__(self, name: str, kind: str, path: Path, config: dict[str, Any], revision: str | None = None) -> None:
        self.name = name
        self.kind = kind
        self.path = path
        self.config = config
        self.revision = revision

    @abstractmethod
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name. Cheap: from headers only."""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive) of the first dimension, a new tensor."""

    @abstractmethod
    def stored(self) -> Iterator[Stored]:
        """The tensors as the files hold them, in any order."""

    @property
    def generation(self) -> dict[str, Any]:
        """The model's generation defaults (generation_config.json), {} where there are none."""
        return {}

    def info(self, name: str) -> TensorInfo:
        """One tensor's shape and dtype; a missing one is the user's error, since the file is incomplete."""
        try:
            return self.tensors()[name]
        except KeyError:
            raise UsageError(
                f"{self.path} has no tensor {name}, which a {self.config.get('model_type')} model needs: "
                "the checkpoint is incomplete or of another architecture; download it again"
            ) from None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors()

    def read(self, name: str) -> Tensor:
        """The whole tensor, in the source's dtype (bfloat16 where the file has quantized blocks)."""
        info = self.info(name)
        return self.read_rows(name, 0, info.shape[0]) if info.shape else self.read_rows(name, 0, 1).reshape(())

    def prequantized(self, name: str) -> Weight | None:
        """The weight as the file quantized it, where the file's blocks are ones that we train on; else None."""
        return None

    def prequantized_bytes(self) -> dict[str, int]:
        """The tensors that `prequantized` returns, and the bytes that each takes in memory. Reads headers only."""
        return {}

    @property
    def blocks(self) -> str | None:
        """Whose format `prequantized` returns: "gguf", "bitsandbytes", "gptq" or "awq"; None where nothing is."""
        return None

    def reads_rows(self, name: str) -> bool:
        """Whether `read_rows` costs no more than those rows: not where a whole tensor is decoded for them."""
        return True

    def tokenizer(self) -> Any:
        """The model's tokenizer, a transformers fast tokenizer, made once. See `halfbyte.models.tokenizer`."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        from halfbyte.models.tokenizer import load_tokenizer  # not needed by those who only read weights

        return load_tokenizer(self)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what the weights are: names, shapes, formats and bytes.

        Independent of path, sharding and the order in the file. Below 4 GB every byte is read and the
        prefix is `sha256:`; above, up to 16 windows of 64 KiB of each tensor, evenly spread, and the
        prefix is `sha256-sampled:`: enough to tell models apart, not to prove that no bit has flipped.
        """
        entries = sorted(self.stored(), key=lambda stored: stored.name)
        whole = sum(stored.nbytes for stored in entries) < FULL_HASH_BYTES
        digest = hashlib.sha256()
        for stored in entries:
            shape = ",".join(map(str, stored.shape))
            digest.update(f"{stored.name}\0{stored.format}\0{shape}\0{stored.nbytes}\0".encode())
            _hash_bytes(digest, stored, whole)
        return ("sha256:" if whole else "sha256-sampled:") + digest.hexdigest()


def _hash_bytes(digest: Any, stored: Stored, whole: bool) -> None:
    with stored.path.open("rb", buffering=0) as file:
        for offset, size in _windows(stored.nbytes, whole):
            file.seek(stored.offset + offset)
            while size:
                data = file.read(min(size, _HASH_CHUNK))
                if not data:
                    raise UsageError(f"{stored.path} ends inside tensor {stored.name}: copy or download it again")
                digest.update(data)
                size -= len(data)


def _windows(nbytes: int, whole: bool) -> Iterator[tuple[int, int]]:
    if whole or nbytes <= _SAMPLES * _SAMPLE_BYTES:
        yield 0, nbytes
        return
    for i in range(_SAMPLES):
        yield (nbytes - _SAMPLE_BYTES) * i // (_SAMPLES - 1), _SAMPLE_BYTES
