"""A group of linears against plain float64 autograd over the dequantized weights."""

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn

from halfbyte.linear import GroupedLinear, LoraAdapter, Segment, segments
from halfbyte.quant import DenseWeight, QuantOptions, quantize

SIZES = (24, 8, 8)
WIDTH = 64


def make_group(kind: str, ranks: tuple[int | None, ...] = (4, None, 2), bias: bool = True) -> GroupedLinear:
    generator = torch.Generator().manual_seed(3)
    parts = []
    for i, (size, rank) in enumerate(zip(SIZES, ranks, strict=True)):
        dense = torch.randn(size, WIDTH, generator=generator) / 8
        if kind == "nf4":
            weight = quantize(dense, QuantOptions())
        else:
            weight = DenseWeight(dense.bfloat16() if kind == "bf16" else dense, trainable=kind == "trainable")
        b = torch.randn(size, generator=generator) if bias and i != 1 else None
        segment = Segment(f"model.layers.0.part{i}", weight, b)
        if rank is not None:
            a = torch.randn(rank, WIDTH, generator=generator)
            segment.adapter = LoraAdapter(a, torch.randn(size, rank, generator=generator), scaling=0.5 + i)
        parts.append(segment)
    return GroupedLinear(parts)


def reference(group: GroupedLinear, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and a dictionary of float64 leaves that autograd can differentiate."""
    leaves: dict[str, Tensor] = {}
    outputs = []
    for i, segment in enumerate(group.parts):
        w = segment.weight.dequantize(torch.float32).detach().double().requires_grad_()
        leaves[f"w{i}"] = w
        y = x @ w.t()
        if segment.bias is not None:
            y = y + segment.bias.double()
        if segment.adapter is not None and segment.adapter.enabled:
            a, b = (t.detach().double().requires_grad_() for t in (segment.adapter.lora_A, segment.adapter.lora_B))
            leaves[f"a{i}"], leaves[f"b{i}"] = a, b
            y = y + segment.adapter.scaling * (x @ a.t() @ b.t())
        outputs.append(y)
    return torch.cat(outputs, 1), leaves


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "trainable"])
def test_output_and_gradients_equal_float64(kind: str) -> None:
    group = make_group(kind)
    x = torch.randn(10, WIDTH, requires_grad=True)
    x64 = x.detach().double().requires_grad_()
    expected, leaves = reference(group, x64)
    actual = group(x)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)

    grad = torch.randn_like(actual)
    actual.backward(grad)
    expected.backward(grad.double())
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-4)
    for i, segment in enumerate(group.parts):
        if segment.adapter is not None:
            torch.testing.assert_close(segment.adapter.lora_A.grad.double(), leaves[f"a{i}"].grad, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(segment.adapter.lora_B.grad.double(), leaves[f"b{i}"].grad, rtol=1e-5, atol=1e-4)
        trainable = segment.weight.trainable_tensor()
        assert (trainable is not None) == (kind == "trainable")
        if trainable is not None:
            torch.testing.assert_close(trainable.grad.double(), leaves[f"w{i}"].grad, rtol=1e-5, atol=1e-4)


def test_bf16_stays_close_to_float64() -> None:
    group = make_group("nf4")
    x = torch.randn(32, WIDTH)
    expected, _ = reference(group, x.double())
    actual = group(x.bfloat16()).double()
    assert (actual - expected).norm() / expected.norm() < 0.01


def test_two_calls_do_not_share_their_scratch() -> None:
    """The dequantized weight lives in a shared buffer: an earlier call's backward must not see a later one's weight."""
    first, second = make_group("nf4"), make_group("nf4", ranks=(None, None, None))
    with torch.no_grad():
        for part in second.parts:
            part.weight.codes.zero_()
    x = torch.randn(4, WIDTH, requires_grad=True)
    y, _ = first(x), second(x)
    y.sum().backward()
    x64 = x.detach().double().requires_grad_()
    reference(first, x64)[0].sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-4)


def test_the_input_of_the_first_layer_needs_no_gradient() -> None:
    group = make_group("nf4")
    group(torch.randn(4, WIDTH)).sum().backward()
    assert group.parts[0].adapter.lora_B.grad.abs().sum() > 0


def test_a_disabled_adapter_is_the_base() -> None:
    group = make_group("nf4")
    x = torch.randn(4, WIDTH)
    tuned = group(x)
    for part in group.parts:
        if part.adapter is not None:
            part.adapter.enabled = False
    base = group(x)
    for part in group.parts:
        part.adapter = None
    torch.testing.assert_close(base, group(x), rtol=0, atol=0)
    assert not torch.equal(base, tuned)


def test_dropout_acts_on_the_adapter_only_and_only_in_training() -> None:
    group = make_group("fp32", bias=False)
    for part in group.parts:
        if part.adapter is not None:
            part.adapter.dropout = 0.5
    x = torch.randn(2000, WIDTH)
    group.eval()
    exact = group(x)
    group.train()
    torch.manual_seed(0)
    dropped = group(x)
    middle = slice(SIZES[0], SIZES[0] + SIZES[1])
    torch.testing.assert_close(dropped[:, middle], exact[:, middle])  # no adapter there
    assert not torch.allclose(dropped[:, :24], exact[:, :24])
    error = dropped - exact
    assert (error.mean(0).abs() <= 6 * error.std(0) / len(x) ** 0.5).all()  # unbiased


def test_adapters_stay_float32() -> None:
    group = make_group("nf4").to(torch.bfloat16)
    assert group.parts[0].adapter.lora_A.dtype == torch.float32


def test_merged_is_the_weight_plus_the_delta() -> None:
    segment = make_group("nf4").parts[0]
    assert segment.adapter is not None
    expected = segment.weight.dequantize(torch.float32) + 0.5 * segment.adapter.lora_B @ segment.adapter.lora_A
    torch.testing.assert_close(segment.merged(), expected.detach())


def test_segments_are_found_by_name() -> None:
    model = nn.ModuleList([make_group("fp32")])
    assert list(segments(model)) == [f"model.layers.0.part{i}" for i in range(3)]


def test_segments_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="same input"):
        GroupedLinear([Segment("a", DenseWeight(torch.zeros(2, 3))), Segment("b", DenseWeight(torch.zeros(2, 4)))])


def test_an_adapter_whose_ranks_differ_is_refused() -> None:
    with pytest.raises(ValueError, match="share a rank"):
        LoraAdapter(torch.zeros(2, 8), torch.zeros(8, 3), 1.0)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_graph_may_outlive_its_model(quantized: bool) -> None:
    def group() -> GroupedLinear:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(1024, 512, generator=generator)
        held = quantize(weight, QuantOptions()) if quantized else DenseWeight(weight)
        return GroupedLinear([Segment("s", held)])

    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(1)).requires_grad_()
    kept = group()
    kept(x).sum().backward()
    expected, x.grad = x.grad, None
    y = group()(x)
    gc.collect()
    others = [torch.full((1024, 512), 7.0) for _ in range(8)]  # would lie where the weight was
    y.sum().backward()
    assert torch.equal(x.grad, expected)
    assert len(others) == 8


def test_a_group_that_was_used_can_be_copied() -> None:
    group = GroupedLinear([Segment("s", quantize(torch.randn(64, 64), QuantOptions()))])
    x = torch.randn(3, 64)
    expected = group(x)
    assert torch.equal(copy.deepcopy(group)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(group))(x), expected)
