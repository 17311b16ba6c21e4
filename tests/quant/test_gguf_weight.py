"""A weight in its file's blocks: values, rows in the file's order, copies, and bad input."""

import copy
import pickle
from collections.abc import Iterator

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from halfbyte.errors import UsageError
from halfbyte.ops import native
from halfbyte.ops.linear import GGUF_TYPES, decode_rows
from halfbyte.quant import GgufWeight
from tests.models.gguf_files import permuted
from tests.ops.conftest import available
from tests.quant.gguf_blocks import random_weight


@pytest.fixture(params=[isa for isa in available() if isa in ("reference", *native.ISAS)])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use(request.param)
    yield request.param
    native.use(None)


def exact(weight: GgufWeight) -> torch.Tensor:
    blocks = weight.data.view(-1, weight.block_bytes).numpy()
    values = torch.from_numpy(gguf.quants.dequantize(blocks, Kind[weight.type_name])).view(weight.shape)
    if not weight.head_rows:
        return values
    half = weight.head_rows // 2
    return values.view(-1, half, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("head_rows", [0, 10])
def test_values(kind: str, head_rows: int) -> None:
    weight = random_weight(kind, 30, 512, head_rows)
    expected = exact(weight)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(weight.dequantize(dtype), expected.to(dtype))
        assert torch.equal(weight.dequantize(dtype, rows=slice(7, 16)), expected[7:16].to(dtype))
        index = torch.tensor([29, 3, 3, 0, 17])
        assert torch.equal(weight.look_up(index, dtype), expected[index].to(dtype))
    out = torch.empty(4, 512)
    assert weight.dequantize(torch.float32, out, slice(2, 6)) is out
    assert torch.equal(out, expected[2:6])
    assert weight.dequantize(torch.float32, rows=slice(5, 5)).shape == (0, 512)
    assert weight.format == kind.lower()
    assert weight.nbytes == weight.data.numel()


def test_heads_come_back_in_the_order_that_the_converter_changed() -> None:
    """The bytes of the permuted rows, un-permuted, are the rows."""
    plain = random_weight("Q4_K", 24, 256)
    rows = plain.data.view(24, -1)
    mixed = GgufWeight(permuted(rows, 3).reshape(-1).clone(), "Q4_K", (24, 256), head_rows=8)
    assert torch.equal(mixed.dequantize(torch.float32), plain.dequantize(torch.float32))


def test_copies_and_types() -> None:
    weight = random_weight("Q6_K", 4, 256)
    assert weight.native_view() is not None or native.backend().name == "reference"
    for other in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), weight.to(torch.bfloat16)):
        assert other.data.dtype == torch.uint8
        assert torch.equal(other.dequantize(torch.float32), exact(weight))


def test_bad_input() -> None:
    data = random_weight("Q4_K", 4, 256).data
    with pytest.raises(ValueError, match="rows of 128 is not a base"):
        GgufWeight(data, "Q4_K", (8, 128))
    with pytest.raises(ValueError, match="720 bytes are needed"):
        GgufWeight(data, "Q4_K", (5, 256))
    with pytest.raises(ValueError, match="IQ4_NL in rows"):
        GgufWeight(data, "IQ4_NL", (4, 256))
    with pytest.raises(UsageError, match="4 rows are not heads of 3"):
        GgufWeight(data, "Q4_K", (4, 256), head_rows=3)
    weight = random_weight("Q4_K", 4, 256)
    for index in ([0, 4], [-1]):
        with pytest.raises(IndexError):
            weight.look_up(torch.tensor(index), torch.float32)
    view = weight.native_view()
    if view is not None:
        with pytest.raises(ValueError, match="rows of 256 are needed"):
            decode_rows(view, torch.empty(1, 512))
