"""Where AdamW keeps a moment: float32, or one byte an element.

The optimizer's arithmetic is float32 always; a store turns its elements into float32 for the step (`load`) and takes
them back (`store`). What a moment costs in memory is decided here and nowhere else.

The one-byte store is the block-wise dynamic format of 8-bit Optimizers (Dettmers et al. 2022, arXiv 2110.02861) with
bitsandbytes' code maps and its block of 256: signed for the first moment, unsigned for the second. One element is
absmax of its block times a code of the map; the code is the nearest one to x / absmax rounded to bfloat16, so that a
table of 65,536 entries finds it.
"""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

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
        self.map, self.table = _dynamic_map(signed, like.device), _nearest_code(signed, like.device)
        zero = int((_dynamic_map(signed, torch.device("cpu")) == 0).nonzero()[0])
        self.codes = torch.full((n,), zero, dtype=torch.uint8, device=like.device)
        self.absmax = torch.zeros(-(-n // BLOCKSIZE), dtype=torch.float32, device=like.device)

    def load(self, start: int, stop: int) -> Tensor:
        values = self.map[self.codes[start:stop].int()]
        _by_block(values, self.absmax[start // BLOCKSIZE : -(-stop // BLOCKSIZE)], divide=False)
        return values

    def store(self, start: int, stop: int, values: Tensor) -> None:
        blocks = torch.nn.functional.pad(values, (0, -values.numel() % BLOCKSIZE)).view(-1, BLOCKSIZE)
        absmax = blocks.abs().amax(dim=1)
        self.absmax[start // BLOCKSIZE : -(-stop // BLOCKSIZE)] = absmax
        scaled = (blocks / absmax.clamp_min(1e-38)[:, None]).view(-1)[: stop - start]
        bits = scaled.bfloat16().view(torch.int16).int() & 0xFFFF
        self.codes[start:stop] = self.table[bits]

    def tensors(self) -> dict[str, Tensor]:
        return {".codes": self.codes, ".absmax": self.absmax}


def _by_block(values: Tensor, factors: Tensor, divide: bool) -> None:
    """Multiply (or divide) each block of 256 in place by its factor; the last block may be short."""
    whole = values.numel() // BLOCKSIZE
    parts = [(values[: whole * BLOCKSIZE].view(-1, BLOCKSIZE), factors[:whole, None])]
    if values.numel() % BLOCKSIZE:
        parts.append((values[whole * BLOCKSIZE :], factors[whole]))
    for part, factor in parts:
        part.div_(factor) if divide else part.mul_(factor)


@cache
def _dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """256 codes in [-1, 1] or [0, 1], ascending: for each decade 10^(i - 6), the midpoints of an even grid on [.1, 1]
    with 2^i cells (unsigned: 2^(i + 1)), and 0 and 1."""
    codes = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1.0, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        decade = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        codes += decade + [-code for code in decade if signed]
    return torch.tensor(sorted(codes), dtype=torch.float32, device=device)


@cache
def _nearest_code(signed: bool, device: torch.device) -> Tensor:
    """uint8 [65536]: for each bfloat16, by its bits, the index of the nearest code (non-finite values: 0)."""
    codes = _dynamic_map(signed, torch.device("cpu"))
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float().nan_to_num()
    midpoints = (codes[1:].double() + codes[:-1].double()) / 2
    return torch.bucketize(values.double(), midpoints).to(torch.uint8).to(device)
