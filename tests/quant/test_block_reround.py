"""Rounding onto the levels of 4-bit blocks: without an update nothing changes, a small one is there in the mean."""

import pytest
import torch

from halfbyte.quant import BlockWeight, QuantOptions, quantize
from halfbyte.quant.block_reround import reround


def made(quant_type: str, double: bool, blocksize: int = 64) -> BlockWeight:
    torch.manual_seed(0)
    options = QuantOptions(quant_type=quant_type, double_quant=double, blocksize=blocksize)  # type: ignore[arg-type]
    weight = torch.randn(40, 96).bfloat16()
    weight[3, :64] = 0
    return quantize(weight, options)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "e2m1", "int4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("blocksize", [64, 256])
def test_without_an_update_every_value_stays(quant_type: str, double: bool, blocksize: int) -> None:
    base = made(quant_type, double, blocksize)
    again = reround(base, base.dequantize(torch.float32), torch.Generator().manual_seed(0))
    assert torch.equal(again.dequantize(torch.float32), base.dequantize(torch.float32))
    assert (again.format, again.source_dtype, again.nbytes) == (base.format, base.source_dtype, base.nbytes)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "e2m1", "int4"])
def test_a_small_update_survives_in_the_mean(quant_type: str) -> None:
    torch.manual_seed(1)
    options = QuantOptions(quant_type=quant_type)  # type: ignore[arg-type]
    base = quantize(torch.randn(512, 1024).bfloat16(), options)
    before = base.dequantize(torch.float32)
    update = 0.01 * torch.randn(512, 1).sign().expand(512, 1024)
    inner = before.abs() < 1.5  # a block's largest value has no next level outward

    def strength(found: BlockWeight) -> float:
        change = found.dequantize(torch.float32) - before
        return float((change * update)[inner].sum() / (update * update)[inner].sum())

    assert 0.9 < strength(reround(base, before + update, torch.Generator().manual_seed(2))) < 1.1
    assert strength(quantize((before + update).bfloat16(), options)) < 0.7


def test_bad_values() -> None:
    base = made("nf4", True)
    values = base.dequantize(torch.float32)
    values[2, 2] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        reround(base, values, torch.Generator())
