"""bitsandbytes' cases of block-wise 8-bit quantizing: test_functional.py and test_ops.py.

Only halfbyte's own operators: its backend for bitsandbytes leaves the 8-bit ones alone.
"""

import pytest
import torch

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.ops import levels
from tests.conformance.routes import DTYPES, SHORT, Reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
blocksizes = pytest.mark.parametrize("blocksize", ops.BLOCKSIZES)
signed_or_not = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def round_trip(x: torch.Tensor, blocksize: int, signed: bool = True) -> torch.Tensor:
    return ops.dequantize_dynamic(*ops.quantize_dynamic(x, blocksize, signed), blocksize, signed).view(x.shape)


@dtypes
@blocksizes
@signed_or_not
def test_errors_of_dynamic_codes(dtype: torch.dtype, blocksize: int, signed: bool) -> None:
    """bitsandbytes' bounds are for blocks up to 256 (it tests no others on a CPU) and are held for all sizes here."""
    if signed:
        x = torch.randn(1024, 1024).to(dtype)
        error = (x.float() - round_trip(x, blocksize)).abs()
        assert float(error.mean()) < 0.011
        assert float((error / (x.float().abs() + 1e-8)).mean()) < 0.018
    x = torch.rand(1024, 1024).to(dtype)
    error = (x.float() - round_trip(x, blocksize, signed)).abs()
    relative = float((error / (x.float().abs() + 1e-8)).mean())
    assert float(error.mean()) < (0.0036 if signed else 0.0023)
    assert relative < (0.015 if signed else 0.012)


@dtypes
@blocksizes
@signed_or_not
def test_codes_equal_the_reference(reference: Reference, dtype: torch.dtype, blocksize: int, signed: bool) -> None:
    table = levels.dynamic_map(signed)
    for shape in ((1,), (7, 33), (64, 256), (3, 5000)):
        x = torch.randn(shape) if signed else torch.rand(shape)
        x = x.to(dtype)
        codes, absmax = ops.quantize_dynamic(x, blocksize, signed)
        expected, expected_absmax = reference.bnb.quantize_blockwise(x, table, blocksize)
        assert torch.equal(codes, expected.view(-1))
        assert torch.equal(absmax, expected_absmax)
        y = ops.dequantize_dynamic(codes, absmax, blocksize, signed)
        assert torch.equal(y, reference.bnb.dequantize_blockwise(codes, absmax, table, blocksize))


@dtypes
@blocksizes
def test_any_bytes_and_constants(reference: Reference, dtype: torch.dtype, blocksize: int) -> None:
    codes = torch.randint(0, 256, (1024 * 64,), dtype=torch.uint8)
    absmax = torch.randn(-(-codes.numel() // blocksize))
    table = levels.dynamic_map().clone()
    expected = reference.bnb.dequantize_blockwise(codes, absmax, table, blocksize)
    assert torch.equal(ops.dequantize_dynamic(codes, absmax, blocksize, table=table), expected)
    torch.library.opcheck(torch.ops.halfbyte.dequantize_dynamic.default, (codes, absmax, blocksize, table))
    torch.library.opcheck(torch.ops.halfbyte.quantize_dynamic.default, (torch.randn(64, 64).to(dtype), blocksize))


@blocksizes
def test_bitsandbytes_own_kernel_is_near(blocksize: int) -> None:
    """Its kernel for CPUs looks values up in 65,536 bins: few codes differ from the nearest ones.

    They differ by one, but for values of less than two bins of the constant, where the map has its finest steps.
    """
    import bitsandbytes

    x = torch.randn(256, 1024)
    codes, absmax = ops.quantize_dynamic(x, blocksize)
    theirs, state = bitsandbytes.functional.quantize_blockwise(x, blocksize=blocksize)
    assert torch.equal(absmax, state.absmax)
    away = (codes.int() - theirs.view(-1).int()).abs()
    tiny = levels.dynamic_map()[codes.int()].abs() < 2 * 2 / 65536
    assert int(away[~tiny].max()) <= 1
    assert float((away > 0).float().mean()) < 0.005
    ours = (x - round_trip(x, blocksize)).abs().mean()
    error = (x - bitsandbytes.functional.dequantize_blockwise(theirs, state)).abs().mean()
    assert float(ours) <= float(error) * (1 + 1e-6)


@dtypes
@pytest.mark.parametrize("blocksize", [64, 128, 256])
def test_input_that_is_not_contiguous(dtype: torch.dtype, blocksize: int) -> None:
    whole = torch.randn(3, 4, 6, 256).to(dtype)
    for x in (whole[:, ::2], whole.transpose(0, 2), whole[..., :200]):
        found, expected = ops.quantize_dynamic(x, blocksize), ops.quantize_dynamic(x.contiguous(), blocksize)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    codes, absmax = ops.quantize_dynamic(torch.randn(64, 64), blocksize)
    padded = torch.zeros(64 * 64, 2, dtype=torch.uint8)
    padded[:, 0] = codes
    with pytest.raises(ValueError, match="contiguous"):  # bitsandbytes copies; here the caller says so
        ops.dequantize_dynamic(padded[:, 0], absmax, blocksize)


@pytest.mark.parametrize("blocksize", [4096])
def test_two_million_values(blocksize: int) -> None:
    x = torch.randn(128, 128, 128)
    assert float((x - round_trip(x, blocksize)).abs().mean()) < 0.011


@signed_or_not
def test_corners(signed: bool) -> None:
    none, constants = ops.quantize_dynamic(torch.empty(0), 256, signed)
    assert none.numel() == constants.numel() == 0
    zeros = torch.zeros(300)
    assert torch.equal(round_trip(zeros, 256, signed), zeros)
    ends = torch.tensor([0.0, 1.0, 0.5]) * 3
    assert torch.equal(round_trip(ends, 256, signed)[:2], ends[:2])
    for value in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="the value at"):
            ops.quantize_dynamic(torch.tensor([1.0, value]), 256, signed)
    # A file's own levels, whatever they are (bitsandbytes' linear and fp8 maps): decoding takes any table.
    table = torch.linspace(-1, 1, 256)
    assert torch.equal(
        ops.dequantize_dynamic(torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([2.0]), table=table),
        torch.tensor([-2.0, 2.0]),
    )
