import copy

import pytest
import torch

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.ops import levels
from halfbyte.quant import BlockWeight, DenseWeight, QuantOptions, quantize

FORMATS = [
    QuantOptions(quant_type=quant_type, blocksize=blocksize, double_quant=double)
    for quant_type in levels.QUANT_TYPES
    for blocksize in (32, 64, 4096)
    for double in (False, True)
]


def named(options: QuantOptions) -> str:
    return f"{options.quant_type}-{options.blocksize}{'-dq' if options.double_quant else ''}"


@pytest.mark.parametrize("options", FORMATS, ids=named)
def test_a_block_weight_is_a_shape_and_dequantize(options):
    x = torch.randn(37, 75)  # rows divisible by no block, an odd count, a partial last block
    weight = quantize(x, options)
    assert weight.shape == (37, 75)
    assert weight.format == options.quant_type + ("+dq" if options.double_quant else "")
    assert weight.nbytes == sum(b.numel() * b.element_size() for b in weight.buffers())
    error = (weight.dequantize(torch.float32) - x).abs().mean()
    assert error < (0.02 if options.quant_type == "int8" else 0.16)


@pytest.mark.parametrize("options", FORMATS, ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_and_out_are_parts_of_the_whole(options, dtype):
    weight = quantize(torch.randn(37, 75), options)
    whole = weight.dequantize(dtype)
    for rows in (slice(0, 37), slice(0, 1), slice(5, 6), slice(3, 30), slice(36, None), slice(-4, -1), slice(9, 9)):
        assert torch.equal(weight.dequantize(dtype, rows=rows), whole[rows])
        out = torch.full((len(range(37)[rows]), 75), -7, dtype=dtype)
        assert weight.dequantize(dtype, out=out, rows=rows) is out
        assert torch.equal(out, whole[rows])


@pytest.mark.parametrize("options", FORMATS, ids=named)
@pytest.mark.parametrize("width", [128, 75, 4096])
def test_look_up_is_single_rows(options, width):
    weight = quantize(torch.randn(30, width), options)
    index = torch.tensor([29, 0, 7, 7, 28])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight.look_up(index, dtype), weight.dequantize(dtype)[index])
    assert weight.look_up(index[:0], torch.float32).shape == (0, width)


def test_nested_constants_cost_half_a_bit_less_and_little_precision():
    x = torch.randn(512, 512)
    flat = quantize(x, QuantOptions(double_quant=False))
    nested = quantize(x, QuantOptions())
    assert flat.nbytes * 8 / x.numel() == 4.5
    assert nested.nbytes * 8 / x.numel() == pytest.approx(4.127, abs=1e-3)
    difference = (flat.dequantize(torch.float32) - nested.dequantize(torch.float32)).abs().mean()
    assert difference < 0.01


def test_constants_stay_float32_through_every_conversion():
    for convert in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.type(torch.half),
    ):
        weight = quantize(torch.randn(64, 64), QuantOptions())
        expected = weight.dequantize(torch.float32)
        parent = torch.nn.Sequential(weight, torch.nn.Linear(2, 2))
        convert(parent)
        assert weight.codes.dtype == weight.absmax.dtype == torch.uint8
        assert weight.nested_absmax is not None
        assert weight.nested_offset is not None
        assert weight.nested_absmax.dtype == weight.nested_offset.dtype == torch.float32
        assert torch.equal(weight.dequantize(torch.float32), expected)


def test_modules_travel():
    weight = quantize(torch.randn(64, 64), QuantOptions())
    assert {b.device.type for b in weight.to("meta").buffers()} == {"meta"}
    weight = quantize(torch.randn(64, 64), QuantOptions())
    other = quantize(torch.zeros(64, 64), QuantOptions())
    other.load_state_dict(weight.state_dict())
    assert torch.equal(other.dequantize(torch.float32), weight.dequantize(torch.float32))
    assert torch.equal(copy.deepcopy(weight).dequantize(torch.float32), weight.dequantize(torch.float32))
    assert list(weight.parameters()) == []
    assert weight.trainable_tensor() is None
    assert not weight.is_dense_in(torch.float32)
    assert weight.source_dtype == torch.float32


