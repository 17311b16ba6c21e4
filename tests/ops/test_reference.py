"""The specification against bitsandbytes' own reference, bit for bit, and against arithmetic in float64."""

import pytest
import torch

from halfbyte.errors import UsageError
from halfbyte.ops import BLOCKSIZES, levels, reference

SHAPES = [(64,), (1, 1), (3, 7), (5, 96), (17, 80), (33, 32), (1000, 64), (40, 300), (257, 129)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal values of magnitudes from 1e-4 to 1e3, with zeros in a row and, where there is room, whole zero blocks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 10 ** (torch.rand(shape, generator=generator) * 7 - 4)
    if x.numel() > 9000:
        x.view(-1)[200:9000] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits_equal_bitsandbytes(bnb, quant_type, dtype):
    for shape in SHAPES:
        x = values(shape, dtype)
        for blocksize in BLOCKSIZES:
            codes, absmax = reference.quantize_blockwise(x, quant_type, blocksize)
            their_codes, their_absmax = bnb.quantize_4bit(x, quant_type, blocksize)
            assert torch.equal(codes, their_codes), (shape, blocksize)
            assert torch.equal(absmax, their_absmax), (shape, blocksize)
            for out in DTYPES:
                ours = reference.dequantize_blockwise(codes, absmax, quant_type, blocksize, shape, out)
                theirs = bnb.dequantize_4bit(codes, absmax, quant_type, blocksize, shape, out)
                assert torch.equal(ours, theirs), (shape, blocksize, out)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_codes_equal_bitsandbytes(bnb, signed):
    table = levels.dynamic_map(signed)
    for shape in SHAPES:
        x = values(shape, torch.float32)
        x = x if signed else x.abs()
        for blocksize in (32, 256, 4096):
            codes, absmax = reference.quantize_dynamic(x, blocksize, signed)
            their_codes, their_absmax = bnb.quantize_blockwise(x, table, blocksize)
            assert torch.equal(codes, their_codes)
            assert torch.equal(absmax, their_absmax)
            ours = reference.dequantize_dynamic(codes, absmax, blocksize, table)
            assert torch.equal(ours, bnb.dequantize_blockwise(codes, absmax, table, blocksize))


@pytest.mark.parametrize("quant_type", levels.FOUR_BIT)
def test_four_bit_codes_are_the_nearest_levels(quant_type):
    x = values((50, 64), torch.float32).double()
    codes, absmax = reference.quantize_blockwise(x.float(), quant_type, 64)
    assert torch.equal(absmax.double(), x.abs().amax(1))
    table = levels.levels(quant_type).double()
    distance = (x[:, :, None] / absmax[:, None, None] - table).abs()
    chosen = torch.stack([codes >> 4, codes & 15], 1).view(50, 64).long()
    excess = distance.gather(2, chosen[..., None])[..., 0] - distance.amin(2)
    assert excess.max() < 1e-6


def test_int8_is_the_nearest_of_255_steps():
    x = values((50, 128), torch.float32)
    codes, absmax = reference.quantize_blockwise(x, "int8", 128)
    exact = x.double() / (absmax.double()[:, None] / 127)
    assert (codes.view(50, 128).double() - 128 - exact).abs().max() <= 0.5 + 1e-4
    assert codes.min() >= 1
    back = reference.dequantize_blockwise(codes, absmax, "int8", 128, x.shape, torch.float32)
    exact_back = (codes.view(50, 128).double() - 128) * absmax.double()[:, None] / 127
    torch.testing.assert_close(back.double(), exact_back, rtol=2e-7, atol=0)


# FACTS of bitsandbytes' own tests: mean |error| on N(0, 1). INT8: uniform steps, a quarter step on average.
@pytest.mark.parametrize(
    ("quant_type", "expected"),
    [("nf4", 0.0728), ("fp4", 0.0966), ("e2m1", 0.0803), ("int4", 0.0914), ("int8", 0.00505)],
)
def test_error_on_normal_weights(quant_type, expected):
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    codes, absmax = reference.quantize_blockwise(x, quant_type, 64)
    back = reference.dequantize_blockwise(codes, absmax, quant_type, 64, x.shape, torch.float32)
    assert (x - back).abs().mean().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("quant_type", levels.QUANT_TYPES)
def test_zeros_stay_zero_and_keep_an_absmax_of_zero(quant_type):
    x = torch.zeros(3, 64)
    codes, absmax = reference.quantize_blockwise(x, quant_type, 64)
    assert torch.equal(absmax, torch.zeros(3))
    if quant_type == "nf4":
        assert set(codes.tolist()) == {0x77}
    back = reference.dequantize_blockwise(codes, absmax, quant_type, 64, x.shape, torch.float32)
    assert torch.equal(back, x)


@pytest.mark.parametrize("quant_type", levels.QUANT_TYPES)
def test_empty_tensor(quant_type):
    codes, absmax = reference.quantize_blockwise(torch.empty(0, 7), quant_type, 64)
    assert codes.shape == absmax.shape == (0,)
    assert reference.dequantize_blockwise(codes, absmax, quant_type, 64, (0, 7), torch.bfloat16).shape == (0, 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quant_type", levels.QUANT_TYPES)
def test_non_finite_weights_are_named(quant_type, bad):
    x = torch.randn(5, 100)
    x[3, 41] = bad
    with pytest.raises(UsageError, match=r"\[5, 100\]: the value at \[3, 41\] is "):
        reference.quantize_blockwise(x, quant_type, 64)
    with pytest.raises(UsageError, match=r"\[3, 41\]"):
        reference.quantize_dynamic(x, 64)


def test_chunks_do_not_show(monkeypatch):
    x = values((70, 129), torch.float32)
    whole = {q: reference.quantize_blockwise(x, q, 64) for q in levels.QUANT_TYPES}
    monkeypatch.setattr(reference, "_CHUNK", 256)
    for quant_type, (codes, absmax) in whole.items():
        again = reference.quantize_blockwise(x, quant_type, 64)
        assert torch.equal(codes, again[0])
        assert torch.equal(absmax, again[1])
        back = reference.dequantize_blockwise(codes, absmax, quant_type, 64, x.shape, torch.float32).view(-1)
        for start, count in ((0, 1), (1, 500), (63, 65), (128, 1024), (777, 8253)):
            part = torch.empty(count)
            reference.dequantize_blockwise_out(codes, absmax, quant_type, 64, part, start)
            assert torch.equal(part, back[start : start + count])
