"""The elementwise kernels against float64, on every instruction set: odd sizes, tails, single rows, strides, none."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from halfbyte.ops import elementwise, native
from tests.ops.conftest import available

NATIVE = [isa for isa in available() if isa != "reference"]
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
ROWS = [(1, 1), (3, 5), (7, 24), (2, 67), (33, 640), (5, 1153), (0, 16)]
HEADS = [  # T, H, E, F
    (1, 1, 2, 1),
    (5, 3, 10, 5),
    (7, 2, 64, 32),
    (3, 4, 96, 36),  # partial, no multiple of a vector
    (2, 5, 134, 67),
    (0, 2, 8, 4),
    (90, 4, 256, 128),
]

pytestmark = pytest.mark.usefixtures("keep_choice")
if not NATIVE:
    pytestmark = pytest.mark.skip("halfbyte was built without its native library")


@pytest.fixture(params=NATIVE, autouse=True)
def isa(request: pytest.FixtureRequest, keep_choice: None) -> str:
    native.use(request.param)
    torch.manual_seed(0)
    return request.param


def check(found: Tensor, exact: Tensor, terms: float = 1.0) -> None:
    """Rounded once from float arithmetic on values of size `terms` (what was added up to make an element)."""
    half_step = 2.0**-8 if found.dtype == torch.bfloat16 else 2.0**-24
    assert found.shape == exact.shape
    error = (found.double() - exact).abs()
    bound = exact.abs() * half_step * 1.01 + 4e-6 * terms
    assert bool((error <= bound).all()), f"{(error - bound).max()} above the bound"


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.double().requires_grad_() for t in tensors]


# -- norms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("with_ds", [False, True])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, int], with_ds: bool) -> None:
    x, dy, ds = (torch.randn(shape).to(dtype) for _ in range(3))
    weight = torch.randn(shape[1])
    y, rstd = elementwise.rms_norm(x, weight, EPS)
    x64, w64 = double(x, weight)
    exact = norm(x64, w64)
    check(y, exact.detach(), 4)
    assert y.dtype == dtype
    exact.backward(dy.double())
    dx, dweight = elementwise.rms_norm_backward(dy, x, weight, rstd, ds if with_ds else None, sums=True)
    check(dx, x64.grad + (ds.double() if with_ds else 0), 4 * max(1.0, float(rstd.max()) if rstd.numel() else 0))
    assert dweight is not None
    check(dweight, w64.grad, 10)
    without, nothing = elementwise.rms_norm_backward(dy, x, weight, rstd, ds if with_ds else None)
    assert nothing is None
    assert torch.equal(without, dx)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_inside_a_fused_buffer(dtype: torch.dtype) -> None:
    fused = torch.randn(6, 9, 40).to(dtype)
    weight = torch.randn(40)
    for x in (fused[:, 2:5], fused[::2, 4:9], fused[:, 3], fused.transpose(0, 1)):
        y, rstd = elementwise.rms_norm(x, weight, EPS)
        same, same_rstd = elementwise.rms_norm(x.contiguous(), weight, EPS)
        assert torch.equal(y, same)
        assert torch.equal(rstd, same_rstd)
        dy = torch.randn(x.shape).to(dtype)
        dx, _ = elementwise.rms_norm_backward(dy, x, weight, rstd)
        assert torch.equal(dx, elementwise.rms_norm_backward(dy, x.contiguous(), weight, rstd)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("has_post", [False, True])
@pytest.mark.parametrize("has_pre", [False, True])
def test_add_rms_norm(dtype: torch.dtype, shape: tuple[int, int], has_post: bool, has_pre: bool) -> None:
    x, h, ds, dy = (torch.randn(shape).to(dtype) for _ in range(4))
    post, pre = torch.randn(shape[1]), torch.randn(shape[1])
    s, y, rstd_h, rstd_s = elementwise.add_rms_norm(x, h, post if has_post else None, pre if has_pre else None, EPS)
    assert (rstd_h is not None, rstd_s is not None, y is not None) == (has_post, has_pre, has_pre)
    h64, post64, pre64 = double(h, post, pre)
    s64 = x.double() + (norm(h64, post64) if has_post else h64)
    check(s, s64.detach(), 4)
    kept = s.double() + (s64 - s64.detach())  # the value is that which was rounded, the gradient s64's
    y64 = norm(kept, pre64)
    if y is not None:
        check(y, y64.detach(), 4)
    if not has_post:
        return
    for with_ds in (False, True):
        if not (with_ds or has_pre):
            continue
        h64.grad = post64.grad = pre64.grad = None
        outs = ([y64] if has_pre else []) + ([kept] if with_ds else [])
        given = ([dy.double()] if has_pre else []) + ([ds.double()] if with_ds else [])
        (dkept,) = torch.autograd.grad(outs, kept, given, retain_graph=True)
        given_ds, given_dy = ds if with_ds else None, dy if has_pre else None
        dx, dh, sums = elementwise.sandwich_backward(
            given_ds, given_dy, s, h, post, pre if has_pre else None, rstd_h, rstd_s, sums=True
        )
        size = max([1.0] + [float(r.max()) for r in (rstd_h, rstd_s) if r is not None and r.numel()])
        check(dx, dkept, 4 * size)
        # h's gradient is that of dx as it was rounded.
        torch.autograd.backward([s64], [dx.double()], inputs=[h64, post64], retain_graph=True)
        check(dh, h64.grad, 8 * size)
        assert sums is not None
        check(sums[1], post64.grad, 20 * size)
        if has_pre:
            torch.autograd.backward([y64], [dy.double()], inputs=[pre64], retain_graph=True)
            check(sums[0], pre64.grad, 20)


def test_sums_over_rows_do_not_depend_on_the_threads() -> None:
    x, dy, weight = torch.randn(700, 200), torch.randn(700, 200), torch.randn(200)
    _, rstd = elementwise.rms_norm(x, weight, EPS)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(elementwise.rms_norm_backward(dy, x, weight, rstd, sums=True))
    finally:
        torch.set_num_threads(before)
    for dx, dweight in found[1:]:
        assert torch.equal(dx, found[0][0])
        assert torch.equal(dweight, found[0][1])


# -- gated units ------------------------------------------------------------------------------------------------------


def act(x: Tensor, kind: str) -> Tensor:
    """In a form that keeps its digits where the value is small."""
    if kind == "silu":
        return x * torch.sigmoid(x)
    if kind == "gelu_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))


KINDS = ["silu", "gelu_tanh", "gelu"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 16), (9, 83), (0, 4), (40, 1000)])
def test_gated_unit(dtype: torch.dtype, kind: str, shape: tuple[int, int]) -> None:
    rows, width = shape
    gate_up = (torch.randn(rows, 2 * width) * 3).to(dtype)
    dout = torch.randn(shape).to(dtype)
    (x,) = double(gate_up)
    exact = act(x[:, :width], kind) * x[:, width:]
    check(elementwise.gated_unit(gate_up, kind), exact.detach(), 3)
    exact.backward(dout.double())
    grad = elementwise.gated_unit_backward(dout, gate_up, kind)
    check(grad, x.grad, 10)
    wide = torch.cat([gate_up, torch.ones(rows, 3, dtype=dtype)], 1)[:, :-3]
    assert torch.equal(elementwise.gated_unit(wide, kind), elementwise.gated_unit(gate_up, kind))
    assert torch.equal(elementwise.gated_unit_backward(dout, wide, kind), grad)
    assert elementwise.gated_unit_backward(dout, gate_up, kind, out=gate_up) is gate_up
    assert torch.equal(gate_up, grad)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_keep_their_digits_over_the_whole_range(kind: str) -> None:
    """Relative, so that the exponential itself is measured: of e^v, v's own rounding alone is |v| * 2^-24."""
    reach = {"silu": 86.0, "gelu_tanh": 9.5, "gelu": 13.0}[kind]
    x = torch.cat([torch.linspace(-reach, reach, 200_001), torch.randn(1000) * 1e-3, torch.randn(1000) * 1e-20])
    gate_up = torch.stack([x, torch.ones_like(x)], 1).t().reshape(1, -1).contiguous()
    (x64,) = double(x)
    exact = act(x64, kind)
    exact.sum().backward()
    exponent = (
        {"silu": x64, "gelu_tanh": 1.6 * (x64 + 0.044715 * x64**3), "gelu": x64.square() / 2}[kind].detach().abs()
    )
    relative = (elementwise.gated_unit(gate_up, kind)[0].double() / exact.detach() - 1).abs()[x != 0]
    bound = (4e-7 + 3e-7 * torch.where(x64 < 0, exponent, 0))[x != 0]
    assert bool((relative <= bound).all()), (relative / bound).max()
    grad = elementwise.gated_unit_backward(torch.ones(1, len(x)), gate_up, kind)[0, : len(x)]
    assert (grad.double() - x64.grad).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_huge_values_and_of_nan(kind: str) -> None:
    x = torch.tensor([[-3e38, -1e20, -1000, -88.5, 0, 88.5, 1000, 1e20, 3e38, math.nan]])
    gate_up = torch.cat([x, torch.ones_like(x)], 1)
    expected = torch.where(x > 0, x, 0.0)
    value = elementwise.gated_unit(gate_up, kind)[0]
    slope = elementwise.gated_unit_backward(torch.ones_like(x), gate_up, kind)[0, :10]
    torch.testing.assert_close(value[2:-1], expected[0, 2:-1], atol=1e-30, rtol=1e-6)
    assert value[:2].abs().max() < 3  # the smallest normal number times the largest
    torch.testing.assert_close(slope[4:-1], torch.tensor([0.5, 1, 1, 1, 1]))
    assert slope[:4].abs().max() < 3
    assert value[-1].isnan()
    assert slope[-1].isnan()


