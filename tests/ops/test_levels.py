import torch

from halfbyte.ops import levels


def test_tables_are_those_of_bitsandbytes(bnb):
    for quant_type in ("nf4", "fp4"):
        assert torch.equal(levels.levels(quant_type), bnb.functional.get_4bit_type(quant_type, device="cpu"))
    for signed in (True, False):
        assert torch.equal(levels.dynamic_map(signed), bnb.functional.create_dynamic_map(signed))


def test_nf4_is_made_of_normal_quantiles():
    # QLoRA, appendix E: 8 quantiles of the positive half, 7 of the negative, and an exact zero between.
    normal = torch.distributions.Normal(0, torch.tensor(1.0, dtype=torch.float64))
    end = 0.9677083  # 1 - (1 / 32 + 1 / 30) / 2, rounded as bitsandbytes rounds it
    positive = normal.icdf(torch.linspace(end, 0.5, 9)[:-1].double())
    negative = -normal.icdf(torch.linspace(end, 0.5, 8)[:-1].double())
    expected = torch.cat([positive, negative, torch.zeros(1, dtype=torch.float64)]).sort().values
    torch.testing.assert_close(levels.levels("nf4").double(), expected / expected.max(), atol=4.5e-8, rtol=0)


def test_e2m1_is_the_standards_float():
    """A sign, two bits of exponent with bias 1, one of mantissa; 6 is the largest."""
    for code, level in enumerate(levels.levels("e2m1").tolist()):
        exponent, mantissa = code >> 1 & 3, code & 1
        size = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
        assert abs(level - (-1) ** (code >> 3) * size / 6) < 1e-7


def test_a_code_stands_for_the_level_it_is_ordered_by():
    for quant_type in levels.FOUR_BIT:
        middles, order = levels.ordering(quant_type)
        rising = levels.levels(quant_type)[order.long()]
        assert sorted(order.tolist()) == list(range(16))
        assert (rising.diff() >= 0).all()
        assert (middles >= rising[:-1]).all()
        assert (middles <= rising[1:]).all()


def test_the_rank_table_is_at_most_two_short():
    for signed in (True, False):
        first, middles = levels.dynamic_search(signed)
        edges = torch.cat(
            [middles[:-1], torch.nextafter(middles[:-1], torch.tensor(2.0)), torch.linspace(-1, 1, 99_991)]
        )
        for magnitude in (1.0, 1e-3, 1e-6, 1e-30):
            values = edges * magnitude
            upper = values.view(torch.int32).long() >> 16 & 0xFFFF
            missing = torch.bucketize(values, middles) - first[upper].long()
            assert missing.min() >= 0
            assert missing.max() <= 2
