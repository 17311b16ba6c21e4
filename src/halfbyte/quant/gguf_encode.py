"""Float rows to GGUF's quantized blocks: what `quant.gguf_decode` reads, written.

The simple formats (Q8_0, Q4_0, Q5_0, Q5_1) have one rounding each, ggml's; the bytes are those of the `gguf` package,
which has no encoder for the K-quants. These are an optimisation problem, and the solution here is our own: for every
sub-block a few dozen step sizes near (largest - smallest) / levels are tried, the values rounded to codes with each,
scale and minimum refitted to the codes by weighted least squares, and the best fit kept; then the scales become 6-bit
(8-bit) multiples of one half-precision number a block, and the codes are made again with what is stored. Weights are
ggml's, |x| + rms(x) where there is a minimum and x² where not: large weights matter more, small ones still count.

`csrc/gguf_encode.cpp` is the same arithmetic, operation by operation, and gives the same bytes; the tensors here run
where there is no native library.

Layouts: ggml-common.h. Letters: N blocks, S sub-blocks.
"""

from collections.abc import Callable, Iterator
from itertools import chain

import gguf
import numpy as np
import torch
from torch import Tensor

from halfbyte.ops import native
from halfbyte.ops.native import INT, INT64, POINTER

native.declare({"hb_gguf_encode": [POINTER, INT, INT64, POINTER]})

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_NATIVE = {"Q4_K": 4, "Q5_K": 5, "Q6_K": 6}
_CHUNK_WEIGHTS = 1 << 20  # 4 MB of float32 for each of the dozen temporaries of the reference
_HALF_MAX = 65504.0


def block_of(type_name: str) -> tuple[int, int]:
    """(weights, bytes) of a block of one of TYPES."""
    weights, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    return int(weights), int(nbytes)


def row_bytes(columns: int, type_name: str) -> int:
    """Bytes of a row of `columns` weights."""
    weights, nbytes = block_of(type_name)
    return columns // weights * nbytes


def encode(rows: Tensor, type_name: str) -> Tensor:
    """Floats [N, columns] -> uint8 [N, bytes a row] in one of TYPES.

    Raises ValueError where columns are not whole blocks, or a value is not finite or beyond what the type can hold
    (all but F32 and BF16 keep scales, or the values themselves, in half precision).
    """
    if type_name not in TYPES:
        raise ValueError(f"{type_name} is not one of {', '.join(TYPES)}")
    if rows.ndim != 2 or rows.shape[1] % block_of(type_name)[0]:
        raise ValueError(f"{list(rows.shape)} is not rows of blocks of {block_of(type_name)[0]}, as {type_name} needs")
    out = torch.empty(rows.shape[0], row_bytes(rows.shape[1], type_name), dtype=torch.uint8)
    if out.numel() == 0:
        return out
    flat, weights = out.view(-1, block_of(type_name)[1]), block_of(type_name)[0]
    step = max(1, _CHUNK_WEIGHTS // weights)
    blocks = rows.detach().reshape(-1, weights)
    for start in range(0, blocks.shape[0], step):
        values = blocks[start : start + step].float().contiguous()
        _check(values, type_name)
        _encode_blocks(values, type_name, flat[start : start + step])
    return out


def _check(values: Tensor, type_name: str) -> None:
    low, high = (float(v) for v in torch.aminmax(values))
    largest = max(-low, high)
    if not largest < float("inf"):
        raise ValueError("a value is not finite")
    if largest > _HALF_MAX and type_name not in ("F32", "BF16"):
        raise ValueError(f"a value of {largest:g} is beyond half precision, which {type_name} needs")


def _encode_blocks(values: Tensor, type_name: str, out: Tensor) -> None:
    library = native.library() if type_name in _NATIVE else None
    if library is None:
        out.copy_(_ENCODERS[type_name](values))
    else:
        library.hb_gguf_encode(values.data_ptr(), _NATIVE[type_name], values.shape[0], out.data_ptr())


# -- one rounding -----------------------------------------------------------------------------------------------------


def _bytes(values: Tensor) -> Tensor:
    """[N, k] of any type -> uint8 [N, k bytes]."""
    return values.contiguous().view(torch.uint8)


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step == 0, 0.0, 1 / step)


def _nibbles(codes: Tensor, width: int) -> Tensor:
    """uint8 [N, k]: each run of 2 `width` codes becomes `width` bytes, the first half in the low nibbles."""
    pairs = (codes & 15).view(codes.shape[0], -1, 2, width)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(codes.shape[0], -1)


_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def _fifth_bits(codes: Tensor) -> Tensor:
    """Bit 4 of 32 codes, lowest first: uint8 [N, 32] -> [N, 4]."""
    return ((codes >> 4).view(-1, 4, 8) * _BITS).sum(2, dtype=torch.uint8)


