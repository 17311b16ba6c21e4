"""Random integer codes as GPTQ and AWQ have them, and what they are worth."""

import torch
from torch import Tensor

from halfbyte.quant import GroupWeight
from halfbyte.quant.group_codes import GroupCodes

STORAGES = {
    "4-bit, groups of 128": (4, 128, False),
    "4-bit, groups of 32": (4, 32, False),
    "4-bit, one group": (4, -1, False),
    "4-bit, act-order": (4, 64, True),
    "4-bit, act-order, many groups": (4, 2, True),
    "8-bit": (8, 64, False),
    "8-bit, act-order": (8, 64, True),
    "8-bit, act-order, many groups": (8, 2, True),
}
"""Bits, inputs of a group, act-order; with "many groups" more than an instruction set looks up in registers."""


def random_codes(
    outputs: int,
    inputs: int,
    group_size: int,
    bits: int = 4,
    seed: int = 0,
    shuffled: bool = False,
    first_zero: int = 1,
) -> GroupCodes:
    """Every code, zero points from `first_zero` on, scales that make values of about 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    group_size = inputs if group_size == -1 else group_size
    groups = -(-inputs // group_size)

    def integers(low: int, *shape: int) -> Tensor:
        return torch.randint(low, 2**bits, shape, generator=generator, dtype=torch.uint8)

    group_of = torch.arange(inputs, dtype=torch.int32) // group_size
    if shuffled:
        group_of = group_of[torch.randperm(inputs, generator=generator)]
    scales = (torch.rand(groups, outputs, generator=generator) / (2**bits * inputs**0.5)).half()
    return GroupCodes(integers(0, inputs, outputs), scales, integers(first_zero, groups, outputs), group_of, bits)


def random_group_weight(storage: str, rows: int, columns: int, seed: int = 0) -> GroupWeight:
    bits, size, shuffled = STORAGES[storage]
    return GroupWeight.from_codes(random_codes(rows, columns, size, bits, seed, shuffled), "gptq")


def exact(codes: GroupCodes) -> Tensor:
    """The weight [O, I] in float64, by the definition and one value after the other's."""
    values = torch.empty(codes.shape[0], codes.shape[1], dtype=torch.float64)
    for i, group in enumerate(codes.group_of.tolist()):
        values[:, i] = (codes.codes[i].double() - codes.zeros[group].double()) * codes.scales[group].double()
    return values