# -- heads ------------------------------------------------------------------------------------------------------------


def tables(tokens: int, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(tokens, half) * 7
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[1]
    c, s = cos.double()[:, None], sin.double()[:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * c - second * s, second * c + first * s, rest], -1)


def fused(tokens: int, heads: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a buffer with two more heads on either side, the heads between)"""
    buffer = torch.randn(tokens, heads + 4, features).to(dtype)
    return buffer, buffer[:, 2:-2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("float_tables", [False, True])
def test_rotate_heads(dtype: torch.dtype, shape: tuple[int, ...], normed: bool, float_tables: bool) -> None:
    tokens, heads, features, half = shape
    buffer, x = fused(tokens, heads, features, dtype)
    cos, sin = tables(tokens, half, torch.float32 if float_tables else dtype)
    weight = torch.randn(features) if normed else None
    before, out = buffer.clone(), torch.empty(tokens, heads, features, dtype=dtype)
    rstd = elementwise.rotate_heads(x, cos, sin, out, weight, EPS)
    assert torch.equal(buffer, before)
    exact = rotate(x.double() if weight is None else norm(x.double(), weight.double()), cos, sin)
    check(out, exact, 8)
    head_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    again = torch.empty_like(out)
    elementwise.rotate_heads(head_first, cos, sin, again, weight, EPS)
    assert torch.equal(again, out)
    elementwise.rotate_heads(x, cos, sin, x, weight, EPS)  # in place: the heads beside are not touched
    before[:, 2:-2] = out
    assert torch.equal(buffer, before)
    assert (rstd is None) == (weight is None)
    if weight is None:
        elementwise.rotate_heads(x, cos, sin, out, inverse=True)
        check(out, rotate(x.double(), cos, -sin), 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("place", ["new", "dy", "x"])
def test_rotate_heads_backward(dtype: torch.dtype, shape: tuple[int, ...], place: str) -> None:
    tokens, heads, features, half = shape
    buffer, x = fused(tokens, heads, features, dtype)
    dbuffer, dy = fused(tokens, heads, features, dtype)
    cos, sin = tables(tokens, half, dtype)
    weight = torch.randn(features)
    y = torch.empty(tokens, heads, features, dtype=dtype)
    rstd = elementwise.rotate_heads(x, cos, sin, y, weight, EPS)
    assert rstd is not None
    x64, w64 = double(x, weight)
    rotate(norm(x64, w64), cos, sin).backward(dy.double())
    before = buffer.clone(), dbuffer.clone()
    out = {"new": y, "dy": dy, "x": x}[place]
    dweight = elementwise.rotate_heads_backward(dy, cos, sin, x, weight, rstd, out, sums=True)
    size = max(1.0, float(rstd.max()) if rstd.numel() else 0)
    check(out, x64.grad, 8 * size)
    assert dweight is not None
    check(dweight, w64.grad, 30)
    for now, then in zip((buffer, dbuffer), before, strict=True):
        assert torch.equal(now[:, :2], then[:, :2])
        assert torch.equal(now[:, -2:], then[:, -2:])


# -- what is refused --------------------------------------------------------------------------------------------------


def test_available() -> None:
    assert elementwise.available(torch.ones(1))
    assert elementwise.available(torch.ones(1, dtype=torch.bfloat16))
    assert not elementwise.available(torch.ones(1, dtype=torch.float16))
    assert not elementwise.available(torch.ones(1, device="meta"))
    native.use("reference")
    assert not elementwise.available(torch.ones(1))


X, W = torch.ones(4, 6), torch.ones(6)
HEAD, TABLE = torch.ones(4, 2, 6), torch.ones(4, 3)
REFUSED = {
    "dtype": lambda: elementwise.rms_norm(X.half(), W, EPS),
    "weight dtype": lambda: elementwise.rms_norm(X, W.bfloat16(), EPS),
    "weight shape": lambda: elementwise.rms_norm(X, torch.ones(5), EPS),
    "columns apart": lambda: elementwise.rms_norm(X.t(), torch.ones(4), EPS),
    "dy of another type": lambda: elementwise.rms_norm_backward(X.bfloat16(), X, W, torch.ones(4)),
    "rstd shape": lambda: elementwise.rms_norm_backward(X, X, W, torch.ones(5)),
    "h shape": lambda: elementwise.add_rms_norm(X, X[:3], None, W, EPS),
    "h with strides": lambda: elementwise.add_rms_norm(X, torch.ones(4, 12)[:, ::2], None, W, EPS),
    "no gradient": lambda: elementwise.sandwich_backward(None, None, X, X, W, W, torch.ones(4), torch.ones(4)),
    "dy without its norm": lambda: elementwise.sandwich_backward(X, X, X, X, W, None, torch.ones(4), None),
    "activation": lambda: elementwise.gated_unit(X, "relu"),
    "odd width": lambda: elementwise.gated_unit(torch.ones(4, 5), "silu"),
    "gradient of another width": lambda: elementwise.gated_unit_backward(torch.ones(4, 6), X, "silu"),
    "cos of another length": lambda: elementwise.rotate_heads(HEAD, TABLE[:3], TABLE[:3], HEAD),
    "cos too wide": lambda: elementwise.rotate_heads(HEAD, X[:, :4], X[:, :4].clone(), HEAD),
    "cos of another type": lambda: elementwise.rotate_heads(HEAD, TABLE.bfloat16(), TABLE.bfloat16(), HEAD),
    "heads apart in out": lambda: elementwise.rotate_heads(HEAD, TABLE, TABLE, torch.ones(4, 4, 6)[:, ::2]),
    "out shape": lambda: elementwise.rotate_heads(HEAD, TABLE, TABLE, HEAD[:, :1]),
}


@pytest.mark.parametrize("why", REFUSED)
def test_wrong_arguments_are_refused(why: str) -> None:
    with pytest.raises(ValueError):
        REFUSED[why]()


def test_bfloat16_beats_torch_own_rounding() -> None:
    """One rounding at the end: no worse than torch's, which rounds the activation and the product."""
    gate_up = torch.randn(64, 400).bfloat16()
    exact = F.silu(gate_up.double()[:, :200]) * gate_up.double()[:, 200:]
    gate, up = gate_up.chunk(2, 1)
    ours = (elementwise.gated_unit(gate_up, "silu").double() - exact).square().mean()
    assert ours < 0.7 * (F.silu(gate).mul(up).double() - exact).square().mean()


# -- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("bias", [True, False])
def test_columns(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    x, scale = torch.randn(shape).to(dtype), torch.randn(shape[1])
    shift = torch.randn(shape[1]) if bias else None
    exact = x.double() * scale.double() + (0 if shift is None else shift.double())
    check(elementwise.scale_columns(x, scale, shift), exact, 5)
    assert elementwise.scale_columns(x, scale, shift, x) is x
    check(x, exact, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ROWS, (3000, 70)])
def test_columns_backward(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dy, kept, scale = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1])
    dx, products = elementwise.scale_columns_backward(dy, kept, scale)
    check(dx, dy.double() * scale.double(), 5)
    assert products.dtype == torch.float32
    check(products, (dy.double() * kept.double()).sum(0), 5 * max(1, shape[0]) ** 0.5)


def test_columns_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        elementwise.scale_columns(torch.ones(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match="kept"):
        elementwise.scale_columns_backward(torch.ones(2, 3), torch.ones(2, 4), torch.ones(3))