def _signed_extreme(values: Tensor) -> Tensor:
    """Of each block the value of largest magnitude, with its sign: [N, 1]."""
    return values.gather(1, values.abs().argmax(1, keepdim=True))


def _q8_0(values: Tensor) -> Tensor:
    step = values.abs().amax(1, keepdim=True) / 127
    scaled = values * _inverse(step)
    size = scaled.abs()
    floor = size.floor()
    codes = scaled.sign() * (floor + (2 * (size - floor)).floor())  # half away from zero
    return torch.cat([_bytes(step.half()), _bytes(codes.to(torch.int8))], 1)


def _q4_0(values: Tensor) -> Tensor:
    step = _signed_extreme(values) / -8
    codes = (values * _inverse(step) + 8.5).clamp_(0, 15.5).to(torch.uint8)
    return torch.cat([_bytes(step.half()), _nibbles(codes, 16)], 1)


def _q5_0(values: Tensor) -> Tensor:
    step = _signed_extreme(values) / -16
    codes = (values * _inverse(step) + 16.5).clamp_(0, 31.5).to(torch.uint8)
    return torch.cat([_bytes(step.half()), _fifth_bits(codes), _nibbles(codes, 16)], 1)


def _q5_1(values: Tensor) -> Tensor:
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    step = (high - low) / 31
    codes = ((values - low) * _inverse(step) + 0.5).clamp_(0, 31.5).to(torch.uint8)
    return torch.cat([_bytes(step.half()), _bytes(low.half()), _fifth_bits(codes), _nibbles(codes, 16)], 1)


# -- K-quants ---------------------------------------------------------------------------------------------------------


def _single(value: float) -> float:
    """The float32 next to a Python number: constants must be what C++ computes with."""
    return float(np.float32(value))


def _sum(terms: Tensor) -> Tensor:
    """Over the first dimension, one after the other: the order is part of the result."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total += term
    return total


def _root(values: Tensor) -> Tensor:
    """Square roots as IEEE 754 rounds them: torch's come from MKL, one in six a unit off and not always the same."""
    return torch.from_numpy(np.sqrt(values.numpy()))


def _half(values: Tensor) -> Tensor:
    return values.half().float()


def _tenths(start: float, first: float, count: int) -> Iterator[Tensor]:
    """start + (first + 0.1 i) for i below `count`: how many steps the range of a sub-block is cut into.

    Tensors, because a Python number divided by a tensor is a multiplication by its reciprocal, rounded twice.
    """
    for i in range(count):
        yield torch.tensor(np.float32(start) + (np.float32(first) + np.float32(0.1) * np.float32(i)))


