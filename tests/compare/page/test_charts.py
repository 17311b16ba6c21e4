"""Where the charts put things: axes, fronts, labels that do not cover each other."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.compare.page.document import Svg
from halfbyte.compare.page.lines import Curve, apart, lines, thinned
from halfbyte.compare.page.rows import Row, points, stacks
from halfbyte.compare.page.scatter import Spot, front, scatter
from halfbyte.compare.page.svg import COLOURS, DASHES, Axis, LogAxis, colour, round_values, shape

FINITE = st.floats(-1e15, 1e15)


@pytest.mark.parametrize(
    ("low", "high", "ticks", "decimals"),
    [
        (0.0, 4.4, [0, 1, 2, 3, 4], 0),
        (0.29, 0.33, [0.29, 0.3, 0.31, 0.32, 0.33], 2),
        (0.0, 1.1, [0, 0.25, 0.5, 0.75, 1.0], 2),
        (-300.0, 250.0, [-200, 0, 200], 0),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float], decimals: int) -> None:
    assert round_values(low, high, 5 if high < 100 else 3) == (pytest.approx(ticks), decimals)


@given(st.lists(FINITE, max_size=5))
def test_an_axis_holds_its_values(values: list[float]) -> None:
    axis = Axis(values, 10, 110, 5)
    assert axis.low < axis.high
    assert all(9.99 <= axis.at(value) <= 110.01 for value in values)
    assert all(axis.low - 1e-6 * abs(axis.low) <= tick <= axis.high + 1e-6 * abs(axis.high) for tick in axis.ticks)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1), st.booleans())
def test_nothing_beats_the_front(spots: list[tuple[float, float]], higher: bool) -> None:
    sign = -1 if higher else 1
    best = front(spots, higher)
    for x, y in best:
        assert not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b in spots)
    for a, b in spots:
        assert any(x <= a and sign * y <= sign * b for x, y in best)


@given(st.lists(st.floats(0, 300), max_size=12))
def test_labels_stand_apart(wanted: list[float]) -> None:
    places = apart(sorted(wanted), 16, 20, 320)
    assert all(b - a >= 16 - 1e-9 for a, b in pairwise(places))
    assert all(place <= 320 for place in places)


def test_a_curve_keeps_its_ends() -> None:
    assert thinned(5, 8) == [0, 1, 2, 3, 4]
    assert thinned(1000, 8)[0::7] == [0, 999]
    assert len(thinned(1000, 8)) == 8


def test_many_variants_look_different() -> None:
    looks = {(colour(i), shape(i)) for i in range(56)}
    assert len(looks) == 56
    assert len({(colour(i).split()[1], shape(i)) for i in range(35)}) == 35, "without colours, too"
    assert (COLOURS, DASHES) == (8, 5)


def _xs(svg: Svg, style: str) -> list[float]:
    return [float(x) for x in re.findall(rf'<path class="{style}[^"]*"[^>]*translate\(([\d.-]+) ', svg.body)]


def test_marks_are_where_the_axis_says() -> None:
    svg = points([Row("a", "1", 0, 1.0), Row("b", "3", 1, 3.0), Row("c", "2", 2, 2.0)], "unit", zero=True)
    one, three, two = _xs(svg, "mark")[1::2]
    assert two - one == pytest.approx(three - two, abs=0.2)
    assert one < two < three


def test_stacked_parts_have_their_shares() -> None:
    svg = stacks([Row("a", "4", 0, 4.0, parts=[(0, 1.0), (1, 3.0)])], "GB", wide=True)
    first, second = (float(size) for size in re.findall(r'class="part k\d" [^>]*width="([\d.]+)"', svg.body))
    assert (second + 1.2) / (first + 1.2) == pytest.approx(3, rel=0.01)


def test_a_band_needs_both_ends() -> None:
    bare = Curve("a", 0, [(0.0, 1.0, None, None), (1.0, 0.5, None, None)])
    banded = Curve("b", 1, [(0.0, 1.0, 0.9, 1.1), (1.0, 0.5, 0.4, 0.6)])
    assert lines([bare], "x", "y", True).body.count('class="area') == 0
    assert lines([bare, banded], "x", "y", True).body.count('class="area') == 1


def test_a_name_far_from_its_mark_or_near_another_carries_the_mark() -> None:
    close = [Spot(f"method {i}", "1 s", i, 1 + i / 1000, 1 + i / 1000, True) for i in range(5)]
    close.append(Spot("far", "1 s", 5, 2.0, 2.0, True))
    alone = [Spot("method", "1 s", 0, 1.0, 1.0, True)]
    assert len(_xs(scatter(close, "x", "y", False, True), "mark")) > len(close)
    assert len(_xs(scatter(alone, "x", "y", False, True), "mark")) == 1


def test_many_names_are_listed_beside_the_plot() -> None:
    many = [Spot(f"method {i}", "1 s", i, float(i), float(i), True) for i in range(30)]
    svg = scatter(many, "x", "y", False, True)
    assert len(_xs(svg, "mark")) == 60
    assert svg.height > 500


def test_a_logarithmic_axis() -> None:
    axis = LogAxis([8.7, 0.1, 0.0, -1.0], 200, 0, 6)
    assert axis.ticks == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert [axis.label(tick) for tick in axis.ticks] == ["0.1", "0.2", "0.5", "1", "2", "5", "10"]
    assert axis.at(1.0) - axis.at(0.1) == pytest.approx(axis.at(10.0) - axis.at(1.0))
    assert axis.at(-3.0) == axis.at(0.0) == 200
    assert axis.at(1e9) == pytest.approx(0)
    assert LogAxis([1e-6, 1e3], 200, 0, 6).ticks == pytest.approx([10.0**power for power in range(-6, 4)])


def test_curves_that_fall_far_are_drawn_by_logarithms() -> None:
    far = Curve("a", 0, [(0, 8.7, 8.0, 99.0), (1, 0.1, -0.2, 0.3)])
    near = Curve("a", 0, [(0, 2.1, None, None), (1, 0.9, None, None)])
    assert "logarithmic" in lines([far], "x", "loss", True).body
    assert "logarithmic" not in lines([near], "x", "loss", True).body
    below = Curve("a", 0, [(0, 2.1, None, None), (1, -0.9, None, None)])
    assert "logarithmic" not in lines([below], "x", "loss", True).body
