"""Random blocks of GGUF's types, and weights made of them."""

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from halfbyte.quant import GgufWeight


def random_blocks(kind: str, count: int, seed: int = 0, scale: float = 0.1) -> np.ndarray:
    """uint8 [count, bytes]: every bit pattern of the integers, half-precision scales of about `scale`."""
    generator = np.random.default_rng(seed + count)
    blocks = generator.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[Kind[kind]][1]), dtype=np.uint8)
    for at in _scales(kind):
        halves = (generator.standard_normal(count) * scale).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8).reshape(count, 2)
    if kind == "MXFP4":
        blocks[:, 0] = generator.integers(100, 150, count)  # a power of two, not a half
    return blocks


def _scales(kind: str) -> tuple[int, ...]:
    """Offsets of the half-precision numbers in a block."""
    size = gguf.GGML_QUANT_SIZES[Kind[kind]][1]
    return {
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
        "Q6_K": (size - 2,),
        "Q2_K": (size - 4, size - 2),
        "Q3_K": (size - 2,),
        "MXFP4": (),
    }.get(kind, (0,))


def random_weight(kind: str, rows: int, columns: int, head_rows: int = 0, seed: int = 0) -> GgufWeight:
    values, _ = gguf.GGML_QUANT_SIZES[Kind[kind]]
    spread = {"4": 8, "5": 16, "8": 128, "6": 1000}[kind[1]] * (64 if kind.endswith("_K") else 1)
    blocks = random_blocks(kind, rows * columns // values, seed, scale=1 / spread / columns**0.5)
    return GgufWeight(torch.from_numpy(blocks.reshape(-1)), kind, (rows, columns), head_rows)
