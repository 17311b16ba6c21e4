"""Values near a GGUF file's own, rounded onto that file's own grid without losing a small change.

An adapter's update is small beside the step of a 4-bit format: a hundredth of it is usual. A base that was read from
blocks lies exactly on their levels, so whoever quantizes base plus update again to the nearest level gets the base, and
what was learned is gone (docs/results.md has a run whose score falls from 0.92 to 0 so). Here the blocks keep their
scales and minima, and a value between two levels takes the upper one with the probability of its place between them
(stochastic rounding, as in Gupta et al. 2015, arXiv 1502.02551). The mean is then the value itself. A value d steps
above a level gets noise of variance d (1 - d) steps squared: less than the 1/12 of an ordinary quantization where
updates are small, and none where there is no update.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.quant import gguf_decode, gguf_encode

_CHUNK_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class _Grid:
    """A type's levels: value = scale * code - offset, codes 0 to `top`; scale and offset broadcast over [N, weights].

    pack  (the blocks as they are, uint8 codes [N, weights]) -> blocks with those codes
    """

    levels: Callable[[Tensor], tuple[Tensor, Tensor]]
    top: int
    pack: Callable[[Tensor, Tensor], Tensor]


def _runs(scale: Tensor, width: int) -> Tensor:
    """[N, S] or [N, S, 1] -> [N, S * width], each one `width` times."""
    return scale.reshape(scale.shape[0], -1).repeat_interleave(width, 1)


def _centred(middle: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """half d at the start; value = (code - middle) d."""

    def levels(blocks: Tensor) -> tuple[Tensor, Tensor]:
        step = gguf_decode._half(blocks[:, 0:2])
        return step, step * middle

    return levels


def _from_minimum(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """half d, half m at the start; value = code d + m."""
    return gguf_decode._half(blocks[:, 0:2]), -gguf_decode._half(blocks[:, 2:4])


def _k_levels(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale, offset = gguf_decode._k_scales(blocks)
    return _runs(scale, 32), _runs(offset, 32)


def _q6_k_levels(blocks: Tensor) -> tuple[Tensor, Tensor]:
    scale = blocks[:, 192:208].contiguous().view(torch.int8).float() * gguf_decode._half(blocks[:, 208:210])
    return _runs(scale, 16), _runs(scale * 32, 16)


def _behind(start: int, *parts: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The block's first bytes as they are, then what `parts` make of the codes."""
    return lambda blocks, codes: torch.cat([blocks[:, :start], *(part(codes) for part in parts)], 1)


def _nibbles(width: int) -> Callable[[Tensor], Tensor]:
    return lambda codes: gguf_encode._nibbles(codes, width)


_GRIDS = {
    "Q4_0": _Grid(_centred(8), 15, _behind(2, _nibbles(16))),
    "Q4_1": _Grid(_from_minimum, 15, _behind(4, _nibbles(16))),
    "Q5_0": _Grid(_centred(16), 31, _behind(2, gguf_encode._fifth_bits, _nibbles(16))),
    "Q5_1": _Grid(_from_minimum, 31, _behind(4, gguf_encode._fifth_bits, _nibbles(16))),
    "Q8_0": _Grid(_centred(128), 255, _behind(2, lambda codes: codes ^ 128)),
    "Q4_K": _Grid(_k_levels, 15, _behind(16, _nibbles(32))),
    "Q5_K": _Grid(_k_levels, 31, _behind(16, gguf_encode._fifth_bits_of_runs, _nibbles(32))),
    "Q6_K": _Grid(_q6_k_levels, 63, lambda b, codes: torch.cat([gguf_encode._six_bit_codes(codes), b[:, 192:]], 1)),
}
TYPES = tuple(_GRIDS)


def reround(blocks: Tensor, type_name: str, values: Tensor, generator: torch.Generator | None) -> Tensor:
    """Blocks [N, bytes] with the same scales, their values `values` (float32 [N, weights]) rounded onto the levels.

    generator  draws between the two nearest levels; None: to the nearest

    Values beyond a block's last level stay at it; where a scale is zero every code is the same value. ValueError
    where a value is not finite.
    """
    grid, out = _GRIDS[type_name], torch.empty_like(blocks)
    step = max(1, _CHUNK_WEIGHTS // max(values.shape[1], 1))
    for start in range(0, blocks.shape[0], step):
        part, wanted = blocks[start : start + step], values[start : start + step].float()
        if not bool(torch.isfinite(wanted).all()):
            raise ValueError("a value is not finite")
        scale, offset = grid.levels(part)
        place = (wanted + offset) / torch.where(scale == 0, 1.0, scale)
        if generator is None:
            codes = place.round_()
        else:
            # What float32 arithmetic leaves beside a level is not drawn for.
            near = place.round()
            drawn = (place + torch.rand(place.shape, generator=generator)).floor_()
            codes = torch.where((place - near).abs() < 1e-4, near, drawn)
        codes = codes.clamp_(0, grid.top)
        out[start : start + step] = grid.pack(part, codes.to(torch.uint8))
    return out
