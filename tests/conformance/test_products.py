"""bitsandbytes' cases of products with a 4-bit weight: of test_autograd.py, test_ops.py and test_functional.py.

The exact answer is the product with the reference's dequantized weight in float64. An implementation may differ from it
by the rounding of its sums and of its result, and by nothing else.
"""

import pytest
import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.quant import QuantOptions, quantize
from tests.conformance.routes import DTYPES, KINDS, SHORT, Direct, Reference, Registered

Route = Direct | Registered

# Relative to the sum of magnitudes |a| |w|: what rounding the inputs' products and the result in a type can do.
# bfloat16: 8 bits; float16: 11; float32: 24, and sums over at most 4,096 terms in any order.
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 2**-18}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
kinds = pytest.mark.parametrize("kind", KINDS)
nested_or_not = pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
biased_or_not = pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])


def assert_product(found: Tensor, a: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """found = a w^T + bias within rounding; w is the exact weight."""
    exact = a.double() @ w.double().t()
    scale = a.double().abs() @ w.double().abs().t()
    if bias is not None:
        exact, scale = exact + bias.double(), scale + bias.double().abs()
    assert found.shape == exact.shape
    assert found.dtype == a.dtype
    error = (found.double() - exact).abs() / scale.clamp(min=1e-30)
    assert error.numel() == 0 or float(error.max()) < ROUNDING[a.dtype]


@dtypes
@kinds
@nested_or_not
@pytest.mark.parametrize("rows", [64, 0])
@pytest.mark.parametrize(
    ("biased", "wanted"),
    [(False, ""), (False, "a"), (True, ""), (True, "a"), (True, "bias"), (True, "a+bias")],
    ids=["", "a", "b-", "b-a", "b-bias", "b-both"],
)
def test_product_and_gradients(
    route: Route, reference: Reference, dtype: torch.dtype, kind: str, nested: bool, biased: bool, rows: int,
    wanted: str,
) -> None:  # fmt: skip
    n, k = 96, 64
    a = torch.randn(rows, k).to(dtype).requires_grad_("a" in wanted)
    w = torch.nn.init.xavier_uniform_(torch.empty(n, k)).to(dtype)
    bias = torch.nn.Parameter(torch.randn(n).to(dtype), "bias" in wanted) if biased else None
    held = route.quantize(w, kind, nested=nested)
    dense = reference.dequantize(held)
    y = route.linear(a, held, bias)
    if rows or biased is False:
        assert_product(y.detach(), a.detach(), dense, None if bias is None else bias.detach())
    # bitsandbytes' own bound, against the weight before quantization.
    plain = a.detach().float() @ w.float().t() + (0 if bias is None else bias.detach().float())
    assert rows == 0 or float((y.detach().float() - plain).abs().mean()) < 0.115
    if not wanted:
        assert not y.requires_grad
        return
    dy = torch.randn(rows, n).to(dtype)
    y.backward(dy)
    if "a" in wanted:
        assert a.grad is not None
        assert a.grad.dtype == dtype
        assert_product(a.grad, dy, dense.t())
    if bias is not None and "bias" in wanted:
        assert bias.grad is not None
        torch.testing.assert_close(bias.grad, dy.double().sum(0).to(dtype), rtol=2e-2, atol=2e-2)


@dtypes
@kinds
@nested_or_not
@pytest.mark.parametrize("k", [32, 80, 96])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
def test_rows_that_are_no_whole_number_of_blocks(
    route: Route, reference: Reference, dtype: torch.dtype, kind: str, nested: bool, k: int, blocksize: int
) -> None:
    """bitsandbytes 0.50.2's own kernel is wrong for these widths on a CPU with AVX-512, by up to 2."""
    w = torch.randn(48, k).to(dtype)
    held = route.quantize(w, kind, blocksize, nested)
    dense = reference.dequantize(held)
    assert torch.equal(route.dequantize(held), dense)
    a = torch.randn(5, k).to(dtype).requires_grad_()
    y = route.linear(a, held)
    assert_product(y.detach(), a.detach(), dense)
    dy = torch.randn(5, 48).to(dtype)
    y.backward(dy)
    assert a.grad is not None
    assert_product(a.grad, dy, dense.t())


@dtypes
@kinds
@nested_or_not
@biased_or_not
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize(("m", "n"), [(1, 256), (7, 1024), (9, 640), (40, 512)])
def test_tall_and_wide(
    route: Route, reference: Reference, dtype: torch.dtype, kind: str, nested: bool, biased: bool, blocksize: int,
    m: int, n: int,
) -> None:  # fmt: skip
    k = 128
    w = (torch.randn(n, k) / k**0.5).to(dtype)
    a = torch.randn(1, m, k).to(dtype)
    bias = torch.randn(n).to(dtype) if biased else None
    held = route.quantize(w, kind, blocksize, nested)
    y = route.linear(a, held, bias)
    assert y.shape == (1, m, n)
    assert_product(y[0], a[0], reference.dequantize(held), bias)
    plain = a.float() @ w.float().t() + (0 if bias is None else bias.float())
    bound = 0.115 if kind == "nf4" or blocksize <= 64 else 0.13 if blocksize <= 256 else 0.16
    assert float((y.float() - plain).abs().mean()) < bound


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(40, 2048, 128), (9, 5120, 128), (80, 8192, 128), (7, 14336, 128), (4, 28672, 128), (48, 8192, 512)],
)
@dtypes
@nested_or_not
def test_large_products(
    route: Route, reference: Reference, dtype: torch.dtype, nested: bool, m: int, n: int, k: int
) -> None:
    """The shapes that bitsandbytes keeps for GPUs and skips on CPUs."""
    w, a = (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(m, k).to(dtype)
    held = route.quantize(w, "nf4", 64, nested)
    assert_product(route.linear(a, held), a, reference.dequantize(held))


@dtypes
@kinds
@pytest.mark.parametrize("leading", [(), (1,), (2, 2), (3, 1, 2), (0,), (2, 0)])
def test_leading_dimensions(
    route: Route, reference: Reference, dtype: torch.dtype, kind: str, leading: tuple[int, ...]
) -> None:
    held = route.quantize(torch.randn(64, 64).to(dtype), kind)
    a = torch.randn(*leading, 64).to(dtype)
    y = route.linear(a, held)
    assert y.shape == (*leading, 64)
    assert_product(y.reshape(-1, 64), a.reshape(-1, 64), reference.dequantize(held))


@dtypes
@kinds
def test_a_product_with_the_identity_is_the_input(route: Route, dtype: torch.dtype, kind: str) -> None:
    # 0 and 1 are levels of both formats, so nothing is lost, and every product is with one value and zeros.
    for k in (576, 1280):
        held = route.quantize(torch.eye(k).to(dtype), kind)
        a = (torch.randn(1, k) / 10).to(dtype)
        assert torch.equal(route.linear(a, held), a)
        a.requires_grad_()
        y = route.linear(a, held)
        y.backward(a.detach())
        assert torch.equal(y, a)
        assert a.grad is not None
        assert torch.equal(a.grad, a.detach())


@kinds
def test_a_weight_stored_the_other_way_round(registered: Registered, reference: Reference, kind: str) -> None:
    """[K, N]: deprecated in bitsandbytes, and not ours to change. halfbyte's own weights are [out, in] always."""
    a, w = torch.randn(4, 128), torch.randn(256, 128) / 128**0.5
    held = registered.quantize(w, kind)
    codes: Tensor = held.codes.t()
    assert torch.equal(registered.bnb.matmul_4bit(a, codes, held.state), registered.linear(a, held))
    turned = registered.quantize(w.t().contiguous(), kind)
    with pytest.warns(DeprecationWarning, match="Re-quantize"):
        y = registered.linear(a, turned)
    assert_product(y, a, reference.dequantize(turned).t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=SHORT.get)
@pytest.mark.parametrize("offset", [torch.float16, torch.bfloat16], ids=SHORT.get)
def test_an_offset_in_16_bits_is_read_as_float32(
    registered: Registered, dtype: torch.dtype, offset: torch.dtype
) -> None:
    held = registered.quantize(torch.randn(64, 64).to(dtype), "nf4", nested=True)
    a, state = torch.randn(4, 64).to(dtype), held.state

    def product(value: Tensor) -> Tensor:
        y: Tensor = torch.ops.bitsandbytes.gemm_4bit(
            a, held.codes, [64, 64], state.state2.absmax, 64, "nf4",
            absmax_8bit=state.absmax, absmax_code=state.state2.code, absmax_offset=value,
        )  # fmt: skip
        return y

    rounded = state.offset.to(offset)
    assert torch.equal(product(rounded), product(rounded.float()))


def test_only_matrices_are_weights() -> None:
    with pytest.raises(UsageError, match="only matrices"):
        quantize(torch.randn(2, 4, 64), QuantOptions())
