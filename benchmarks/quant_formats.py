"""The 4-bit formats that `quant_table.py` compares: quantizing a matrix, its error, and the bytes of a file of it.

Four are this package's own. `e2m1` is the float of 1 sign, 2 exponent and 1 mantissa bit as the OCP's MX formats have
it (0, 0.5, 1, 1.5, 2, 3, 4, 6), which bitsandbytes' FP4 is not: its smallest step is 0.0052 of the largest, not 0.083.
Any table of 16 levels can be added so: a block's constant is its largest magnitude, a value takes the nearest level.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from halfbyte.ops import levels
from halfbyte.quant import BlockWeight, QuantOptions, quantize

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Format:
    """quant_type: what `halfbyte.ops` quantizes to; None: to the nearest of `table`, 16 rising levels in [-1, 1]."""

    title: str
    quant_type: str | None
    double_quant: bool = False
    table: tuple[float, ...] = ()


FORMATS = {
    "nf4": Format("NF4", "nf4"),
    "nf4+dq": Format("NF4+DQ", "nf4", double_quant=True),
    "fp4": Format("FP4 (bitsandbytes')", "fp4"),
    "e2m1": Format("E2M1", None, table=tuple(sorted(sign * x / 6 for sign in (1, -1) for x in _E2M1))),
    "int4": Format("INT4", "int4"),
}


def quantize_as(tensor: Tensor, chosen: Format, blocksize: int) -> BlockWeight:
    """A matrix in a format; its `dtype` is the tensor's."""
    if chosen.quant_type is not None:
        options = {"quant_type": chosen.quant_type, "blocksize": blocksize, "double_quant": chosen.double_quant}
        return quantize(tensor, QuantOptions.model_validate(options))
    table = torch.tensor(chosen.table)
    codes, absmax = nearest_levels(tensor, table, blocksize)
    shape = (tensor.shape[0], tensor.shape[1])
    return BlockWeight(codes, absmax, "fp4", blocksize, shape, dtype=tensor.dtype, table=table)


def nearest_levels(tensor: Tensor, table: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """(codes, two a byte; float32 constants) of a tensor in flat blocks, each value at the nearest of 16 rising levels.

    A code is a level's rank. As `halfbyte.ops` scales and rounds, but that zeros fill the last block up.
    """
    middles = ((table[:-1] + table[1:]) / 2).tolist()
    codes, constants = [], []
    for part in tensor.detach().reshape(-1).split((1 << 16) // blocksize * blocksize):
        blocks = torch.nn.functional.pad(part.float(), (0, -part.numel() % blocksize)).view(-1, blocksize)
        absmax = blocks.abs().amax(dim=1)
        scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
        ranks = torch.zeros(scaled.shape, dtype=torch.uint8)
        for middle in middles:  # 15 comparisons are a quarter of the time of a search
            ranks += (scaled > middle).view(torch.uint8)
        pairs = ranks.view(-1, 2)
        codes.append((pairs[:, 0] << 4 | pairs[:, 1])[: (part.numel() + 1) // 2])
        constants.append(absmax)
    return torch.cat(codes), torch.cat(constants)


def normal_error(chosen: Format, blocksize: int, side: int = 4096) -> float:
    """Mean |error| over side² standard normal values."""
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    return float((quantize_as(x, chosen, blocksize).dequantize(torch.float32) - x).abs().mean())


def stored(weight: BlockWeight, name: str) -> dict[str, Tensor]:
    """The weight's tensors in bitsandbytes' layout. INT4, which it lacks, goes by its levels in `quant_map`."""
    if weight.quant_type == "int4":
        table = levels.levels("int4")
        weight = BlockWeight(
            weight.codes,
            weight.absmax,
            "nf4",
            weight.blocksize,
            weight.shape,
            dtype=weight.dtype,
            nested_absmax=weight.nested_absmax,
            nested_offset=weight.nested_offset,
            table=table,
        )
    return weight.to_bnb(name)


@dataclass(frozen=True)
class Bits:
    """Bits a parameter of quantized matrices, read from the file that holds them and nothing else.

    values     codes and constants: what the arithmetic of the format says
    tensors    with the levels and the quant_state that every matrix carries
    file       with the file's header: all of it
    metadata   bytes a matrix beyond `values`
    """

    values: float
    tensors: float
    file: float
    metadata: float
    file_bytes: int


def count(path: Path, names: Iterable[str], parameters: int) -> Bits:
    """`path`: a safetensors file of the matrices `names`, `parameters` values in all."""
    sizes = tensor_bytes(path)
    kept = list(names)
    values = sum(sizes.get(name + part, 0) for name in kept for part in ("", ".absmax", ".nested_absmax"))
    whole = path.stat().st_size
    return Bits(
        8 * values / parameters,
        8 * sum(sizes.values()) / parameters,
        8 * whole / parameters,
        (whole - values) / len(kept),
        whole,
    )


def tensor_bytes(path: Path) -> dict[str, int]:
    """Bytes of every tensor, as the file's own header has them."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: entry["data_offsets"][1] - entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """A safetensors file; its size in bytes."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    return path.stat().st_size


def relative_error(weight: BlockWeight, tensor: Tensor) -> tuple[float, float]:
    """(sum of squared errors, sum of squares) of a matrix, for a norm over many."""
    error = weight.dequantize(torch.float32).sub_(tensor)
    return float(error.square_().sum(dtype=torch.float64)), float(tensor.float().square_().sum(dtype=torch.float64))


def norm_ratio(sums: Iterable[tuple[float, float]]) -> float:
    pairs = list(sums)
    return math.sqrt(sum(error for error, _ in pairs) / sum(square for _, square in pairs))
