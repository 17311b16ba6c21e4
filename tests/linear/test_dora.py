"""DoRA against float64 autograd with the norm detached, which is what the paper's section 4.3 says."""

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor

from halfbyte.linear import GroupedLinear, LoraAdapter, Segment
from halfbyte.linear.dora import PIECE, row_norms, times_factor
from halfbyte.ops import native
from halfbyte.quant import DenseWeight, QuantOptions, Weight, quantize

SIZES, WIDTH = (24, 8, 8), 64


def make_weight(dense: Tensor, kind: str) -> Weight:
    if kind == "nf4":
        return quantize(dense, QuantOptions())
    return DenseWeight(dense.bfloat16() if kind == "bf16" else dense, trainable=kind == "trainable")


def make_group(
    kind: str, bias: bool, dora: tuple[bool, ...] = (True, False, True), dropout: float = 0.0
) -> GroupedLinear:
    """Three segments; `dora` says which of them have a magnitude (the second has no adapter at all)."""
    generator = torch.Generator().manual_seed(3)
    parts = []
    for i, size in enumerate(SIZES):
        dense = torch.randn(size, WIDTH, generator=generator) / 8
        b = 30 * torch.randn(size, generator=generator) if bias and i != 1 else None
        segment = Segment(f"model.layers.0.part{i}", make_weight(dense, kind), b)
        if i != 1:
            a, factor = torch.randn(4, WIDTH, generator=generator) / 8, torch.randn(size, 4, generator=generator)
            magnitude = torch.rand(size, generator=generator) + 0.5 if dora[i] else None
            segment.adapter = LoraAdapter(a, factor, 0.5 + i, dropout, magnitude)
        parts.append(segment)
    return GroupedLinear(parts)


def reference(group: GroupedLinear, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    leaves: dict[str, Tensor] = {}
    outputs = []
    for i, segment in enumerate(group.parts):
        w = segment.weight.dequantize(torch.float32).detach().double().requires_grad_()
        leaves[f"w{i}"] = w
        whole, adapter = w, segment.adapter
        if adapter is not None and adapter.enabled:
            a, b = (t.detach().double().requires_grad_() for t in (adapter.lora_A, adapter.lora_B))
            leaves[f"a{i}"], leaves[f"b{i}"] = a, b
            whole = w + adapter.scaling * b @ a
            if adapter.magnitude is not None:
                m = adapter.magnitude.detach().double().requires_grad_()
                leaves[f"m{i}"] = m
                whole = whole * (m / whole.detach().norm(dim=1))[:, None]
        y = x @ whole.t()
        outputs.append(y if segment.bias is None else y + segment.bias.double())
    return torch.cat(outputs, 1), leaves


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "trainable"])
@pytest.mark.parametrize("library", [True, False])
def test_output_and_gradients_equal_float64(kind: str, bias: bool, library: bool) -> None:
    if not library:
        native.use("reference")
    try:
        group = make_group(kind, bias)
        x = torch.randn(10, WIDTH, requires_grad=True)
        x64 = x.detach().double().requires_grad_()
        expected, leaves = reference(group, x64)
        actual = group(x)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5 * (30 if bias else 1))
        grad = torch.randn_like(actual)
        actual.backward(grad)
    finally:
        native.use(None)
    expected.backward(grad.double())
    assert x.grad is not None
    found = {"x": (x.grad, x64.grad)}
    for i, segment in enumerate(group.parts):
        trained = segment.weight.trainable_tensor()
        if trained is not None:
            found[f"w{i}"] = trained.grad, leaves[f"w{i}"].grad
        if segment.adapter is not None:
            for key, tensor in (("a", segment.adapter.lora_A), ("b", segment.adapter.lora_B)):
                found[f"{key}{i}"] = tensor.grad, leaves[f"{key}{i}"].grad
            if segment.adapter.magnitude is not None:
                found[f"m{i}"] = segment.adapter.magnitude.grad, leaves[f"m{i}"].grad
    assert {"m0", "m2"} <= found.keys()
    for name, (ours, exact) in found.items():
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bias", [True, False])
def test_bf16_stays_close_to_float64(bias: bool) -> None:
    """A large bias (Qwen's queries have them) does not swallow the magnitudes' gradient."""
    group = make_group("nf4", bias)
    x = torch.randn(64, WIDTH)
    expected, leaves = reference(group, x.double())
    actual = group(x.bfloat16())
    assert (actual.double() - expected).norm() / expected.norm() < 0.01
    grad = torch.randn_like(actual)
    actual.backward(grad)
    expected.backward(grad.double())
    for i in (0, 2):
        adapter = group.parts[i].adapter
        for key, tensor in (("m", adapter.magnitude), ("a", adapter.lora_A), ("b", adapter.lora_B)):
            exact = leaves[f"{key}{i}"].grad
            assert (tensor.grad.double() - exact).norm() / exact.norm() < 0.02, f"{key}{i}"


