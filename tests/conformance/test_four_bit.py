"""bitsandbytes' cases of 4-bit quantizing: test_ops.py, test_functional.py, test_linear4bit.py's shards.

"Equal" is bit for bit, with its reference in PyTorch run eagerly.
"""

import itertools
from typing import Any

import pytest
import torch

from halfbyte import ops
from halfbyte.errors import UsageError
from tests.conformance.routes import DTYPES, KINDS, SHORT, Direct, Quantized, Reference, Registered

Route = Direct | Registered
SHAPES = [(1, 1), (5,), (3, 32), (7, 33), (5, 96), (2, 3, 40), (64, 256), (9, 4096)]

# Mean |error| and mean relative error of N(0, 1), with their standard deviations over samples of 1024 x 1024: figures
# of bitsandbytes' test_4bit_quant, measured there on a GPU.
NORMAL = {
    "nf4": {
        32: (0.067746, 0.000069, 0.189726, 0.000304),
        64: (0.072798, 0.000074, 0.203339, 0.000340),
        128: (0.076831, 0.000091, 0.215237, 0.000391),
        256: (0.080337, 0.000102, 0.226105, 0.000398),
        512: (0.083547, 0.000143, 0.236079, 0.000544),
        1024: (0.086610, 0.000187, 0.245370, 0.000600),
        2048: (0.089592, 0.000251, 0.254163, 0.000747),
        4096: (0.092547, 0.000360, 0.262473, 0.000999),
    },
    "fp4": {
        32: (0.088925, 0.000091, 0.242443, 0.000330),
        64: (0.096543, 0.000111, 0.260125, 0.000379),
        128: (0.102969, 0.000134, 0.275817, 0.000433),
        256: (0.108684, 0.000182, 0.289831, 0.000497),
        512: (0.114115, 0.000234, 0.302881, 0.000583),
        1024: (0.119333, 0.000320, 0.315000, 0.000757),
        2048: (0.124556, 0.000455, 0.326607, 0.000955),
        4096: (0.129536, 0.000612, 0.337169, 0.001239),
    },
}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
kinds = pytest.mark.parametrize("kind", KINDS)
blocksizes = pytest.mark.parametrize("blocksize", ops.BLOCKSIZES)


