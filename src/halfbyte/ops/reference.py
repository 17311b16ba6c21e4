"""What the operators mean, in plain PyTorch: the specification that every other backend equals bit for bit.

A tensor is quantized flat, row-major, in blocks of `blocksize` values that may span rows; the last block may be
shorter. A block's constant is `absmax`, its largest magnitude, in float32. All arithmetic is float32.

- Scaling to [-1, 1]: a full block multiplies by `1 / max(absmax, 1e-38)`; a shorter last block divides by
  `max(absmax, 1e-38)`, and stores that maximum. (bitsandbytes' reference does so, and its codes depend on it.)
- 4-bit (`nf4`, `fp4`, `int4`): the nearest level, the lower one at a midpoint (`levels.py`). Two codes a byte, the
  earlier in the high half; an odd count is padded with the code of 0. Value = `levels[code] * absmax`.
- `int8`: code = 128 + round-half-even(scaled * 127), one a byte. Value = `(code - 128) * (absmax / 127)`.
- Dynamic 8-bit: the nearest level of 256, the lower one at a midpoint, always scaled by the rules above.
- Nested constants (double quantization): `absmax = nested_levels[code] * nested_absmax + nested_offset`, two
  roundings, in blocks of `nested_blocksize` constants.
- Values are rounded from float32 to the asked dtype once, half to even.

It works in chunks, because without a compiler it is also what runs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.ops import levels

_SMALLEST = 1e-38
_CHUNK = 1 << 20


def _block_ranges(count: int, blocksize: int) -> Iterator[tuple[int, int]]:
    """Cut `count` values into runs of whole blocks, about `_CHUNK` values each; only the last may end inside one."""
    step = max(_CHUNK // blocksize, 1) * blocksize
    for start in range(0, count, step):
        yield start, min(start + step, count)


def _scale(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """(values scaled to [-1, 1], float32 [n]; absmax, float32 [ceil(n / blocksize)]) of flat float32 `values`."""
    whole = values.numel() // blocksize * blocksize
    blocks = values[:whole].view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1) if whole else values.new_empty(0)
    scaled = blocks * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]
    if whole == values.numel():
        return scaled.clamp_(-1, 1).view(-1), absmax
    tail = values[whole:]
    tail_absmax = tail.abs().amax().clamp(min=_SMALLEST)
    return (
        torch.cat([scaled.view(-1), tail / tail_absmax]).clamp_(-1, 1),
        torch.cat([absmax, tail_absmax[None]]),
    )


def refuse_non_finite(x: Tensor, absmax: Tensor) -> None:
    """Raise UsageError if a block of `x` holds a NaN or an infinity (its absmax then does), naming the first."""
    if torch.isfinite(absmax).all():
        return
    flat = x.reshape(-1)
    index = int(torch.nonzero(~torch.isfinite(flat))[0])
    place = [int(i) for i in torch.unravel_index(torch.tensor(index), x.shape)]
    raise UsageError(
        f"cannot quantize a tensor of shape {list(x.shape)}: the value at {place} is {float(flat[index])}; "
        "the weights are damaged, get a fresh copy of the checkpoint"
    )


def _encode(scaled: Tensor, quant_type: str) -> Tensor:
    """uint8 codes, packed if 4-bit, of values in [-1, 1]."""
    if quant_type == "int8":
        return (scaled * 127).round_().add_(128).to(torch.uint8)
    middles, order = (table.to(scaled.device) for table in levels.ordering(quant_type))
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = order[torch.bucketize(scaled, middles, out_int32=True)].view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1]


def quantize_blockwise(x: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize a tensor of any shape: (uint8 codes, flat; float32 absmax [ceil(n / blocksize)]).

    Raises UsageError where a value is NaN or infinite.
    """
    flat = x.reshape(-1)
    codes, constants = [flat.new_empty(0, dtype=torch.uint8)], [flat.new_empty(0, dtype=torch.float32)]
    for start, stop in _block_ranges(flat.numel(), blocksize):
        scaled, absmax = _scale(flat[start:stop].float(), blocksize)
        refuse_non_finite(x, absmax)
        codes.append(_encode(scaled, quant_type))
        constants.append(absmax)
    return torch.cat(codes), torch.cat(constants)