def test_a_parameter_can_be_quantized():
    weight = quantize(torch.nn.Parameter(torch.randn(4, 64)), QuantOptions(double_quant=False))
    assert not any(buffer.requires_grad for buffer in weight.buffers())


def test_a_files_own_levels_are_used():
    codes, absmax = ops.quantize_blockwise(torch.randn(8, 64), "nf4", 64)
    own = levels.levels("nf4") * 0.5
    usual = BlockWeight(codes, absmax, "nf4", 64, (8, 64))
    odd = BlockWeight(codes, absmax, "nf4", 64, (8, 64), table=own)
    assert torch.equal(odd.dequantize(torch.float32), usual.dequantize(torch.float32) * 0.5)


@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0), (1, 1)])
def test_smallest_matrices(shape):
    for options in FORMATS:
        assert quantize(torch.randn(shape), options).dequantize(torch.bfloat16).shape == shape


def test_zero_weights_stay_zero():
    x = torch.zeros(128, 64)
    for options in FORMATS:
        assert quantize(x, options).dequantize(torch.float32).abs().max() == 0


def test_bad_input():
    with pytest.raises(UsageError, match=r"only matrices are quantized, not a tensor of shape \[4\]"):
        quantize(torch.randn(4), QuantOptions())
    x = torch.randn(4, 4)
    x[1, 2] = torch.inf
    with pytest.raises(UsageError, match=r"the value at \[1, 2\] is inf"):
        quantize(x, QuantOptions())
    weight = quantize(torch.randn(4, 64), QuantOptions())
    with pytest.raises(ValueError, match="steps of 1"):
        weight.dequantize(torch.float32, rows=slice(0, 4, 2))
    for out in (torch.empty(4, 64), torch.empty(64, 4, dtype=torch.bfloat16), torch.empty(3, 64, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="is needed"):
            weight.dequantize(torch.bfloat16, out=out)


def test_a_dense_weight_is_its_tensor():
    x = torch.randn(6, 8, dtype=torch.bfloat16)
    weight = DenseWeight(x)
    assert (weight.shape, weight.format, weight.nbytes) == ((6, 8), "bf16", 96)
    assert weight.dequantize(torch.bfloat16).data_ptr() == x.data_ptr()
    assert torch.equal(weight.dequantize(torch.float32), x.float())
    assert torch.equal(weight.dequantize(torch.float32, rows=slice(2, 5)), x[2:5].float())
    out = torch.empty(2, 8, dtype=torch.float16)
    assert weight.dequantize(torch.float16, out=out, rows=slice(4, None)) is out
    assert torch.equal(out, x[4:].half())
    assert [name for name, _ in weight.named_buffers()] == ["tensor"]
    assert torch.equal(weight.look_up(torch.tensor([5, 0]), torch.float32), x[[5, 0]].float())
    assert weight.is_dense_in(torch.bfloat16)
    assert not weight.is_dense_in(torch.float32)
    assert weight.trainable_tensor() is None
    assert weight.source_dtype == torch.bfloat16
    assert [DenseWeight(x.to(d)).format for d in (torch.float16, torch.float32)] == ["fp16", "fp32"]


def test_a_trained_dense_weight_is_a_parameter():
    weight = DenseWeight(torch.randn(6, 8, dtype=torch.bfloat16), trainable=True)
    assert [name for name, _ in weight.named_parameters()] == ["tensor"]
    assert weight.trainable_tensor() is weight.tensor
    weight.dequantize(torch.float32).sum().backward()
    assert torch.equal(weight.tensor.grad, torch.ones(6, 8, dtype=torch.bfloat16))


def test_a_dense_weight_refuses_what_it_cannot_be():
    for wrong in (torch.randn(4), torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="a dense weight is a matrix"):
            DenseWeight(wrong)
    one_row = DenseWeight(torch.randn(1, 4))
    for out in (torch.empty(3, 4), torch.empty(1, 4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="is needed"):
            one_row.dequantize(torch.float32, out=out)
