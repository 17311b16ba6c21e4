"""Ideas of torchao's test_nf4_tensor.py: our NF4 reconstructs and multiplies no worse than bitsandbytes'.

torchao itself is no judge of bits: its codebook is rounded to four decimals, its constants are linear int8.
"""

import copy
import io
from collections.abc import Iterator

import pytest
import torch

from halfbyte.quant import QuantOptions, quantize
from tests.conformance.routes import DTYPES, SHORT, Direct, Registered

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=SHORT.get)
NF4 = QuantOptions(double_quant=False)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """bitsandbytes compiles its reference in PyTorch at the first call: seconds, and a compiler's own rounding."""
    with torch.compiler.set_stance("force_eager"):
        yield


@dtypes
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_reconstruction_against_bitsandbytes(dtype: torch.dtype, nested: bool) -> None:
    """Its own quantizing and dequantizing, our backend off; 512 wide, where its kernel is right."""
    import bitsandbytes

    w = torch.randn(512, 512).to(dtype)
    codes, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    theirs = bitsandbytes.functional.dequantize_4bit(codes, state)
    ours = quantize(w, QuantOptions(double_quant=nested)).dequantize(dtype)
    # The same codes and nearly the same constants: what is left is the kernels' rounding, and nested a code of 256.
    assert float((ours - theirs).abs().max()) <= (0.05 if nested else 0.02)
    assert float((ours - w).abs().max()) < 1
    assert abs(float((ours - w).abs().max()) - float((theirs - w).abs().max())) < 0.02
    errors = [float((y.float() - w.float()).abs().mean()) for y in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=2e-3)


@dtypes
def test_a_product_is_no_worse_than_bitsandbytes(dtype: torch.dtype) -> None:
    import bitsandbytes

    w, x = torch.randn(512, 512).to(dtype), torch.randn(2, 512).to(dtype)
    exact = x.double() @ w.double().t()
    codes, state = bitsandbytes.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
    theirs = bitsandbytes.matmul_4bit(x, codes, state)
    ours = Direct().linear(x, Direct().quantize(w, "nf4"))
    errors = [float((y.double() - exact).abs().mean()) for y in (ours, theirs)]
    assert errors[0] < 0.5 * 512
    assert errors[0] <= 1.01 * errors[1]


@dtypes
def test_types_of_results_and_gradients(dtype: torch.dtype) -> None:
    x = torch.randn(2, 512).to(dtype).requires_grad_()
    held = Direct().quantize(torch.randn(512, 512).to(dtype), "nf4")
    y = Direct().linear(x, held)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype
    for other in DTYPES:
        assert Direct().weight(held).dequantize(other).dtype == other


@dtypes
def test_state_dicts_and_copies(dtype: torch.dtype) -> None:
    weight, other = (quantize(torch.rand(64, 64).to(dtype), NF4) for _ in range(2))
    file = io.BytesIO()
    torch.save(weight.state_dict(), file)
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for same in (other, copy.deepcopy(weight)):
        assert torch.equal(same.dequantize(dtype), weight.dequantize(dtype))
    different = quantize(torch.rand(64, 64), NF4.model_copy(update={"blocksize": 32}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        different.load_state_dict(weight.state_dict())


@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (300, 4096)])
def test_pieces_do_not_show(registered: Registered, shape: tuple[int, int]) -> None:
    """A matrix row by row, where rows are whole blocks or lie across them, and as a whole."""
    w = torch.randn(shape)
    weight = quantize(w, NF4)
    whole = weight.dequantize(torch.float32)
    rows = [weight.dequantize(torch.float32, rows=slice(i, i + 1)) for i in range(shape[0])]
    assert torch.equal(torch.cat(rows), whole)
    held = registered.quantize(w, "nf4")
    assert torch.equal(registered.dequantize(held), whole)
