"""A 4-bit matrix whose values change a little, rounded onto its own levels without losing the change.

As `gguf_reround` does it for GGUF's blocks: codes are drawn between the two nearest levels, constants stay as they are.
"""

import torch
from torch import Tensor

from halfbyte.ops import levels
from halfbyte.quant.weight import BlockWeight

_CHUNK = 1 << 20
_BESIDE = 1e-5
"""Distance from a level, in units of the block's constant, that float32 arithmetic may leave."""


def reround(weight: BlockWeight, values: Tensor, generator: torch.Generator) -> BlockWeight:
    """`weight` (in 4 bits) with the same constants, its values `values` [out, in] rounded onto the levels.

    A value between two levels takes either with the probability that makes the mean right; one beyond the last level
    takes that. ValueError where a value is not finite.
    """
    order = levels.ordering(weight.quant_type)[1].long()
    table = (levels.levels(weight.quant_type) if weight.table is None else weight.table)[order]
    constants = _constants(weight)
    flat = values.detach().reshape(-1)
    codes = torch.empty(flat.numel() + flat.numel() % 2, dtype=torch.uint8)
    codes[-1] = int(order[(table == 0).int().argmax()])  # the half that no value has: the code of 0
    step = max(weight.blocksize, _CHUNK // weight.blocksize * weight.blocksize)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].float()
        if not bool(torch.isfinite(part).all()):
            raise ValueError("a value is not finite")
        blocks = constants[start // weight.blocksize : -(-(start + part.numel()) // weight.blocksize)]
        scale = blocks.repeat_interleave(weight.blocksize)[: part.numel()]
        x = part / torch.where(scale == 0, 1.0, scale)
        upper = torch.bucketize(x, table).clamp_(1, 15)
        low, high = table[upper - 1], table[upper]
        place = (x - low) / (high - low)
        drawn = torch.where(place > torch.rand(place.shape, generator=generator), upper, upper - 1)
        drawn = torch.where((x - low).abs() < _BESIDE, upper - 1, torch.where((x - high).abs() < _BESIDE, upper, drawn))
        codes[start : start + part.numel()] = order[drawn].to(torch.uint8)
    pairs = codes.view(-1, 2)
    return BlockWeight(
        pairs[:, 0] << 4 | pairs[:, 1],
        weight.absmax,
        weight.quant_type,
        weight.blocksize,
        weight.shape,
        dtype=weight.dtype,
        nested_absmax=weight.nested_absmax,
        nested_offset=weight.nested_offset,
        nested_blocksize=weight.nested_blocksize,
        table=weight.table,
        nested_table=weight.nested_table,
    )


def _constants(weight: BlockWeight) -> Tensor:
    """float32 [blocks]."""
    if weight.nested_absmax is None:
        return weight.absmax
    assert weight.nested_offset is not None
    table = levels.dynamic_map() if weight.nested_table is None else weight.nested_table
    outer = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: weight.absmax.numel()]
    return table[weight.absmax.long()] * outer + weight.nested_offset
