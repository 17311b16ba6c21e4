"""GGUF's quantized blocks back to numbers: natively where that is possible (`csrc/engine/gguf.inc`), else in torch.

A block is a few bytes of scales followed by packed integers; the layouts are ggml's (`ggml-common.h`,
`ggml-quants.c`), and every value here equals `gguf.quants.dequantize` rounded to bfloat16, bit for bit
(float32 arithmetic in the same order, tested). The types that common files use are written out below;
any other that the `gguf` package knows goes through that package, slower.

Shape letters: N blocks. Each function takes the blocks as uint8 [N, bytes] and returns float32 [N, weights].
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import gguf
import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.ops.linear import GGUF_TYPES, WeightView, decode_rows, gguf_view

_CHUNK_WEIGHTS = 1 << 20  # float32 scratch of 4 MB: far above the cost of a call, small beside any model


def _half(data: Tensor) -> Tensor:
    """Two bytes a block as float16, widened: [N, 2 k] -> float32 [N, k]."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: Tensor, width: int) -> Tensor:
    """Each run of `width` bytes gives as many low nibbles, then high ones: [N, B] -> [N, B / width, 2, width]."""
    packed = data.reshape(data.shape[0], -1, width)
    out = torch.empty(*packed.shape[:2], 2, width, dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=out[:, :, 0])
    torch.bitwise_right_shift(packed, 4, out=out[:, :, 1])
    return out


def _q4_0(blocks: Tensor) -> Tensor:
    """half d, 16 bytes of nibbles: (q - 8) d."""
    q = _nibbles(blocks[:, 2:18], 16).view(-1, 32).float()
    return q.sub_(8).mul_(_half(blocks[:, 0:2]))


def _q4_1(blocks: Tensor) -> Tensor:
    """half d, half m, 16 bytes of nibbles: q d + m."""
    q = _nibbles(blocks[:, 4:20], 16).view(-1, 32).float()
    return q.mul_(_half(blocks[:, 0:2])).add_(_half(blocks[:, 2:4]))


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _fifth_bits(data: Tensor) -> Tensor:
    """32 bits, lowest first, as 0 or 16: [N, 4] -> uint8 [N, 32]."""
    bits = torch.bitwise_and(data.unsqueeze(2), _BITS.to(data.device)).view(data.shape[0], 32)
    return bits.ne_(0).mul_(16)


def _q5_0(blocks: Tensor) -> Tensor:
    """half d, 4 bytes of fifth bits, 16 bytes of nibbles: (q - 16) d."""
    q = _nibbles(blocks[:, 6:22], 16).view(-1, 32).add_(_fifth_bits(blocks[:, 2:6])).float()
    return q.sub_(16).mul_(_half(blocks[:, 0:2]))


def _q5_1(blocks: Tensor) -> Tensor:
    """half d, half m, 4 bytes of fifth bits, 16 bytes of nibbles: q d + m."""
    q = _nibbles(blocks[:, 8:24], 16).view(-1, 32).add_(_fifth_bits(blocks[:, 4:8])).float()
    return q.mul_(_half(blocks[:, 0:2])).add_(_half(blocks[:, 2:4]))


def _q8_0(blocks: Tensor) -> Tensor:
    """half d, 32 signed bytes: q d."""
    return blocks[:, 2:34].view(torch.int8).float().mul_(_half(blocks[:, 0:2]))


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Q4_K's and Q5_K's start: half d, half dmin, eight 6-bit scales and minima in 12 bytes; float32 [N, 8, 1] each."""
    low_scale, low_min, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat([low_scale & 63, (high & 15) | ((low_scale >> 2) & 48)], 1)
    minimum = torch.cat([low_min & 63, (high >> 4) | ((low_min >> 2) & 48)], 1)
    scaled = scale.float().mul_(_half(blocks[:, 0:2]))
    offset = minimum.float().mul_(_half(blocks[:, 2:4]))
    return scaled.unsqueeze(2), offset.unsqueeze(2)


def _q4_k(blocks: Tensor) -> Tensor:
    """`_k_scales`, 128 bytes of nibbles in runs of 32: q scale - min."""
    scale, offset = _k_scales(blocks)
    q = _nibbles(blocks[:, 16:144], 32).view(-1, 8, 32).float()
    return q.mul_(scale).sub_(offset).view(-1, 256)


def _q5_k(blocks: Tensor) -> Tensor:
    """`_k_scales`, 32 bytes of fifth bits (bit j belongs to sub-block j), 128 bytes of nibbles: q scale - min."""
    scale, offset = _k_scales(blocks)
    fifth = torch.bitwise_and(blocks[:, None, 16:48], _BITS.to(blocks.device).view(1, 8, 1)).ne_(0).mul_(16)
    q = _nibbles(blocks[:, 48:176], 32).view(-1, 8, 32).add_(fifth).float()
    return q.mul_(scale).sub_(offset).view(-1, 256)


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of nibbles in runs of 64, 64 of upper bit pairs in runs of 32, 16 signed scales, half d.

    (q - 32) d scale.
    """
    count = blocks.shape[0]
    pairs = blocks[:, 128:192].reshape(count, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(1, 1, 4, 1)
    upper = torch.bitwise_right_shift(pairs, shifts).bitwise_and_(3).bitwise_left_shift_(4).view(count, 256)
    q = _nibbles(blocks[:, 0:128], 64).view(count, 256).add_(upper).float().sub_(32)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks[:, 208:210]))
    return q.view(count, 16, 16).mul_(scale.unsqueeze(2)).view(count, 256)


_FAST: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def block_view(blocks: Tensor, type_name: str, weights: int) -> WeightView | None:
    """Blocks as a matrix of one block a row; None where the native library does not decode them."""
    if type_name not in GGUF_TYPES or not blocks.numel():
        return None
    return gguf_view(blocks.contiguous(), type_name, (blocks.shape[0], weights))


def dequantize_into(blocks: Tensor, type_name: str, out: Tensor) -> None:
    """Dequantize `blocks` (uint8 [N, bytes a block]) into `out` (N x weights a block, contiguous)."""
    weights = out.numel() // max(blocks.shape[0], 1)
    flat = out.view(blocks.shape[0], weights)
    view = block_view(blocks, type_name, weights)
    if view is None or not decode_rows(view, flat):
        _with_torch(blocks, type_name, flat)


def _with_torch(blocks: Tensor, type_name: str, flat: Tensor) -> None:
    weights = flat.shape[1]
    fast = _FAST.get(type_name)
    step = max(1, _CHUNK_WEIGHTS // max(weights, 1))
    with _one_thread():
        for start in range(0, blocks.shape[0], step):
            chunk = blocks[start : start + step]
            flat[start : start + step].copy_(fast(chunk) if fast else _with_package(chunk, type_name))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread is as fast as two here and five times faster where others use the cores: these passes over a few
    megabytes end at a barrier each, and a barrier waits for a thread that is not running."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _with_package(blocks: Tensor, type_name: str) -> Tensor:
    try:
        values = gguf.quants.dequantize(blocks.contiguous().numpy(), gguf.GGMLQuantizationType[type_name])
    except NotImplementedError as error:
        raise UsageError(f"blocks of GGUF's type {type_name} cannot be read: {error}") from None
    return torch.from_numpy(values)
