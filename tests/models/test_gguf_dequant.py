"""Our dequantization against the gguf package's, bit for bit, on random bytes and on quantized numbers."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from halfbyte.models.gguf_dequant import dequantize_into

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


def ours(blocks: np.ndarray, kind: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    out = torch.empty(blocks.shape[0] * gguf.GGML_QUANT_SIZES[Kind[kind]][0], dtype=dtype)
    dequantize_into(torch.from_numpy(blocks), kind, out)
    return out


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("count", [1, 7, 4099])
def test_random_blocks(kind: str, count: int) -> None:
    """Every bit pattern of the integers; the half-precision scales are kept finite, as any real file's are."""
    generator = np.random.default_rng(count)
    blocks = generator.integers(0, 256, (count, gguf.GGML_QUANT_SIZES[Kind[kind]][1]), dtype=np.uint8)
    for scale in _scales(kind):
        halves = (generator.standard_normal(count) * 0.1).astype(np.float16)
        blocks[:, scale : scale + 2] = halves.view(np.uint8).reshape(count, 2)
    if kind == "MXFP4":
        blocks[:, 0] = generator.integers(100, 150, count)  # a power of two, not a half
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, Kind[kind])).flatten()
    assert torch.equal(ours(blocks, kind), expected.bfloat16())
    assert torch.equal(ours(blocks, kind, torch.float32), expected)


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


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_values_come_back_near(kind: str) -> None:
    values = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    packed = gguf.quants.quantize(values, Kind[kind]).reshape(-1, gguf.GGML_QUANT_SIZES[Kind[kind]][1])
    found = ours(packed, kind, torch.float32).view(8, 64)
    assert (found - torch.from_numpy(values)).abs().max() < {"4": 0.4, "5": 0.2, "8": 0.02}[kind[1]]


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    ours(np.zeros((4, 34), np.uint8), "Q8_0")
    assert torch.get_num_threads() == before


def test_nothing_to_do() -> None:
    assert ours(np.zeros((0, 144), np.uint8), "Q4_K").numel() == 0