def errors(x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    error = (x - y).abs().float()
    return float(error.mean()), float((error / (x.abs().float() + 1e-8)).mean())


@dtypes
@kinds
@blocksizes
def test_quantizing_equals_the_reference(
    route: Route, reference: Reference, dtype: torch.dtype, kind: str, blocksize: int
) -> None:
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        held = route.quantize(x, kind, blocksize)
        codes, absmax = reference.quantize(x, kind, blocksize)
        assert torch.equal(held.flat, codes), shape
        assert torch.equal(held.absmax, absmax), shape
        assert held.absmax.dtype == torch.float32
        assert torch.equal(route.dequantize(held), reference.dequantize(held)), shape


@dtypes
@kinds
@blocksizes
def test_error_on_normal_weights(route: Route, dtype: torch.dtype, kind: str, blocksize: int) -> None:
    x = torch.randn(1024, 1024).to(dtype)
    y = route.dequantize(route.quantize(x, kind, blocksize))
    assert y.dtype == dtype
    found = errors(x, y)
    mean, spread, relative_mean, relative_spread = NORMAL[kind][blocksize]
    # bitsandbytes tests the upper end only. A lower error than the format can have would be as wrong.
    assert abs(found[0] - mean) < 7 * spread
    assert abs(found[1] - relative_mean) < 7 * relative_spread


@kinds
@pytest.mark.parametrize("blocksize", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=SHORT.get)
def test_nested_constants_lose_little(route: Route, dtype: torch.dtype, kind: str, blocksize: int) -> None:
    x = torch.randn(512, 1024).to(dtype)
    flat = errors(x, route.dequantize(route.quantize(x, kind, blocksize)))
    nested = errors(x, route.dequantize(route.quantize(x, kind, blocksize, nested=True)))
    for absolute, relative in (flat, nested):
        assert absolute < 0.11
        assert relative < 0.28
    assert nested[0] == pytest.approx(flat[0], rel=0.01)


@kinds
@blocksizes
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
def test_nested_values_equal_the_reference(
    route: Route, reference: Reference, kind: str, blocksize: int, nested: bool
) -> None:
    for shape, dtype in itertools.product([(3, 33), (64, 256), (300, 4096)], DTYPES):
        held = route.quantize(torch.randn(shape).to(dtype), kind, blocksize, nested)
        assert torch.equal(route.dequantize(held), reference.dequantize(held)), (shape, dtype)


@dtypes
@kinds
@blocksizes
def test_a_tail_that_is_no_block(route: Route, dtype: torch.dtype, kind: str, blocksize: int) -> None:
    for shape in ((7, blocksize - 1), (1, 1), (1, blocksize + 1), (3, 11)):
        x = torch.randn(shape).to(dtype)
        y = route.dequantize(route.quantize(x, kind, blocksize))
        assert y.shape == shape
        assert y.dtype == dtype
        assert torch.isfinite(y).all()
        # Half of the widest gap between levels, times the largest constant, and a rounding.
        gap = {"nf4": 0.1520, "fp4": 0.1667}[kind]
        assert (y - x).abs().max() <= gap * x.abs().max() * 1.01


@dtypes
@kinds
@blocksizes
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=SHORT.get)
def test_dequantizing_any_bytes(
    route: Route, reference: Reference, dtype: torch.dtype, kind: str, blocksize: int, storage: torch.dtype
) -> None:
    shape = (128, 128)
    codes = torch.randint(0, 256, (128 * 64,), dtype=torch.uint8)
    absmax = torch.randn(-(-128 * 128 // blocksize))  # negative ones too: a file decides, not the kernel
    held = Quantized(codes.view(storage), absmax, kind, blocksize, shape, dtype)
    if isinstance(route, Registered):
        stored = held.codes[:, None]
        y = torch.ops.bitsandbytes.dequantize_4bit(stored, absmax, blocksize, kind, shape, dtype)
    else:
        y = route.dequantize(held)
    assert y.shape == shape
    assert torch.equal(y, reference.dequantize(held))


@dtypes
@kinds
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
def test_the_storage_type_changes_no_byte(route: Route, dtype: torch.dtype, kind: str, nested: bool) -> None:
    x = torch.randn(96, 80).to(dtype)
    plain = route.quantize(x, kind, nested=nested)
    for storage in (torch.float16, torch.bfloat16, torch.float32):
        held = route.quantize(x, kind, nested=nested, storage=storage)
        assert held.codes.dtype == storage
        assert torch.equal(held.flat, plain.flat)
        assert torch.equal(route.dequantize(held), route.dequantize(plain))


@kinds
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32], ids=SHORT.get)
def test_shards_put_together_again(route: Route, kind: str, storage: torch.dtype) -> None:
    # What FSDP does to the stored bytes. Some of them are NaNs as floats, and must come back as they were.
    held = route.quantize(torch.randn(256, 128, dtype=torch.float16), kind, storage=storage)
    together = torch.cat(held.codes.flatten().chunk(4)).reshape(held.codes.shape)
    assert torch.equal(together.reshape(-1).view(torch.uint8), held.flat)
    again = Quantized(together, held.absmax, kind, 64, held.shape, held.dtype, state=held.state)
    assert torch.equal(route.dequantize(again), route.dequantize(held))


