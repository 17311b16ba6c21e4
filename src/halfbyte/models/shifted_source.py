"""A model freed of low-rank parts of its linears: what PiSSA and LoftQ train on, made from its source when asked for.

`ShiftedSource` reads like the model's own files, with something subtracted from some matrices before anybody quantizes
them. `LinearBase` gives one linear of a loaded model: its weight before quantization, and what the model would hold of
it with a shift. Linear by linear, so that nothing of the model's size is held twice.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.linear import segments
from halfbyte.models.load import LoadedModel, read_weight
from halfbyte.models.model_source import ModelSource, Stored, TensorInfo
from halfbyte.quant import DenseWeight, QuantOptions, Weight

Rows = Callable[[int, int], Tensor]
"""(start, stop) -> what is subtracted from these rows, float32."""
_PIECE = 1 << 22  # elements in flight


class ShiftedSource(ModelSource):
    """`source`, with `shifts` subtracted from the tensors of these names and the result rounded to their type.

    Blocks that the file has quantized itself cannot be shifted: such a tensor is read decoded.
    """

    def __init__(self, source: ModelSource, shifts: Mapping[str, Rows]) -> None:
        super().__init__(source.name, source.kind, source.path, source.config, source.revision)
        self._source, self._shifts = source, shifts

    def tensors(self) -> dict[str, TensorInfo]:
        return self._source.tensors()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self._source.read_rows(name, start, stop)
        shift = self._shifts.get(name)
        if shift is None:
            return rows
        step = max(1, _PIECE // max(1, rows.shape[1]))
        for at in range(0, rows.shape[0], step):
            piece = rows[at : at + step]
            part = shift(start + at, start + at + piece.shape[0])
            rows[at : at + step] = (piece.float() - part.to(piece.device)).to(rows.dtype)
        return rows

    def stored(self) -> Iterator[Stored]:
        return self._source.stored()

    @property
    def fingerprint(self) -> str:  # cached where it was computed
        return self._source.fingerprint

    @property
    def generation(self) -> dict[str, Any]:
        return self._source.generation

    def prequantized(self, name: str) -> Weight | None:
        return None if name in self._shifts else self._source.prequantized(name)

    def prequantized_bytes(self) -> dict[str, int]:
        return {name: size for name, size in self._source.prequantized_bytes().items() if name not in self._shifts}

    @property
    def blocks(self) -> str | None:
        return self._source.blocks

    def reads_rows(self, name: str) -> bool:
        return self._source.reads_rows(name)

    def tokenizer(self) -> Any:
        return self._source.tokenizer()


def own_blocks(name: str) -> str:
    """Why initial values that need the weights before quantization cannot be had."""
    return (
        f"{name} is a quantized file whose own blocks are trained on, and pissa and loftq make the base anew: add "
        "--requantize, take method lora (16 bits), or give the unquantized model"
    )


class LinearBase:
    """The frozen linears of `loaded` by name, as its source has them and as the model holds them.

    quant   what the model was loaded with
    """

    def __init__(self, loaded: LoadedModel, quant: QuantOptions | None) -> None:
        self._source, self._quant = loaded.source, quant
        self._segments = segments(loaded.model)
        self._transposed: frozenset[str] = getattr(loaded.model, "transposed", frozenset())
        self._dtype: torch.dtype = loaded.model.dtype  # type: ignore[assignment]
        self._kept = frozenset(loaded.source.prequantized_bytes()) if quant and not quant.requantize else frozenset()

    def is_quantized(self, name: str) -> bool:
        """Whether the model holds the linear in a quantized format."""
        return not isinstance(self._segments[name].weight, DenseWeight)

    def source(self, name: str) -> Tensor:
        """The weight before quantization, float32 [out, in]. UsageError where the file has none to give."""
        return self._source.read(self._tensor(name)).float()

    def held(self, name: str, shift: Rows | None) -> Weight:
        """The weight freed of `shift`, in the format and the place of the one that the model holds."""
        tensor, now = self._tensor(name), self._segments[name].weight
        source = self._source if shift is None else ShiftedSource(self._source, {tensor: shift})
        device = next((t.device for t in (*now.parameters(), *now.buffers())), torch.device("cpu"))
        if isinstance(now, DenseWeight):
            return DenseWeight(source.read(tensor).to(device, now.tensor.dtype))
        return read_weight(source, tensor, self._quant, self._dtype, device)

    def _tensor(self, name: str) -> str:
        tensor = f"{name}.weight"
        if tensor in self._kept and self.is_quantized(name):
            raise UsageError(own_blocks(self._source.name))
        info = self._source.tensors().get(tensor)
        if info is None or info.shape != self._segments[name].weight.shape or name in self._transposed:
            raise UsageError(
                f"{self._source.name} keeps {name} under another name or turned around, and pissa and loftq read the "
                "file's own matrices: use another init_lora_weights with this architecture"
            )
        return tensor
