"""GPTQ's and AWQ's tensors: against the published loops, round trips, and files that are not whole."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.quant import awq_format, gptq_format
from halfbyte.quant.group_codes import GroupCodes
from halfbyte.quant.int32_words import pack_words, unpack_words
from tests.quant.group_codes import random_codes


def test_one_group_of_all_inputs() -> None:
    """Zero points of one row, turned, are contiguous in name only."""
    codes = random_codes(16, 64, -1)
    turned = GroupCodes(codes.codes, codes.scales, codes.zeros.t().contiguous().t(), codes.group_of, 4)
    for module in (gptq_format, awq_format):
        assert equal(module.unpack(module.pack(turned, "x"), "x"), codes)


def equal(one: GroupCodes, other: GroupCodes) -> bool:
    fields = ("codes", "scales", "zeros", "group_of")
    same = all(torch.equal(getattr(one, field), getattr(other, field)) for field in fields)
    return same and one.bits == other.bits


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
def test_words_hold_the_first_code_in_the_lowest_bits(bits: int, data: st.DataObject) -> None:
    per_word = 32 // bits
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=per_word, max_size=per_word))
    word = pack_words(torch.tensor([codes], dtype=torch.uint8), bits)
    assert word.tolist() == [[signed(sum(code << (bits * i) for i, code in enumerate(codes)))]]
    assert unpack_words(word, bits).tolist() == [codes]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", gptq_format.FORMATS)
def test_gptq_equals_the_published_loops(bits: int, version: str) -> None:
    """The loops of AutoGPTQ's QuantLinear.pack: a word at a time, shift by shift."""
    codes = random_codes(16, 64, 32, bits, shuffled=True)
    packed = gptq_format.pack(codes, "l", version)
    n = 32 // bits
    for row in range(64 // n):
        for column in range(16):
            word = 0
            for j in range(n):
                word |= int(codes.codes[row * n + j, column]) << (bits * j)
            assert int(packed["l.qweight"][row, column]) == signed(word)
    for group in range(2):
        for column in range(16 // n):
            word = 0
            for j in range(n):
                zero = int(codes.zeros[group, column * n + j]) - (1 if version == "gptq" else 0)
                word |= zero << (bits * j)
            assert int(packed["l.qzeros"][group, column]) == signed(word)
    assert torch.equal(packed["l.scales"], codes.scales)
    assert torch.equal(packed["l.g_idx"], codes.group_of)
    assert {key: (tuple(t.shape), t.dtype) for key, t in packed.items()} == {
        f"l.{key}": form for key, form in gptq_format.shapes(16, 64, 32, bits).items()
    }


def test_awq_equals_the_published_loops() -> None:
    """The loops of AutoAWQ's WQLinear_GEMM.from_linear, with its order_map."""
    codes = random_codes(24, 64, 32, first_zero=0)
    packed = awq_format.pack(codes, "l")
    order_map = [0, 2, 4, 6, 1, 3, 5, 7]
    for name, values in (("qweight", codes.codes), ("qzeros", codes.zeros)):
        for row in range(values.shape[0]):
            for column in range(24 // 8):
                word = 0
                for i in range(8):
                    word |= int(values[row, column * 8 + order_map[i]]) << (i * 4)
                assert int(packed[f"l.{name}"][row, column]) == signed(word)
    assert {key: (tuple(t.shape), t.dtype) for key, t in packed.items()} == {
        f"l.{key}": form for key, form in awq_format.shapes(24, 64, 32).items()
    }


@given(
    st.integers(1, 4), st.integers(1, 4), st.sampled_from([4, 8]), st.booleans(), st.sampled_from(gptq_format.FORMATS),
    st.integers(0, 999),
)  # fmt: skip
def test_gptq_round_trip(eights: int, groups: int, bits: int, shuffled: bool, version: str, seed: int) -> None:
    codes = random_codes(8 * eights, 16 * groups, 16, bits, seed, shuffled, gptq_format.FIRST_ZERO[version])
    assert equal(gptq_format.unpack(gptq_format.pack(codes, "l", version), "l", bits, version), codes)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_awq_round_trip(eights: int, groups: int, seed: int) -> None:
    codes = random_codes(8 * eights, 16 * groups, 16, 4, seed, first_zero=0)
    assert equal(awq_format.unpack(awq_format.pack(codes, "l"), "l"), codes)


def test_a_zero_point_of_zero_is_not_written_where_loaders_would_carry_it() -> None:
    codes = random_codes(8, 32, 32)
    codes.zeros[0, 3] = 0
    with pytest.raises(ValueError, match="zero point of 0"):
        gptq_format.pack(codes, "l", "gptq")
    assert equal(gptq_format.unpack(gptq_format.pack(codes, "l", "gptq_v2"), "l", 4, "gptq_v2"), codes)


def test_a_stored_15_is_read_as_zero() -> None:
    packed = gptq_format.pack(random_codes(8, 32, 32), "l")
    packed["l.qzeros"] = torch.full_like(packed["l.qzeros"], -1)
    assert gptq_format.unpack(packed, "l").zeros.unique().tolist() == [0]


def test_files_without_g_idx_have_contiguous_groups() -> None:
    codes = random_codes(8, 96, 32)
    packed = gptq_format.pack(codes, "l")
    del packed["l.g_idx"]
    assert equal(gptq_format.unpack(packed, "l"), codes)
    assert equal(gptq_format.unpack(packed, "l", group_size=32), codes)
    with pytest.raises(UsageError, match="96 inputs in groups of 64 are not the 3 groups"):
        gptq_format.unpack(packed, "l", group_size=64)


def test_one_group_for_all_inputs() -> None:
    packed = gptq_format.pack(random_codes(8, 96, 96), "l")
    del packed["l.g_idx"]
    assert gptq_format.unpack(packed, "l", group_size=-1).group_of.unique().tolist() == [0]


def test_awq_has_no_place_for_act_order_or_8_bits() -> None:
    for codes in (random_codes(8, 64, 32, shuffled=True), random_codes(8, 64, 32, bits=8)):
        with pytest.raises(ValueError, match="AWQ holds 4 bits in contiguous groups"):
            awq_format.pack(codes, "l")


GPTQ_DAMAGE: list[tuple[str, Callable[[Tensor], Tensor | None], str]] = [
    ("qweight", lambda _: None, "l.qweight is missing"),
    ("qweight", lambda t: t.to(torch.int64), "l.qweight: torch.int64"),
    ("qweight", lambda t: t[:, :-1], "l.qweight: .*the tensors beside it need"),
    ("qweight", lambda t: t[0], "in 2 dimensions is needed"),
    ("qzeros", lambda t: t[:, :-1], "l.qzeros: .*the tensors beside it need"),
    ("qzeros", lambda _: None, "l.qzeros is missing"),
    ("scales", lambda t: t * float("nan"), "l.scales holds NaN"),
    ("scales", lambda t: t.to(torch.int32), "floating point in 2 dimensions is needed"),
    ("g_idx", lambda t: t + 1, "l.g_idx names groups beyond the 2"),
    ("g_idx", lambda t: -t, "l.g_idx names groups beyond the 2"),
    ("g_idx", lambda t: t[:-1], "l.g_idx: .*the tensors beside it need"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "damage", "message"), GPTQ_DAMAGE)
def test_damaged_gptq_tensors(part: str, damage: Callable[[Tensor], Tensor | None], message: str) -> None:
    packed = gptq_format.pack(random_codes(16, 64, 32), "l")
    changed = damage(packed.pop(f"l.{part}"))
    if changed is not None:
        packed[f"l.{part}"] = changed
    with pytest.raises(UsageError, match=message):
        gptq_format.unpack(packed, "l")


@pytest.mark.parametrize(("part", "damage", "message"), [case for case in GPTQ_DAMAGE if case[0] != "g_idx"])
def test_damaged_awq_tensors(part: str, damage: Callable[[Tensor], Tensor | None], message: str) -> None:
    packed = awq_format.pack(random_codes(16, 64, 32), "l")
    changed = damage(packed.pop(f"l.{part}"))
    if changed is not None:
        packed[f"l.{part}"] = changed
    with pytest.raises(UsageError, match=message):
        awq_format.unpack(packed, "l")


def test_awq_groups_that_do_not_divide() -> None:
    packed = awq_format.pack(random_codes(16, 64, 32), "l")
    packed["l.qweight"] = packed["l.qweight"][:-1]
    with pytest.raises(UsageError, match="63 inputs in 2 groups"):
        awq_format.unpack(packed, "l")


def test_unknown_versions() -> None:
    packed = gptq_format.pack(random_codes(16, 64, 32), "l")
    with pytest.raises(UsageError, match="3 bits; 4 and 8 can be read"):
        gptq_format.unpack(packed, "l", 3)
    with pytest.raises(UsageError, match="checkpoint_format 'marlin'"):
        gptq_format.unpack(packed, "l", 4, "marlin")
