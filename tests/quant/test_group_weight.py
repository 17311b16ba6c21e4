"""A weight in its GPTQ or AWQ file's codes: values on every instruction set, copies, bytes, and bad input."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.ops import native
from halfbyte.ops.linear import group_view
from halfbyte.quant import GroupWeight, awq_format, gptq_format
from halfbyte.quant.group_weight import held_bytes
from tests.ops.conftest import available
from tests.quant.group_codes import STORAGES, exact, random_codes

ISAS = [isa for isa in available() if isa in ("reference", *native.ISAS)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use(request.param)
    yield request.param
    native.use(None)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("columns", [256, 288])
def test_values(storage: str, columns: int) -> None:
    """The product of code and scale is exact in float32, and each type is rounded to once."""
    bits, size, shuffled = STORAGES[storage]
    codes = random_codes(30, columns, size, bits, shuffled=shuffled, first_zero=0)
    weight, expected = GroupWeight.from_codes(codes, "gptq"), exact(codes)
    assert torch.equal(expected.float().double(), expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(weight.dequantize(dtype), expected.float().to(dtype))
        assert torch.equal(weight.dequantize(dtype, rows=slice(7, 16)), expected[7:16].float().to(dtype))
        index = torch.tensor([29, 3, 3, 0, 17])
        assert torch.equal(weight.look_up(index, dtype), expected[index].float().to(dtype))
    out = torch.empty(4, columns)
    assert weight.dequantize(torch.float32, out, slice(2, 6)) is out
    assert torch.equal(out, expected[2:6].float())
    assert weight.dequantize(torch.float32, rows=slice(5, 5)).shape == (0, columns)


@pytest.mark.parametrize("isa_name", ISAS)
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(1, 40).map(lambda n: 2 * n),
    size=st.integers(1, 90),
    bits=st.sampled_from([4, 8]),
    shuffled=st.booleans(),
)
def test_any_shape(isa_name: str, rows: int, columns: int, size: int, bits: int, shuffled: bool) -> None:
    """Widths and groups that the engine does not read are decoded all the same; the last group may be short."""
    codes = random_codes(rows, columns, min(size, columns), bits, shuffled=shuffled)
    native.use(isa_name)
    try:
        assert torch.equal(GroupWeight.from_codes(codes, "gptq").dequantize(torch.float32), exact(codes).float())
    finally:
        native.use(None)


def test_what_the_weight_says_of_itself() -> None:
    codes = random_codes(6, 64, 32)
    weight = GroupWeight.from_codes(codes, "awq", torch.bfloat16)
    assert (weight.format, weight.shape, weight.source_dtype) == ("awq-4bit", (6, 64), torch.bfloat16)
    assert weight.group_of is None
    assert weight.nbytes == held_bytes((6, 64), 2, 4, False) == 6 * 32 + 6 * 2 * 4
    scattered = GroupWeight.from_codes(random_codes(6, 64, 32, 8, shuffled=True), "gptq")
    assert scattered.group_of is not None
    assert scattered.format == "gptq-8bit"
    assert scattered.nbytes == held_bytes((6, 64), 2, 8, True)
    assert weight.native_view() is not None
    assert GroupWeight.from_codes(random_codes(5, 64, 32), "gptq").native_view() is None  # an odd number of rows
    assert GroupWeight.from_codes(random_codes(6, 48, 16), "gptq").native_view() is None  # not whole runs of 32


def test_the_files_give_the_same_weight() -> None:
    codes = random_codes(16, 64, 32)
    packed = gptq_format.pack(codes, "x"), awq_format.pack(codes, "x")
    for found in (gptq_format.unpack(packed[0], "x"), awq_format.unpack(packed[1], "x")):
        weight = GroupWeight.from_codes(found, "gptq")
        assert torch.equal(weight.dequantize(torch.float32), exact(codes).float())


@pytest.mark.parametrize("storage", ["4-bit, groups of 32", "8-bit, act-order"])
def test_copies_and_types(storage: str) -> None:
    bits, size, shuffled = STORAGES[storage]
    codes = random_codes(4, 128, size, bits, shuffled=shuffled)
    weight = GroupWeight.from_codes(codes, "gptq")
    weight.dequantize(torch.float32)  # a view is kept, and must not be in the copies
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.to(torch.bfloat16)):
        kinds = {name: tensor.dtype for name, tensor in other.named_buffers()}
        assert kinds.pop("codes") == torch.uint8
        assert set(kinds.values()) == {torch.int32}
        assert torch.equal(other.dequantize(torch.float32), exact(codes).float())


def test_bad_input() -> None:
    weight = GroupWeight.from_codes(random_codes(4, 64, 32), "gptq")
    with pytest.raises(ValueError, match=r"\[4, 128\] in 4 bits are not"):
        GroupWeight(weight.codes, weight.constants, 4, (4, 128), 32)
    with pytest.raises(ValueError, match="5 columns of 4 bits"):
        GroupWeight.from_codes(random_codes(4, 5, 5), "gptq")
    for index in ([0, 4], [-1]):
        with pytest.raises(IndexError):
            weight.look_up(torch.tensor(index), torch.float32)
    with pytest.raises(ValueError, match="do not reach"):
        group_view(weight.codes[:100], weight.constants, 4, (4, 64), 32, None)
    with pytest.raises(ValueError, match="1 groups of 32 do not reach 64 columns"):
        group_view(weight.codes, weight.constants[:, :1].contiguous(), 4, (4, 64), 32, None)