@dtypes
@kinds
@pytest.mark.parametrize("blocksize", [64, 128, 256])
def test_input_that_is_not_contiguous(route: Route, dtype: torch.dtype, kind: str, blocksize: int) -> None:
    whole = torch.randn(3, 4, 6, 256).to(dtype)
    for x in (whole[:, ::2], whole.transpose(1, 2), whole[..., 1:200]):
        assert not x.is_contiguous()
        ours, expected = route.quantize(x, kind, blocksize), route.quantize(x.contiguous(), kind, blocksize)
        assert torch.equal(ours.flat, expected.flat)
        assert torch.equal(ours.absmax, expected.absmax)
        assert torch.equal(route.dequantize(ours), route.dequantize(expected))


@dtypes
@kinds
def test_into_a_tensor_that_is_given(route: Route, dtype: torch.dtype, kind: str) -> None:
    for nested in (False, True):
        held = route.quantize(torch.randn(5, 96).to(dtype), kind, nested=nested)
        into = torch.full((5, 96), 7, dtype=dtype)
        route.dequantize(held, out=into)
        assert torch.equal(into, route.dequantize(held))


@kinds
def test_no_values_and_only_zeros(route: Route, reference: Reference, kind: str) -> None:
    none = route.quantize(torch.empty(0, 64), kind)
    assert none.flat.numel() == 0
    assert none.absmax.numel() == 0
    for shape in ((4, 64), (3, 33)):
        x = torch.zeros(shape)
        held = route.quantize(x, kind)
        assert torch.equal(held.flat, reference.quantize(x, kind, 64)[0])
        assert torch.equal(route.dequantize(held), x)


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(route: Route, reference: Reference, kind: str, value: float) -> None:
    x = torch.randn(6, 64)
    x[2, 3] = value
    if isinstance(route, Direct):
        with pytest.raises(UsageError, match=r"the value at \[2, 3\]"):
            route.quantize(x, kind)
        return
    # bitsandbytes does something with them, and whoever asks it gets that.
    held, (codes, absmax) = route.quantize(x, kind), reference.quantize(x, kind, 64)
    assert torch.equal(held.flat, codes)
    torch.testing.assert_close(held.absmax, absmax, rtol=0, atol=0, equal_nan=True)
    healthy = [row for row in range(6) if row != 2]
    clean, _ = reference.quantize(x[healthy], kind, 64)
    assert torch.equal(held.flat.view(6, -1)[healthy].flatten(), clean)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=SHORT.get)
def test_torch_checks_the_operators(route: Route, kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(64, 96).to(dtype)
    held = route.quantize(x, kind)
    both: Any = {"test_utils": ("test_schema", "test_faketensor")}
    if isinstance(route, Direct):
        names = torch.ops.halfbyte
        torch.library.opcheck(names.quantize_blockwise.default, (x, kind, 64))
        arguments = (held.flat, held.absmax, kind, 64)
        torch.library.opcheck(names.dequantize_blockwise.default, (*arguments, (64, 96), dtype))
        torch.library.opcheck(names.dequantize_blockwise_out.default, (*arguments, torch.empty_like(x)))
        return
    names = torch.ops.bitsandbytes
    torch.library.opcheck(names.quantize_4bit.default, (x, 64, kind, torch.uint8), **both)
    arguments = (held.codes, held.absmax, 64, kind, [64, 96], dtype)
    torch.library.opcheck(names.dequantize_4bit.default, arguments, **both)
    a = torch.randn(3, 96).to(dtype)
    torch.library.opcheck(names.gemm_4bit.default, (a, held.codes, [64, 96], held.absmax, 64, kind), **both)


@kinds
@dtypes
def test_every_size_around_a_block(route: Route, reference: Reference, kind: str, dtype: torch.dtype) -> None:
    """All of them: 0 to 3 blocks and one more value, every block size up to 256."""
    for blocksize in (32, 64, 128, 256):
        for count in range(1, 3 * blocksize + 2):
            x = torch.randn(count).to(dtype)
            held = route.quantize(x, kind, blocksize)
            codes, absmax = reference.quantize(x, kind, blocksize)
            assert torch.equal(held.flat, codes)
            assert torch.equal(held.absmax, absmax)
            assert torch.equal(route.dequantize(held), reference.dequantize(held))
