"""A model in a GGUF file, in Hugging Face's names and layout: in the file's own blocks, or dequantized by row chunks.

What llama.cpp's converter did to the weights is undone here: Llama's q and k rows go back to
transformers' order, and Gemma's norms lose the 1 that was added.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.models.gguf_config import NOT_WEIGHTS, PERMUTED, PLUS_ONE, config_from_gguf, hugging_face_name
from halfbyte.models.gguf_file import GgufFile, GgufTensor
from halfbyte.models.model_source import ModelSource, Stored, TensorInfo
from halfbyte.models.pread import OpenFile
from halfbyte.quant import DenseWeight, GgufWeight, Weight
from halfbyte.quant.gguf_decode import dequantize_into
from halfbyte.quant.gguf_weight import is_trainable_on

_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}
_CHUNK_WEIGHTS = 1 << 23  # raw bytes in flight stay under 10 MB


class GgufSource(ModelSource):
    """See `ModelSource`. `file` is the parsed container, for the tokenizer and for export."""

    def __init__(self, name: str, path: Path) -> None:
        self.file = GgufFile(path)
        self._open = OpenFile(path)
        extra = {n: self._plain(t) for n in NOT_WEIGHTS if (t := self.file.tensors.get(n)) is not None}
        super().__init__(name, "gguf", path, config_from_gguf(self.file, extra))
        self.architecture: str = self.file.need("general.architecture")
        self._stored = self._by_name()
        self._quantized = any(t.quantized for t in self._stored.values() if len(t.shape) == 2)

    def _by_name(self) -> dict[str, GgufTensor]:
        out: dict[str, GgufTensor] = {}
        for tensor in self.file.tensors.values():
            if tensor.name in NOT_WEIGHTS:
                continue
            name = hugging_face_name(self.architecture, tensor.name)
            if name is None:
                raise UsageError(
                    f"{self.path}: tensor {tensor.name} is not part of a {self.architecture} model as halfbyte knows "
                    "it: use the model's Hugging Face folder"
                )
            if not tensor.quantized and tensor.type_name not in _PLAIN:
                raise UsageError(f"{self.path}: tensor {tensor.name} holds {tensor.type_name}, not weights")
            if tensor.quantized and len(tensor.shape) != 2:
                raise UsageError(
                    f"{self.path}: tensor {tensor.name} is in {tensor.type_name}, and is no matrix: damaged"
                )
            out[name] = tensor
        return out

    def tensors(self) -> dict[str, TensorInfo]:
        return {
            name: TensorInfo(t.shape, torch.bfloat16 if t.quantized else _PLAIN[t.type_name])
            for name, t in self._stored.items()
        }

    def stored(self) -> Iterator[Stored]:
        for name, t in self._stored.items():
            yield Stored(name, t.type_name, t.shape, self.path, t.offset, t.nbytes)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        info = self.info(name)
        tensor = self._stored[name]
        heads = self._permuted_heads(name)
        if heads:
            return self._read_permuted(tensor, info, start, stop, heads)
        out = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
        self._fill(tensor, start, out)
        if self.architecture in PLUS_ONE and name.endswith("norm.weight"):
            out = (out.float() - 1).to(info.dtype)
        return out

    def type_of(self, name: str) -> str:
        """ggml's name of the type that the file has a tensor in; its bytes are `read_blocks`'."""
        return self._stored[name].type_name

    def read_blocks(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of the file, in the file's order, as they are: uint8 [rows, bytes of a row]."""
        tensor = self._stored[name]
        row_bytes = tensor.nbytes // tensor.shape[0]
        raw = torch.empty(stop - start, row_bytes, dtype=torch.uint8)
        self._open.read_into(raw, tensor.offset + start * row_bytes)
        return raw

    def prequantized(self, name: str) -> Weight | None:
        """The matrix as the file has it: its blocks, or its 16-bit values beside quantized ones.

        None for every tensor of a file that holds no blocks: that is an ordinary 16-bit model. Types that cannot be
        multiplied in place are decoded once, to the same values.
        """
        tensor = self._stored[name]
        if not self._quantized or len(tensor.shape) != 2 or tensor.type_name == "F64":
            return None
        if not self._in_place(tensor):
            return DenseWeight(self.read(name))
        data = torch.empty(tensor.nbytes, dtype=torch.uint8)
        self._open.read_into(data, tensor.offset)
        heads = self._permuted_heads(name)
        shape = (tensor.shape[0], tensor.shape[1])
        return GgufWeight(data, tensor.type_name, shape, tensor.shape[0] // heads if heads else 0)

    def prequantized_bytes(self) -> dict[str, int]:
        if not self._quantized:
            return {}
        return {
            name: t.nbytes if self._in_place(t) else self.info(name).nbytes
            for name, t in self._stored.items()
            if len(t.shape) == 2 and t.type_name != "F64"
        }

    @property
    def blocks(self) -> str | None:
        return "gguf" if self._quantized else None

    @staticmethod
    def _in_place(tensor: GgufTensor) -> bool:
        return is_trainable_on(tensor.type_name, tensor.shape[-1])

    def _permuted_heads(self, name: str) -> int:
        """How many heads' rows llama.cpp reordered in this tensor; 0: none."""
        key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads" if ".k_proj." in name else None
        if self.architecture not in PERMUTED or key is None:
            return 0
        heads, rows = int(self.config[key]), self._stored[name].shape[0]
        if rows % (2 * heads):
            raise UsageError(f"{self.path}: {name} has {rows} rows, which are not {heads} heads: the file is damaged")
        return heads

    def _read_permuted(self, tensor: GgufTensor, info: TensorInfo, start: int, stop: int, heads: int) -> Tensor:
        """Whole heads are read and reordered: llama.cpp rotates rows 2p and 2p + 1, transformers p and p + d / 2."""
        size = info.shape[0] // heads
        first, last = start // size, -(-stop // size)
        stored = torch.empty(((last - first) * size, *info.shape[1:]), dtype=info.dtype)
        self._fill(tensor, first * size, stored)
        halves = stored.view(last - first, size // 2, 2, *info.shape[1:]).transpose(1, 2).reshape(stored.shape)
        if (start, stop) == (first * size, last * size):
            return halves
        return halves[start - first * size : stop - first * size].clone()

    def _fill(self, tensor: GgufTensor, start: int, out: Tensor) -> None:
        """Rows of the file from `start` on, as many as `out` has, dequantized into it."""
        row_bytes = tensor.nbytes // tensor.shape[0]
        if not tensor.quantized:
            self._open.read_into(out, tensor.offset + start * row_bytes)
            return
        kind = gguf.GGMLQuantizationType[tensor.type_name]
        block_bytes = gguf.GGML_QUANT_SIZES[kind][1]
        step = max(1, _CHUNK_WEIGHTS // max(tensor.shape[-1], 1))
        for row in range(0, out.shape[0], step):
            rows = min(step, out.shape[0] - row)
            raw = torch.empty(rows * row_bytes, dtype=torch.uint8)
            self._open.read_into(raw, tensor.offset + (start + row) * row_bytes)
            dequantize_into(raw.view(-1, block_bytes), tensor.type_name, out[row : row + rows])

    def _plain(self, tensor: GgufTensor) -> Tensor:
        if tensor.type_name not in _PLAIN:
            raise UsageError(f"{self.file.path}: tensor {tensor.name} should hold floats, not {tensor.type_name}")
        out = torch.empty(tensor.shape, dtype=_PLAIN[tensor.type_name])
        self._open.read_into(out, tensor.offset)
        return out.float()

    @property
    def generation(self) -> dict[str, Any]:
        eos = self.file.get("tokenizer.ggml.eos_token_id")
        return {} if eos is None else {"eos_token_id": eos}