def test_a_magnitude_of_zero_still_learns() -> None:
    group = make_group("fp32", bias=False)
    magnitude = group.parts[0].adapter.magnitude
    with torch.no_grad():
        magnitude[3] = 0.0
    x = torch.randn(10, WIDTH)
    expected, leaves = reference(group, x.double())
    actual = group(x)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(actual)
    actual.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(magnitude.grad.double(), leaves["m0"].grad, rtol=1e-4, atol=1e-4)


def test_a_row_of_zeros_stays_zero() -> None:
    """Its norm is 0, and so is the magnitude that it begins with: 0 / 0 elsewhere."""
    dense = torch.randn(8, WIDTH)
    dense[3] = 0
    segment = Segment("s", DenseWeight(dense))
    segment.adapter = LoraAdapter(torch.randn(2, WIDTH), torch.zeros(8, 2), 1.0, magnitude=dense.norm(dim=1))
    x = torch.randn(5, WIDTH, requires_grad=True)
    y = GroupedLinear([segment])(x)
    torch.testing.assert_close(y, x @ dense.t(), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    gradients = (x.grad, segment.adapter.lora_A.grad, segment.adapter.lora_B.grad, segment.adapter.magnitude.grad)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert torch.equal(segment.merged()[3], torch.zeros(WIDTH))


def test_the_norms_follow_every_change() -> None:
    """They are kept between calls; writing to a factor, another factor or another weight makes them anew."""
    group = make_group("nf4", bias=False)
    segment, x = group.parts[0], torch.randn(5, WIDTH)

    def check() -> None:
        torch.testing.assert_close(group(x).double(), reference(group, x.double())[0], rtol=1e-5, atol=1e-5)

    check()
    kept = segment.norms.of(segment.weight, segment.adapter, torch.float32)
    assert segment.norms.of(segment.weight, segment.adapter, torch.float32) is kept
    with torch.no_grad():
        segment.adapter.lora_B.mul_(3)
    check()
    with torch.no_grad():
        segment.adapter.lora_A.neg_()
    check()
    for _ in range(20):  # a new adapter may lie where the old one lay
        old = segment.adapter
        segment.adapter = LoraAdapter(torch.randn(4, WIDTH), torch.randn(24, 4), 0.5, 0.0, old.magnitude.detach())
        del old
        gc.collect()
        check()
    segment.weight = quantize(torch.randn(24, WIDTH), QuantOptions())
    check()


def test_dropout_takes_part_in_the_update_alone() -> None:
    group = make_group("fp32", bias=True, dropout=0.5)
    x = torch.randn(4000, WIDTH)
    group.eval()
    exact = group(x)
    torch.testing.assert_close(exact.double(), reference(group, x.double())[0], rtol=1e-5, atol=1e-4)
    group.train()
    torch.manual_seed(0)
    error = group(x) - exact
    assert error[:, :24].abs().max() > 0.1
    assert (error.mean(0).abs() <= 6 * error.std(0) / len(x) ** 0.5 + 1e-5).all()  # unbiased


def test_a_disabled_adapter_is_the_base() -> None:
    group, x = make_group("nf4", bias=True), torch.randn(4, WIDTH)
    for part in group.parts:
        if part.adapter is not None:
            part.adapter.enabled = False
    base = group(x)
    assert not group.keeps_output
    for part in group.parts:
        part.adapter = None
    assert torch.equal(base, group(x))


def test_merged_is_the_adapted_weight() -> None:
    group, x = make_group("nf4", bias=False), torch.randn(4, WIDTH)
    merged = torch.cat([x @ part.merged().t() for part in group.parts], 1)
    torch.testing.assert_close(group(x), merged, rtol=1e-5, atol=1e-5)


def test_bf16_adapters_stay_float32_and_copies_are_their_own() -> None:
    group = make_group("nf4", bias=False).to(torch.bfloat16)
    assert group.parts[0].adapter.magnitude.dtype == torch.float32
    x = torch.randn(3, WIDTH)
    expected = group(x)
    assert torch.equal(copy.deepcopy(group)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(group))(x), expected)


def test_a_magnitude_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="magnitude"):
        LoraAdapter(torch.zeros(2, 8), torch.zeros(8, 2), 1.0, magnitude=torch.ones(7))


@pytest.mark.parametrize("rows", [1, 3, PIECE // 512 + 1])
def test_products_and_norms_by_pieces(rows: int) -> None:
    dense, a = torch.randn(rows, 512), torch.randn(3, 512)
    weight = DenseWeight(dense)
    torch.testing.assert_close(row_norms(weight), dense.norm(dim=1))
    torch.testing.assert_close(times_factor(weight, a, torch.float32), dense @ a.t(), rtol=1e-4, atol=1e-4)
