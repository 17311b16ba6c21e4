"""What AdamW keeps of some elements of a parameter: two moments, and the bits below a bfloat16 weight.

The optimizer's arithmetic is float32 always; a moment turns its elements into float32 for the step (`load`) and takes
them back (`store`). What a moment costs is decided here and nowhere else; where its bytes lie (in memory, in pages of a
file, in a driver's pages) is the business of `held` and `paged`, which hand out the tensors.

The one-byte moment is the block-wise dynamic format of 8-bit Optimizers (Dettmers et al. 2022, arXiv 2110.02861) with
bitsandbytes' code maps and its block of 256: signed for the first moment, unsigned for the second. One element is
absmax of its block times the nearest code of the map (`ops.quantize_dynamic`).
"""

from collections.abc import Mapping
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from halfbyte import ops

BLOCKSIZE = 256
SMALLEST_QUANTIZED = 4096
"""Tensors with fewer elements keep float32 moments: they cost nothing and include the sensitive norms."""

FIRST, SECOND, LOW_BITS = ".exp_avg", ".exp_avg_sq", ".low_bits"
CODES, ABSMAX = ".codes", ".absmax"

Layout = dict[str, tuple[torch.dtype, int]]
"""A state's tensors by the end of their key: type and number of elements."""


class Moment(Protocol):
    """One moment of n elements, seen as a flat float32 vector."""

    def load(self) -> Tensor:
        """The elements in float32; a view or a copy, the caller may write into it and then calls `store`."""
        ...

    def store(self, values: Tensor) -> None:
        """Take back what `load` gave."""
        ...

    def part(self, start: int, stop: int) -> "Moment":
        """Elements start..stop, without a copy; `start` is a multiple of BLOCKSIZE."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The storage itself, by the end of its key; writing into these tensors restores it."""
        ...

    def reset(self) -> None:
        """Zero, as before the first step."""
        ...


class Float32Moment:
    """A moment as it is."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def load(self) -> Tensor:
        return self.values

    def store(self, values: Tensor) -> None:
        """`load` gave the storage: the values are already here."""

    def part(self, start: int, stop: int) -> "Float32Moment":
        return Float32Moment(self.values[start:stop])

    def tensors(self) -> dict[str, Tensor]:
        return {"": self.values}

    def reset(self) -> None:
        self.values.zero_()


class ByteMoment:
    """A moment in one byte an element and a float32 absmax for each block of 256."""

    def __init__(self, codes: Tensor, absmax: Tensor, signed: bool) -> None:
        self.codes, self.absmax, self.signed = codes, absmax, signed

    def load(self) -> Tensor:
        return ops.dequantize_dynamic(self.codes, self.absmax, BLOCKSIZE, self.signed)

    def store(self, values: Tensor) -> None:
        codes, absmax = ops.quantize_dynamic(values, BLOCKSIZE, self.signed)
        self.codes.copy_(codes)
        self.absmax.copy_(absmax)

    def part(self, start: int, stop: int) -> "ByteMoment":
        blocks = slice(start // BLOCKSIZE, -(-stop // BLOCKSIZE))
        return ByteMoment(self.codes[start:stop], self.absmax[blocks], self.signed)

    def tensors(self) -> dict[str, Tensor]:
        return {CODES: self.codes, ABSMAX: self.absmax}

    def reset(self) -> None:
        self.codes.fill_(_code_of_zero(self.signed))
        self.absmax.zero_()


@cache
def _code_of_zero(signed: bool) -> int:
    return int((ops.levels.dynamic_map(signed) == 0).nonzero()[0])


def layout(count: int, in_bytes: bool, low_bits: bool) -> Layout:
    """The tensors that `State.over` wants for `count` elements."""
    found: Layout = {}
    for moment in (FIRST, SECOND):
        if in_bytes:
            found[moment + CODES] = torch.uint8, count
            found[moment + ABSMAX] = torch.float32, -(-count // BLOCKSIZE)
        else:
            found[moment] = torch.float32, count
    if low_bits:
        found[LOW_BITS] = torch.int16, count
    return found


class State:
    """Both moments of some elements, and for bfloat16 weights the 16 bits that a float32 has below them (int16 [n])."""

    def __init__(self, exp_avg: Moment, exp_avg_sq: Moment, low_bits: Tensor | None) -> None:
        self.exp_avg, self.exp_avg_sq, self.low_bits = exp_avg, exp_avg_sq, low_bits

    @classmethod
    def over(cls, tensors: Mapping[str, Tensor]) -> "State":
        """The state whose storage these tensors are; see `layout`."""

        def moment(name: str, signed: bool) -> Moment:
            if name + CODES in tensors:
                return ByteMoment(tensors[name + CODES], tensors[name + ABSMAX], signed)
            return Float32Moment(tensors[name])

        return cls(moment(FIRST, True), moment(SECOND, False), tensors.get(LOW_BITS))

    def part(self, start: int, stop: int) -> "State":
        low_bits = None if self.low_bits is None else self.low_bits[start:stop]
        return State(self.exp_avg.part(start, stop), self.exp_avg_sq.part(start, stop), low_bits)

    def tensors(self) -> dict[str, Tensor]:
        """The storage, by the end of each tensor's key."""
        found = {FIRST + end: tensor for end, tensor in self.exp_avg.tensors().items()}
        found |= {SECOND + end: tensor for end, tensor in self.exp_avg_sq.tensors().items()}
        return found if self.low_bits is None else found | {LOW_BITS: self.low_bits}

    def reset(self) -> None:
        self.exp_avg.reset()
        self.exp_avg_sq.reset()
        if self.low_bits is not None:
            self.low_bits.zero_()

    def load_weight(self, weight: Tensor) -> Tensor:
        """The float32 weights: `weight` itself, or bfloat16 joined with the bits below it."""
        return weight if self.low_bits is None else join_bits(weight, self.low_bits)

    def store_weight(self, weight: Tensor, updated: Tensor) -> None:
        """Write float32 `updated` into `weight` (and below it); nothing where `load_weight` gave `weight` itself."""
        if self.low_bits is not None:
            high, low = split_bits(updated)
            weight.copy_(high)
            self.low_bits.copy_(low)


def split_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 as (bfloat16 rounded to nearest, ties away from zero; int16 difference of the bit patterns), exactly."""
    bits = weight.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join_bits(high: Tensor, low: Tensor) -> Tensor:
    """The inverse of `split_bits`."""
    return ((high.view(torch.int16).to(torch.int32) << 16) + low.to(torch.int32)).view(torch.float32)
