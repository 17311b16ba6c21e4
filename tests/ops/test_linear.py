"""The native linears against float64: every instruction set that multiplies, every storage, odd sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.ops import linear, native
from halfbyte.quant import DenseWeight, QuantOptions, Weight, quantize
from tests.ops.conftest import available
from tests.quant.gguf_blocks import random_weight
from tests.quant.group_codes import STORAGES, random_group_weight

CASES = [
    (isa, dtype)
    for isa in available()
    if isa != "reference"
    for dtype in (torch.bfloat16, torch.float32)
    if native.use(isa) and native.multiplies(dtype)
]
native.use(None)
TOLERANCE = {torch.bfloat16: 6e-3, torch.float32: 3e-6}
pytestmark = [
    pytest.mark.skipif(not CASES, reason="no instruction set of this machine multiplies natively"),
    pytest.mark.usefixtures("keep_choice"),
]


class Case:
    """Random segments, and their outputs and gradients in float64."""

    def __init__(self, tokens, features, outputs, ranks, dtype, storage, seed=0, bias=False, **quant):
        torch.manual_seed(seed)
        self.weights: list[Weight] = []
        self.segments = []
        for rows, rank in zip(outputs, ranks, strict=True):
            values = torch.randn(rows, features) / features**0.5
            if storage in ("nf4", "fp4", "e2m1", "int4", "int8"):
                weight: Weight = quantize(values.bfloat16(), QuantOptions(quant_type=storage, **quant))
            elif storage in linear.GGUF_TYPES:
                weight = random_weight(storage, rows, features, quant.get("head_rows", 0), seed)
            elif storage in STORAGES:
                weight = random_group_weight(storage, rows, features, seed)
            else:
                weight = DenseWeight(values.to(getattr(torch, storage)))
            self.weights.append(weight)
            view = weight.native_view()
            assert view is not None
            a, b = torch.randn(rank, features) / features**0.5, torch.randn(rows, rank)
            factors = (a, b) if rank else (None, None)
            self.segments.append(linear.LinearSegment(view, torch.randn(rows) if bias else None, *factors, 0.7))
        self.x = torch.randn(tokens, features).to(dtype)
        self.dy = torch.randn(tokens, sum(outputs)).to(dtype)
        self.dtype = dtype

    def exact(self, absolute: bool = False) -> list[Tensor]:
        """In float64; `absolute`: of all magnitudes, which bounds what roundings can do where sums cancel."""

        def of(tensor: Tensor) -> Tensor:
            return tensor.double().abs() if absolute else tensor.double()

        x = of(self.x).requires_grad_()
        outputs, factors = [], []
        for weight, segment in zip(self.weights, self.segments, strict=True):
            y = x @ of(weight.dequantize(self.dtype)).t()
            if segment.bias is not None:
                y = y + of(segment.bias)
            if segment.lora_A is not None:
                a, b = of(segment.lora_A).requires_grad_(), of(segment.lora_B).requires_grad_()
                factors += [a, b]
                y = y + segment.scaling * (x @ a.t()) @ b.t()
            outputs.append(y)
        y = torch.cat(outputs, 1)
        y.backward(of(self.dy))
        return [y.detach(), x.grad, *(factor.grad for factor in factors)]

    def native(self) -> list[Tensor]:
        y, low = linear.linear_forward(self.x, self.segments)
        dx, grads = linear.linear_backward(self.dy, self.x, low, self.segments, needs_input=True)
        return [y, dx, *(grad for grad in grads if grad is not None)]

    def check(self) -> None:
        few = min(self.x.numel(), self.dy.numel()) < 1000  # sums may cancel by chance
        scales = self.exact(absolute=True) if few else self.exact()
        for got, wanted, scale in zip(self.native(), self.exact(), scales, strict=True):
            assert got.shape == wanted.shape
            error = (got.double() - wanted).norm() / scale.norm().clamp_min(1e-30)
            assert error < TOLERANCE[self.dtype], error


@pytest.mark.parametrize(("isa", "dtype"), CASES)
@pytest.mark.parametrize("storage", ["nf4", "fp4", "e2m1", "int4", "int8", "bfloat16", "float16", "float32"])
def test_every_storage(isa, dtype, storage):
    native.use(isa)
    Case(70, 128, (66, 20), (8, 4), dtype, storage, bias=True).check()


@pytest.mark.parametrize(("isa", "dtype"), CASES)
@pytest.mark.parametrize("storage", linear.GGUF_TYPES)
def test_blocks_of_gguf(isa, dtype, storage):
    native.use(isa)
    Case(70, 256, (66, 20), (8, 4), dtype, storage, bias=True).check()
    Case(90, 768, (128, 36), (8, 0), dtype, storage, head_rows=4).check()
    if linear.GGUF_TYPES[storage] < linear.GGUF_TYPES["Q4_K"]:
        Case(33, 96, (34, 6), (3, 0), dtype, storage).check()


@pytest.mark.parametrize(("isa", "dtype"), CASES)
@pytest.mark.parametrize("storage", STORAGES)
def test_codes_of_gptq_and_awq(isa, dtype, storage):
    native.use(isa)
    Case(70, 256, (66, 20), (8, 4), dtype, storage, bias=True).check()
    Case(90, 2688, (128, 36), (8, 0), dtype, storage).check()  # deeper than one visit, not whole pieces of 512
    Case(33, 96, (34, 6), (3, 0), dtype, storage).check()


@pytest.mark.parametrize(("isa", "dtype"), CASES)
@pytest.mark.parametrize(
    ("tokens", "features", "outputs", "ranks", "quant"),
    [
        (1, 32, (2,), (1,), {}),
        (33, 96, (34, 6), (3, 0), {"blocksize": 32}),
        (130, 1536, (1536, 256, 256), (16, 16, 16), {}),
        (2100, 192, (130,), (5,), {"double_quant": False}),  # more tokens than are summed at once
        (65, 640, (520,), (600,), {"blocksize": 4096}),  # blocks that span rows; a rank deeper than one visit
        (64, 608, (48,), (2,), {"blocksize": 64}),  # 608 = 9.5 blocks: half blocks in every row
    ],
)
def test_sizes(isa, dtype, tokens, features, outputs, ranks, quant):
    native.use(isa)
    Case(tokens, features, outputs, ranks, dtype, "nf4", **quant).check()


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 150),
    features=st.integers(1, 12).map(lambda n: 32 * n),
    outputs=st.lists(st.integers(1, 120).map(lambda n: 2 * n), min_size=1, max_size=3),
    rank=st.integers(0, 20),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize(("isa", "dtype"), CASES)
def test_random_shapes(isa, dtype, tokens, features, outputs, rank, seed):
    native.use(isa)
    Case(tokens, features, outputs, [rank] * len(outputs), dtype, "nf4", seed).check()


@pytest.mark.parametrize(("isa", "dtype"), CASES)
def test_threads_change_no_bit(isa, dtype):
    native.use(isa)
    case = Case(200, 256, (512, 130), (8, 8), dtype, "nf4")
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(case.native())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("isa", "dtype"), CASES)
def test_rows_may_lie_apart(isa, dtype):
    native.use(isa)
    case = Case(40, 64, (32,), (4,), dtype, "nf4")
    wide = torch.randn(40, 100).to(dtype)
    wide[:, 10:74] = case.x
    case.x = wide[:, 10:74]
    case.dy = torch.randn(32, 40).to(dtype).t()  # columns contiguous: copied
    case.check()


def test_what_is_refused():
    isa, dtype = CASES[0]
    native.use(isa)
    case = Case(8, 64, (32,), (4,), dtype, "nf4")
    with pytest.raises(ValueError, match="cannot read 96 features"):
        linear.linear_forward(torch.zeros(8, 96, dtype=dtype), case.segments)
    with pytest.raises(ValueError, match="a matrix is needed"):
        linear.linear_forward(torch.zeros(8, dtype=dtype), case.segments)
    with pytest.raises(ValueError, match=r"does not multiply torch\.float16"):
        linear.linear_forward(case.x.half(), case.segments)
    y, low = linear.linear_forward(case.x, case.segments)
    with pytest.raises(ValueError, match="do not fit"):
        linear.linear_backward(y[:, :30], case.x, low, case.segments, True)
    segment = case.segments[0]
    broken = linear.LinearSegment(segment.weight, None, segment.lora_A.half(), segment.lora_B, 1.0)
    with pytest.raises(ValueError, match="contiguous float32"):
        linear.linear_forward(case.x, [broken])


def test_what_is_left_to_torch():
    assert DenseWeight(torch.zeros(3, 64)).native_view() is None  # an odd number of rows
    assert quantize(torch.ones(4, 48), QuantOptions()).native_view() is None  # not whole runs of 32 codes
    assert linear.dense_view(torch.zeros(4, 8).t()) is None


def test_no_tokens():
    isa, dtype = CASES[0]
    native.use(isa)
    case = Case(0, 64, (32,), (4,), dtype, "nf4")
    y, dx, da, db = case.native()
    assert (y.shape, dx.shape) == ((0, 32), (0, 64))
    assert not da.any()
    assert not db.any()
