"""The grid of codes: what it holds exactly, how far a rounded value may be off, and its corner cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.quant.group_codes import (
    SMALLEST_SCALE,
    GroupCodes,
    contiguous_groups,
    encode,
    fit_grid,
    round_to_nearest,
    rounded,
    storable,
)

FLOATS = st.floats(-100, 100, width=32)


@given(st.lists(st.floats(1e-7, 6e4), min_size=1, max_size=50))
def test_scales_are_the_same_in_float16_and_bfloat16(values: list[float]) -> None:
    scales = storable(torch.tensor(values))
    assert torch.equal(scales.to(torch.float16).float(), scales)
    assert torch.equal(scales.to(torch.bfloat16).float(), scales)
    assert bool((scales >= SMALLEST_SCALE).all())


def test_a_scale_is_off_by_at_most_a_bfloat16_rounding() -> None:
    values = torch.logspace(-4, 4, 1000)
    assert float(((storable(values) - values) / values).abs().max()) <= 2**-8


@given(st.lists(FLOATS, min_size=1, max_size=40), st.booleans(), st.integers(0, 1), st.sampled_from([4, 8]))
def test_rounding_is_off_by_at_most_half_a_step(values: list[float], sym: bool, first_zero: int, bits: int) -> None:
    x = torch.tensor(values)
    scale, zero = fit_grid(x.min(), x.max(), bits, sym, first_zero)
    assert first_zero <= float(zero) <= 2**bits - 1
    error = ((encode(x, scale, zero, bits) - zero) * scale - x).abs().max()
    # The symmetric grid's top is half a step short; the scale's rounding to 8 bits moves both ends.
    # A tiny scale is one of float16's subnormal numbers, 2**-24 apart, and every step of the grid is off by as much.
    slack = float(x.abs().max()) * 2**-7 + (2**bits - 1) * 2**-25
    assert float(error) <= float(scale) * (1.0 if sym else 0.5 + 0.5) + slack


@pytest.mark.parametrize("sym", [True, False])
def test_zero_stays_zero_and_zeros_are_harmless(sym: bool) -> None:
    weight = torch.zeros(8, 64)
    weight[3] = torch.linspace(0, 1, 64)  # nothing below zero
    weight[4] = torch.linspace(-1, 0, 64)
    codes = round_to_nearest(weight, 32, sym=sym)
    back = codes.dequantize()
    assert torch.equal(back[:3], torch.zeros(3, 64))
    assert back[3, 0] == 0
    assert back[4, -1] == 0
    assert float((back - weight).abs().max()) < 0.08


def test_a_range_that_begins_at_zero_is_widened_where_zero_points_begin_at_one() -> None:
    weight = torch.linspace(0, 1, 32)[None]
    codes = round_to_nearest(weight, 32, first_zero=1)
    assert int(codes.zeros) == 1
    assert float((codes.dequantize() - weight).abs().max()) < 0.5 / 14 + 0.01


def test_each_group_has_the_scale_that_its_values_need(by_hand: GroupCodes) -> None:
    expected = torch.tensor([[(0 - 1) * 0.5, (3 - 1) * 0.5, (15 - 2) * 2.0, (2 - 2) * 2.0]])
    assert torch.equal(by_hand.dequantize(), expected)
    assert by_hand.shape == (1, 4)


@pytest.fixture
def by_hand() -> GroupCodes:
    codes = torch.tensor([[0], [3], [15], [2]], dtype=torch.uint8)
    scales, zeros = torch.tensor([[0.5], [2.0]]), torch.tensor([[1], [2]], dtype=torch.uint8)
    return GroupCodes(codes, scales.half(), zeros, contiguous_groups(4, 2), 4)


def test_groups_in_any_order_are_told_from_neighbouring_ones(by_hand: GroupCodes) -> None:
    assert by_hand.is_contiguous
    order: Tensor = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    shuffled = GroupCodes(by_hand.codes, by_hand.scales, by_hand.zeros, order, 4)
    assert not shuffled.is_contiguous
    expected = torch.tensor([[(0 - 2) * 2.0, (3 - 1) * 0.5, (15 - 2) * 2.0, (2 - 1) * 0.5]])
    assert torch.equal(shuffled.dequantize(), expected)


def test_shrinking_a_group_clips_its_largest_values() -> None:
    weight = torch.cat([torch.full((1, 31), 0.1), torch.ones(1, 1)], 1)
    whole = round_to_nearest(weight, 32).dequantize()
    shrunk = round_to_nearest(weight, 32, shrink=torch.full((1, 1), 0.55)).dequantize()
    assert float(whole[0, -1]) == pytest.approx(1, abs=0.01)
    assert float(shrunk[0, -1]) == pytest.approx(0.55, abs=0.01)
    assert float((shrunk - weight)[0, :31].abs().max()) <= float((whole - weight)[0, :31].abs().max())


def test_rounding_without_codes_gives_the_same_numbers() -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    for shrink in (None, torch.rand(6, 3, generator=torch.Generator().manual_seed(1))):
        assert torch.equal(rounded(weight, 32, shrink), round_to_nearest(weight, 32, shrink=shrink).dequantize())
