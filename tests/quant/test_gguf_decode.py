"""Our dequantization against the gguf package's, bit for bit, on random bytes and on quantized numbers."""

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from halfbyte.ops import native
from halfbyte.quant.gguf_decode import dequantize_into
from tests.ops.conftest import available
from tests.quant.gguf_blocks import random_blocks

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


def ours(blocks: np.ndarray, kind: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    out = torch.empty(blocks.shape[0] * gguf.GGML_QUANT_SIZES[Kind[kind]][0], dtype=dtype)
    dequantize_into(torch.from_numpy(blocks), kind, out)
    return out


@pytest.fixture(params=["torch", *(isa for isa in available() if isa != "reference")])
def decoder(request: pytest.FixtureRequest) -> Iterator[str]:
    """By torch, and by every instruction set of this machine."""
    native.use("reference" if request.param == "torch" else request.param)
    yield request.param
    native.use(None)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("count", [1, 7, 4099])
def test_random_blocks(kind: str, count: int) -> None:
    """Every bit pattern of the integers; the half-precision scales are kept finite, as any real file's are."""
    blocks = random_blocks(kind, count)
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, Kind[kind])).flatten()
    assert torch.equal(ours(blocks, kind), expected.bfloat16())
    assert torch.equal(ours(blocks, kind, torch.float32), expected)


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
