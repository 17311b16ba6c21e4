"""Rounding onto a file's own levels: without an update nothing changes, and a small one is there in the mean."""

import pytest
import torch

from halfbyte.quant.gguf_decode import dequantize_into
from halfbyte.quant.gguf_reround import TYPES, reround
from tests.quant.gguf_blocks import random_blocks


def decoded(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    out = torch.empty(blocks.shape[0], 256 if kind.endswith("_K") else 32)
    dequantize_into(blocks, kind, out)
    return out


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("seed", [None, 0])
def test_a_base_without_an_update_stays_bit_for_bit(kind: str, seed: int | None) -> None:
    blocks = torch.from_numpy(random_blocks(kind, 500))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    made = reround(blocks, kind, decoded(blocks, kind), generator)
    same = (made == blocks).all(1)
    # Where a scale is zero all codes are one value: the values must be the same everywhere, the bytes elsewhere.
    assert torch.equal(decoded(made, kind), decoded(blocks, kind))
    assert same.float().mean() > (0.5 if kind.endswith("_K") else 0.99)


@pytest.mark.parametrize("kind", TYPES)
def test_a_small_update_survives_in_the_mean(kind: str) -> None:
    """The nearest level forgets it; drawn levels keep it, with less noise than a quantization of its own."""
    torch.manual_seed(0)
    blocks = torch.from_numpy(random_blocks(kind, 2000, scale=0.1))
    base = decoded(blocks, kind)
    spread = base.std(1, keepdim=True)
    update = 0.002 * spread * torch.randn(2000, 1).sign()
    wanted = base + update
    drawn = decoded(reround(blocks, kind, wanted, torch.Generator().manual_seed(1)), kind)
    nearest = decoded(reround(blocks, kind, wanted, None), kind)
    inside = (drawn - base).abs() < 3 * spread  # not at the end of the codes, where there is no next level

    def strength(found: torch.Tensor) -> float:
        return float(((found - base) * update)[inside].sum() / (update * update).expand_as(base)[inside].sum())

    assert 0.8 < strength(drawn) < 1.2
    if kind != "Q8_0":
        assert strength(nearest) < 0.2
    error = (drawn - wanted)[inside].square().mean()
    assert error < 2 * (update.abs() * spread)[:, :1].mean()


def test_bad_values() -> None:
    blocks = torch.from_numpy(random_blocks("Q4_K", 2))
    values = torch.zeros(2, 256)
    values[1, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        reround(blocks, "Q4_K", values, None)
    # Far beyond the last level: the last level.
    assert torch.isfinite(decoded(reround(blocks, "Q4_K", torch.full((2, 256), 1e9), None), "Q4_K")).all()