def _fit_affine(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(scale, minimum), both [S] and not negative, with x about scale * code - minimum and code from 0 to `top`.

    x is [32, S]. With z = x - low and weights w, a candidate's codes c give the least squares
    [scale, offset] = [[Σwcc, Σwc], [Σwc, Σw]]⁻¹ [Σwcz, Σwz]; what a fit gains over z = 0 is compared.
    """
    low, high = x.amin(0).clamp(max=0), x.amax(0)
    span = high - low
    w = _root(_sum(x * x) * 0.03125) + x.abs()
    z = x - low
    sum_w, sum_wz = _sum(w), _sum(w * z)
    best, offset = torch.zeros_like(low), torch.zeros_like(low)
    scale = span * float(np.float32(1) / np.float32(top))
    tries = _tenths(top, -1.0, 21) if top == 15 else _tenths(top, -0.5, 16)
    for levels in chain(tries, [None, None]):
        # The candidates, each from the best offset so far; then twice the best fit itself, which settles.
        inverse = _inverse(scale) if levels is None else torch.where(span > 0, levels / span, 0.0)
        code = (inverse * (z - offset)).clamp_(0, top).round_()
        wc = w * code
        sum_wc, sum_wcc, sum_wcz = _sum(wc), _sum(wc * code), _sum(wc * z)
        product = sum_w * sum_wcc
        determinant = product - sum_wc * sum_wc
        solvable = determinant > product * _single(1e-5)
        divisor = torch.where(solvable, determinant, 1.0)
        s = (sum_w * sum_wcz - sum_wz * sum_wc) / divisor
        o = (sum_wcc * sum_wz - sum_wc * sum_wcz) / divisor
        # A minimum below zero cannot be stored: then the line goes through the origin.
        above = low + o > 0
        s = torch.where(above, (sum_wcz + low * sum_wc) / torch.where(solvable, sum_wcc, 1.0), s)
        o = torch.where(above, -low, o)
        linear = 2 * (s * sum_wcz + o * sum_wz)
        gain = linear - ((s * s) * sum_wcc + (2 * (s * o)) * sum_wc + (o * o) * sum_w)
        better = solvable & (gain > best)
        best, scale, offset = (torch.where(better, new, old) for new, old in ((gain, best), (s, scale), (o, offset)))
    minimum = -(low + offset)
    return torch.where(scale > 0, scale, 0.0), torch.where(minimum > 0, minimum, 0.0)  # clamp would keep -0


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 8] -> (a half-precision unit [N, 1], multiples of it from 0 to 63)."""
    unit = _half(values.amax(1, keepdim=True) * float(np.float32(1) / np.float32(63)))
    multiples = (values / torch.where(unit > 0, unit, 1.0)).clamp(0, 63).round()
    return unit, torch.where(unit > 0, multiples, 0.0)


def _affine(values: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The start of a Q4_K or Q5_K block (two halves, 12 bytes of scales and minima), and the codes [N, 8, 32]."""
    count = values.shape[0]
    scales, minima = _fit_affine(values.view(-1, 32).t().contiguous(), top)
    unit, scale = _six_bits(scales.view(count, 8))
    unit_min, minimum = _six_bits(minima.view(count, 8))
    step = (unit * scale).unsqueeze(2)
    shifted = values.view(count, 8, 32) + (unit_min * minimum).unsqueeze(2)
    codes = (shifted / torch.where(step > 0, step, 1.0)).clamp_(0, top).round_()
    codes = torch.where(step > 0, codes, 0.0).to(torch.uint8)
    s, m = scale.to(torch.uint8), minimum.to(torch.uint8)
    packed = [
        s[:, :4] | ((s[:, 4:] >> 4) << 6),
        m[:, :4] | ((m[:, 4:] >> 4) << 6),
        (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4),
    ]
    return torch.cat([_bytes(unit.half()), _bytes(unit_min.half()), *packed], 1), codes


def _q4_k(values: Tensor) -> Tensor:
    start, codes = _affine(values, 15)
    return torch.cat([start, _nibbles(codes.view(-1, 256), 32)], 1)


def _q5_k(values: Tensor) -> Tensor:
    start, codes = _affine(values, 31)
    return torch.cat([start, _fifth_bits_of_runs(codes), _nibbles(codes.view(-1, 256), 32)], 1)


def _fit_symmetric(x: Tensor) -> Tensor:
    """scale [S], of either sign, with x [16, S] about scale * code, code from -32 to 31."""
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
    w = x * x
    best, scale = torch.zeros_like(extreme), torch.zeros_like(extreme)
    for levels in _tenths(32.0, -0.9, 19):
        inverse = torch.where(extreme != 0, -levels / torch.where(extreme != 0, extreme, 1.0), 0.0)
        code = (inverse * x).clamp_(-32, 31).round_()
        wc = w * code
        sum_wcx, sum_wcc = _sum(wc * x), _sum(wc * code)
        s = sum_wcx / torch.where(sum_wcc > 0, sum_wcc, 1.0)
        gain = s * sum_wcx
        better = gain > best
        best, scale = torch.where(better, gain, best), torch.where(better, s, scale)
    return scale


def _q6_k(values: Tensor) -> Tensor:
    count = values.shape[0]
    scales = _fit_symmetric(values.view(-1, 16).t().contiguous()).view(count, 16)
    unit = _half(_signed_extreme(scales) * -0.0078125)  # the largest scale becomes -128
    safe = torch.where(unit != 0, unit, 1.0)
    scale = torch.where(unit != 0, (scales / safe).clamp(-128, 127).round(), 0.0)
    step = (unit * scale).unsqueeze(2)
    codes = (values.view(count, 16, 16) / torch.where(step != 0, step, 1.0)).clamp_(-32, 31).round_()
    codes = (torch.where(step != 0, codes, 0.0) + 32).to(torch.uint8)
    return torch.cat([_six_bit_codes(codes), _bytes(scale.to(torch.int8)), _bytes(unit.half())], 1)


def _six_bit_codes(codes: Tensor) -> Tensor:
    """uint8 [N, 256], or any shape of as many, in Q6_K's order: nibbles, then pairs of upper bits: [N, 192]."""
    count = codes.numel() // 256
    upper = (codes >> 4).view(count, 2, 4, 32)
    pairs = upper[:, :, 0] | (upper[:, :, 1] << 2) | (upper[:, :, 2] << 4) | (upper[:, :, 3] << 6)
    return torch.cat([_nibbles(codes.view(count, 256), 64), pairs.view(count, 64)], 1)


def _fifth_bits_of_runs(codes: Tensor) -> Tensor:
    """Bit 4 of Q5_K's codes, bit j of a byte from sub-block j: uint8 [N, 256] -> [N, 32]."""
    return ((codes.view(-1, 8, 32) >> 4) * _BITS.view(1, 8, 1)).sum(1, dtype=torch.uint8)


_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _bytes,
    "F16": lambda values: _bytes(values.half()),
    "BF16": lambda values: _bytes(values.bfloat16()),
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