def quantize_dynamic(x: Tensor, blocksize: int, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Quantize to 8-bit dynamic codes: (uint8 [n], float32 absmax). Raises UsageError on NaN and infinity."""
    flat = x.reshape(-1)
    middles = levels.dynamic_midpoints(signed).to(x.device)
    codes, constants = [flat.new_empty(0, dtype=torch.uint8)], [flat.new_empty(0, dtype=torch.float32)]
    for start, stop in _block_ranges(flat.numel(), blocksize):
        scaled, absmax = _scale(flat[start:stop].float(), blocksize)
        refuse_non_finite(x, absmax)
        codes.append(torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8))
        constants.append(absmax)
    return torch.cat(codes), torch.cat(constants)


# From here on `narrow`, `unsqueeze` and `torch.mul(…, out=)` stand where one would index and `copy_`: on a CPU build of
# torch those refuse the fake CUDA tensors that the tests of `cuda.py` send through.
def _multiply_blocks(values: Tensor, constants: Tensor, blocksize: int) -> Tensor:
    """Flat `values` times their block's constant, in place; the last block may be shorter."""
    blocks, tail = divmod(values.numel(), blocksize)
    whole = blocks * blocksize
    values.narrow(0, 0, whole).view(-1, blocksize).mul_(constants.narrow(0, 0, blocks).unsqueeze(1))
    if tail:
        values.narrow(0, whole, tail).mul_(constants.narrow(0, blocks, 1))
    return values


def dequantize_dynamic(codes: Tensor, absmax: Tensor, blocksize: int, table: Tensor) -> Tensor:
    """float32 [n] = table[codes] * absmax, in blocks. `table`: float32 [256], see `levels.dynamic_map`."""
    return _multiply_blocks(table.index_select(0, codes.int()), absmax, blocksize)


def _decode(codes: Tensor, constants: Tensor, quant_type: str, blocksize: int, table: Tensor | None) -> Tensor:
    """The float32 values of whole blocks' codes; a last block may be shorter, to the byte."""
    if quant_type == "int8":
        return _multiply_blocks(codes.float().sub_(128), constants / 127, blocksize)
    assert table is not None
    byte = torch.arange(256, device=codes.device)
    pairs = torch.stack([table.index_select(0, byte >> 4), table.index_select(0, byte & 15)], dim=1)
    return _multiply_blocks(pairs.index_select(0, codes.int()).view(-1), constants, blocksize)


def dequantize_blockwise_out(
    codes: Tensor,
    absmax: Tensor,
    quant_type: str,
    blocksize: int,
    out: Tensor,
    start: int = 0,
    table: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_offset: Tensor | None = None,
    nested_table: Tensor | None = None,
    nested_blocksize: int = 256,
) -> None:
    """Write the values `start … start + out.numel()` of the flat quantized tensor into `out`, contiguous.

    table: the format's 16 levels where a file brought its own. With `nested_absmax`, `nested_offset` (float32, one
    element) and optionally `nested_table` [256], `absmax` holds dynamic 8-bit codes of the constants.
    """
    if nested_absmax is not None:
        assert nested_offset is not None
        steps = levels.dynamic_map() if nested_table is None else nested_table
        absmax = dequantize_dynamic(absmax, nested_absmax, nested_blocksize, steps.to(codes.device)) + nested_offset
    if quant_type != "int8":
        table = (levels.levels(quant_type) if table is None else table).to(codes.device)
    per_byte = 1 if quant_type == "int8" else 2
    flat, stop, base = out.view(-1), start + out.numel(), start // blocksize * blocksize
    for first, last in _block_ranges(stop - base, blocksize):
        first, last = first + base, last + base
        piece = codes.narrow(0, first // per_byte, -(-last // per_byte) - first // per_byte)
        constants = absmax.narrow(0, first // blocksize, -(-last // blocksize) - first // blocksize)
        values = _decode(piece, constants, quant_type, blocksize, table)
        skip = max(start - first, 0)
        count = last - first - skip
        torch.mul(values.narrow(0, skip, count), 1, out=flat.narrow(0, first + skip - start, count))


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, quant_type: str, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """A fresh tensor of `shape` and `dtype` with the values of `codes`."""
    out = torch.empty(tuple(shape), dtype=dtype, device=codes.device)
    dequantize_blockwise_out(codes, absmax, quant_type, blocksize, out)
    return out
