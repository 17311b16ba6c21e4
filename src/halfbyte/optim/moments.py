"""Where AdamW keeps a moment: float32, or one byte an element.

The optimizer's arithmetic is float32 always; a store turns its elements into float32 for the step (`load`) and takes
them back (`store`). What a moment costs in memory is decided here and nowhere else.

The one-byte store is the block-wise dynamic format of 8-bit Optimizers (Dettmers et al. 2022, arXiv 2110.02861) with
bitsandbytes' code maps and its block of 256: signed for the first moment, unsigned for the second. One element is
absmax of its block times the nearest code of the map (`ops.quantize_dynamic`).
"""

from typing import Protocol

import torch
from torch import Tensor

from halfbyte import ops

BLOCKSIZE = 256
SMALLEST_QUANTIZED = 4096
"""Tensors with fewer elements keep float32 moments: they cost nothing and include the sensitive norms."""


class MomentStore(Protocol):
    """One moment of one parameter, seen as a flat float32 vector."""

    def load(self, start: int, stop: int) -> Tensor:
        """Elements start..stop in float32; a view or a copy, the caller may write into it and then calls `store`."""
        ...

    def store(self, start: int, stop: int, values: Tensor) -> None:
        """Take back what `load` gave."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The storage itself, by suffix; writing into these tensors restores it."""
        ...


class Float32Moment:
    """A moment as it is."""

    def __init__(self, like: Tensor) -> None:
        self.values = torch.zeros(like.numel(), dtype=torch.float32, device=like.device)

    def load(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def store(self, start: int, stop: int, values: Tensor) -> None:
        """`load` gave a view: the values are already here."""

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.values}


class ByteMoment:
    """A moment in one byte an element and a float32 absmax for each block of 256. Spans must start at a block."""

    def __init__(self, like: Tensor, signed: bool) -> None:
        n = like.numel()
        self.signed = signed
        zero = int((ops.levels.dynamic_map(signed) == 0).nonzero()[0])
        self.codes = torch.full((n,), zero, dtype=torch.uint8, device=like.device)
        self.absmax = torch.zeros(-(-n // BLOCKSIZE), dtype=torch.float32, device=like.device)

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Codes and constants of elements start..stop, as they are."""
        return self.codes[start:stop], self.absmax[start // BLOCKSIZE : -(-stop // BLOCKSIZE)]

    def load(self, start: int, stop: int) -> Tensor:
        return ops.dequantize_dynamic(*self.part(start, stop), BLOCKSIZE, self.signed)

    def store(self, start: int, stop: int, values: Tensor) -> None:
        codes, absmax = ops.quantize_dynamic(values, BLOCKSIZE, self.signed)
        self.codes[start:stop] = codes
        self.absmax[start // BLOCKSIZE : -(-stop // BLOCKSIZE)] = absmax

    def tensors(self) -> dict[str, Tensor]:
        return {".codes": self.codes, ".absmax": self.absmax}
