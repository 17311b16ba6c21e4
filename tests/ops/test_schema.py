"""The operators as torch sees them: opcheck on each, and what they refuse."""

import pytest
import torch

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.ops import levels

NAMES = torch.ops.halfbyte


@pytest.mark.parametrize("quant_type", levels.QUANT_TYPES)
def test_opcheck(quant_type):
    x = torch.randn(7, 33, dtype=torch.bfloat16)
    torch.library.opcheck(NAMES.quantize_blockwise.default, (x, quant_type, 32))
    codes, absmax = ops.quantize_blockwise(x, quant_type, 32)
    arguments = (codes, absmax, quant_type, 32)
    torch.library.opcheck(NAMES.dequantize_blockwise.default, (*arguments, (7, 33), torch.float16))
    torch.library.opcheck(NAMES.dequantize_blockwise_out.default, (*arguments, torch.empty(5, 33), 66))


def test_opcheck_nested_and_dynamic():
    x = torch.randn(7, 33)
    codes, absmax = ops.quantize_blockwise(x, "nf4", 32)
    torch.library.opcheck(NAMES.quantize_dynamic.default, (absmax, 256))
    nested, nested_absmax = ops.quantize_dynamic(absmax)
    torch.library.opcheck(NAMES.dequantize_dynamic.default, (nested, nested_absmax, 256, levels.dynamic_map().clone()))
    torch.library.opcheck(
        NAMES.dequantize_blockwise_out.default,
        (codes, nested, "nf4", 32, torch.empty(7, 33), 0, None, nested_absmax, torch.tensor(0.5), None, 256),
    )


def test_compiles():
    codes, absmax = ops.quantize_blockwise(torch.randn(40, 40), "nf4", 64)

    def double(codes, absmax):
        return 2 * ops.dequantize_blockwise(codes, absmax, "nf4", 64, (40, 40), torch.float32)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(codes, absmax), double(codes, absmax))


def test_unknown_formats_and_sizes_are_usage_errors():
    x = torch.randn(64)
    with pytest.raises(UsageError, match="quant_type 'nf5' is not one of nf4, fp4, e2m1, int4, int8"):
        ops.quantize_blockwise(x, "nf5")
    for blocksize in (0, -64, 16, 48, 8192):
        with pytest.raises(UsageError, match=f"blocksize {blocksize} is not one of 32, 64,"):
            ops.quantize_blockwise(x, "nf4", blocksize)
        with pytest.raises(UsageError, match="blocksize"):
            ops.quantize_dynamic(x, blocksize)
    with pytest.raises(UsageError, match=r"cannot quantize torch\.float64"):
        ops.quantize_blockwise(x.double(), "nf4")
    with pytest.raises(UsageError, match=r"cannot quantize torch\.int64"):
        ops.quantize_dynamic(x.long())


def _good() -> dict[str, object]:
    codes, absmax = ops.quantize_blockwise(torch.randn(1000), "nf4", 64)
    nested, nested_absmax = ops.quantize_dynamic(absmax)
    return {
        "codes": codes,
        "absmax": nested,
        "quant_type": "nf4",
        "blocksize": 64,
        "out": torch.empty(1000),
        "nested_absmax": nested_absmax,
        "nested_offset": torch.tensor(0.1),
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"codes": torch.zeros(499, dtype=torch.uint8)},
        {"codes": torch.zeros(500, dtype=torch.int8)},
        {"codes": torch.zeros(500, 1, dtype=torch.uint8)},
        {"codes": torch.zeros(1000, dtype=torch.uint8)[::2]},
        {"absmax": torch.zeros(15, dtype=torch.uint8)},
        {"absmax": torch.zeros(16)},
        {"blocksize": 32},
        {"start": 1},
        {"start": -1},
        {"out": torch.empty(1001)},
        {"out": torch.empty(1000, dtype=torch.float64)},
        {"out": torch.empty(2000)[::2]},
        {"table": torch.zeros(15)},
        {"table": torch.zeros(16, dtype=torch.float16)},
        {"nested_absmax": torch.zeros(0)},
        {"nested_absmax": torch.zeros(1, dtype=torch.bfloat16)},
        {"nested_absmax": None},
        {"nested_offset": None},
        {"nested_offset": torch.zeros(2)},
        {"nested_offset": torch.tensor(0.1, dtype=torch.bfloat16)},
        {"nested_table": torch.zeros(255)},
        {"nested_blocksize": 100},
    ],
)
def test_nothing_is_read_or_written_past_the_end(wrong):
    good = _good()
    ops.dequantize_blockwise_out(**good)
    with pytest.raises((ValueError, UsageError)):
        ops.dequantize_blockwise_out(**(good | wrong))


def test_dynamic_refuses_wrong_sizes():
    codes, absmax = ops.quantize_dynamic(torch.randn(1000))
    for wrong in (absmax[:3], absmax.double()):
        with pytest.raises(ValueError):
            ops.dequantize_dynamic(codes, wrong)
    with pytest.raises(ValueError, match="table"):
        ops.dequantize_dynamic(codes, absmax, table=torch.zeros(16))
