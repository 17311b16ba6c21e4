"""Integer codes with a scale and a zero point a group of inputs: what GPTQ's and AWQ's files hold, once unpacked.

    W[o, i] = scales[g, o] * (codes[i, o] - zeros[g, o])     with g = group_of[i]

Both formats lay the matrix input-major, the transpose of a linear's weight, so that is how it is held here.
Shape letters: I input features, O output features, G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24
"""float16's smallest positive number: no scale is rounded to zero."""


@dataclass(frozen=True)
class GroupCodes:
    """A linear's weight in codes of `bits`.

    codes      uint8 [I, O], each below 2^bits
    scales     float16 [G, O]
    zeros      uint8 [G, O]
    group_of   int32 [I], the group of every input; groups need not be contiguous (GPTQ's act-order)
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), as a linear's weight has them."""
        return self.codes.shape[1], self.codes.shape[0]

    @property
    def is_contiguous(self) -> bool:
        """Whether the groups are runs of neighbouring inputs, in order and of one size: no act-order."""
        inputs, groups = self.codes.shape[0], self.scales.shape[0]
        return bool(torch.equal(self.group_of, contiguous_groups(inputs, -(-inputs // groups))))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [O, I]; computed in float32 and rounded once."""
        index = self.group_of.long()
        scales, zeros = self.scales.float().index_select(0, index), self.zeros.float().index_select(0, index)
        return ((self.codes.float() - zeros) * scales).t().contiguous().to(dtype)


def contiguous_groups(inputs: int, group_size: int) -> Tensor:
    """int32 [inputs]: 0, 0, … 1, 1, …"""
    return torch.arange(inputs, dtype=torch.int32) // group_size


def storable(scales: Tensor) -> Tensor:
    """Scales rounded to what float16 and bfloat16 both hold, in the tensor's own type.

    The files store float16; a server that computes in bfloat16 rounds the scales once more when it loads them. Chosen
    before the codes are, eight significant bits cost nothing that could be measured, and every server then multiplies
    with the numbers that the codes were made for.
    """
    rounded = scales.to(torch.bfloat16).to(torch.float16).clamp_min(SMALLEST_SCALE)
    return rounded.to(scales.dtype)


def fit_grid(low: Tensor, high: Tensor, bits: int, sym: bool, first_zero: int = 0) -> tuple[Tensor, Tensor]:
    """(scales, zeros) of groups whose values lie in low … high; any shape, in the type of `low`.

    sym         the zero point is the middle code, and the larger side decides the scale
    first_zero  smallest zero point, where a format cannot write 0: a range that begins at zero is widened below

    Zero itself is always one of the values, so what is zero stays zero.
    """
    top = 2**bits - 1
    high = high.clamp_min(0)
    low = torch.minimum(low.clamp_max(0), -high * (first_zero / (top - first_zero)))
    if sym:
        scales = storable(2 * torch.maximum(-low, high) / top)
        return scales, torch.full_like(scales, 2 ** (bits - 1))
    scales = storable((high - low) / top)
    return scales, (-low / scales).round_().clamp_(first_zero, top)


def encode(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The nearest codes, in the type of `values`; the three broadcast."""
    return (values / scales).round_().add_(zeros).clamp_(0, 2**bits - 1)


def round_to_nearest(
    weight: Tensor, group_size: int, bits: int = 4, sym: bool = False, first_zero: int = 0, shrink: Tensor | None = None
) -> GroupCodes:
    """A weight [O, I] quantized without calibration: each value to the nearest code of its group's range.

    shrink  [O, G], the share of each group's range that is kept; what lies beyond is clipped (AWQ's search)
    """
    codes, scales, zeros = _coded(weight, group_size, bits, sym, first_zero, shrink)
    return GroupCodes(
        codes.to(torch.uint8).flatten(1).t().contiguous(),
        scales.to(torch.float16).t().contiguous(),
        zeros.to(torch.uint8).t().contiguous(),
        contiguous_groups(weight.shape[1], group_size),
        bits,
    )


def rounded(weight: Tensor, group_size: int, shrink: Tensor | None = None) -> Tensor:
    """What `round_to_nearest` in 4 bits with free zero points makes of the weight [O, I], in the weight's type."""
    codes, scales, zeros = _coded(weight, group_size, 4, False, 0, shrink)
    return codes.sub_(zeros[..., None]).mul_(scales[..., None]).flatten(1)


def _coded(
    weight: Tensor, group_size: int, bits: int, sym: bool, first_zero: int, shrink: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [O, G, group_size], scales [O, G], zeros [O, G]), all in the weight's type."""
    by_group = weight.reshape(weight.shape[0], -1, group_size)
    low, high = by_group.amin(-1), by_group.amax(-1)
    if shrink is not None:
        low, high = low * shrink, high * shrink
    scales, zeros = fit_grid(low, high, bits, sym, first_zero)
    return encode(by_group, scales[..., None], zeros[..., None], bits), scales, zeros
