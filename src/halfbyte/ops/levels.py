"""The values that codes stand for.

A 4-bit format is a table of 16 levels in [-1, 1]; a block's weights are `levels[code] * absmax`. The tables
of NF4 and FP4 and the dynamic 8-bit map are bitsandbytes' own, bit for bit, so that files can be exchanged;
E2M1 is the 4-bit float of OCP's Microscaling Formats 1.0 (section 5.3.3), scaled to end at 1; INT4 is ours:
evenly spaced, symmetric, code = integer + 8 (code 0 is never produced). INT8 has no table (`reference.py`
specifies it).
"""

from functools import cache
from typing import Final

import torch
from torch import Tensor

# Quantiles of N(0, 1), 7 below zero and 8 above (QLoRA, arXiv 2305.14314, equation 4 and appendix E).
NF4: Final = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# In bit order; bit 3 is the sign. bitsandbytes' own minifloat: the subnormal is 0.0625 / 12, not E2M1's.
_FP4_TWELFTHS: Final = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)

# Codes by rising level. FP4 has two zeros: exact zeros become code 0, and positive values too small for the
# subnormal become code 8, as in bitsandbytes.
_FP4_ORDER: Final = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

# In bit order; bit 3 is the sign, then two bits of exponent and one of mantissa.
_E2M1: Final = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
_E2M1_ORDER: Final = (15, 14, 13, 12, 11, 10, 9, 0, 8, 1, 2, 3, 4, 5, 6, 7)  # its zeros as FP4's

FOUR_BIT: Final = ("nf4", "fp4", "e2m1", "int4")
QUANT_TYPES: Final = (*FOUR_BIT, "int8")


# Made at import, not at first use: a table first used under FakeTensorMode would be a fake one for good.
_LEVELS: Final = {
    "nf4": torch.tensor(NF4, dtype=torch.float32),
    "fp4": torch.tensor(_FP4_TWELFTHS, dtype=torch.float32) / 12,
    "e2m1": torch.tensor(_E2M1, dtype=torch.float32) / 6,
    "int4": torch.arange(-8, 8, dtype=torch.float32) / 7,
}


def _ordering(quant_type: str) -> tuple[Tensor, Tensor]:
    order = torch.tensor({"fp4": _FP4_ORDER, "e2m1": _E2M1_ORDER}.get(quant_type, range(16)))
    rising = _LEVELS[quant_type][order]
    return (rising[:-1] + rising[1:]) / 2, order.to(torch.uint8)


_ORDERING: Final = {name: _ordering(name) for name in FOUR_BIT}


def _dynamic_map(signed: bool) -> Tensor:
    parts = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        parts += [middles, -middles] if signed else [middles]
    return torch.cat(parts).sort().values


_DYNAMIC: Final = {signed: _dynamic_map(signed) for signed in (True, False)}
_DYNAMIC_MIDPOINTS: Final = {signed: (table[:-1] + table[1:]) / 2 for signed, table in _DYNAMIC.items()}


def levels(quant_type: str) -> Tensor:
    """The 16 float32 levels of a 4-bit format, by code, on the CPU. Shared: do not write into it."""
    return _LEVELS[quant_type]


def ordering(quant_type: str) -> tuple[Tensor, Tensor]:
    """(float32 [15] midpoints between neighbouring levels, uint8 [16] codes by rising level).

    A value goes up to the next level only where it is greater than the midpoint.
    """
    return _ORDERING[quant_type]


def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 rising float32 levels of the dynamic 8-bit format (arXiv 1511.04561), on the CPU.

    For each exponent 10^(i - 6), i = 0 … 6, the midpoints of 2^i (unsigned: 2^(i+1)) equal steps between 0.1
    and 1, of both signs where the map is signed; and 0, and 1.
    """
    return _DYNAMIC[signed]


def dynamic_midpoints(signed: bool = True) -> Tensor:
    """float32 [255], the midpoints between neighbouring levels of `dynamic_map`."""
    return _DYNAMIC_MIDPOINTS[signed]


@cache
def dynamic_search(signed: bool = True) -> tuple[Tensor, Tensor]:
    """(uint8 [65536] ranks, float32 [256] midpoints and an infinity): a table that spares the native kernel a search.

    The first says, for the upper 16 bits of a float, how many midpoints lie below the least value that has them; of a
    value in [-1, 1] the rank is at most 2 more.
    """
    middles = torch.cat([dynamic_midpoints(signed), torch.tensor([torch.inf])])
    upper = torch.arange(1 << 16, dtype=torch.int64)
    # Where the sign bit is set the least value is the one of the greatest magnitude.
    least = (upper << 16) + (upper >= 1 << 15) * 0xFFFF
    values = torch.where(least >= 1 << 31, least - (1 << 32), least).to(torch.int32).view(torch.float32)
    ranks = torch.bucketize(values.nan_to_num(0), middles)
    return ranks.to(torch.uint8), middles
