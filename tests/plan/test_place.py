"""Placing: properties that hold for any jobs and devices, and the cases that people ask about."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import UsageError
from halfbyte.plan.calibration import Interval
from halfbyte.plan.catalog import find_machine
from halfbyte.plan.place import Device, Job, Placement, Way, place
from halfbyte.plan.price import Price

GB, HOUR = 10**9, 3600.0


def way(method: str, gb: float, hours: float, device: str | None = None) -> Way:
    return Way(method, int(gb * GB), Interval(hours * HOUR, 1.5 * hours * HOUR), device)


def device(name: str, gb: float, price: float | None = None, **busy: float) -> Device:
    free = int(busy["free"] * GB) if "free" in busy else None
    euro = None if price is None else Price(price, "EUR")
    return Device(name, int(gb * GB), euro, free, busy.get("free_from", 0.0) * HOUR)


SMALL, MIDDLE, BIG = device("rtx-3060", 11.5, 0.1), device("rtx-4090", 23.5, 0.4), device("h100", 79, 2.5)

# -- properties -------------------------------------------------------------------------------------------------------

ways = st.builds(
    lambda m, gb, p50, slack, d: Way(m, gb * GB, Interval(p50, p50 * slack), d),
    st.sampled_from(["qlora", "lora", "full"]),
    st.integers(1, 100),
    st.floats(1, 1e5),
    st.floats(1, 2),
    st.sampled_from([None, None, "d0", "d1"]),
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Job], list[Device]]:
    priced = draw(st.booleans())
    devices = [
        Device(
            f"d{i}",
            draw(st.integers(1, 90)) * GB,
            Price(draw(st.floats(0, 5)), "EUR") if priced else None,
            draw(st.one_of(st.none(), st.integers(0, 90).map(lambda n: n * GB))),
            draw(st.sampled_from([0.0, 0.0, 500.0, 50_000.0])),
        )
        for i in range(draw(st.integers(0, 4)))
    ]
    jobs = [
        Job(
            f"j{i}",
            tuple(draw(st.lists(ways, min_size=1, max_size=3))),
            draw(st.sampled_from(["cheapest", "fastest"])),
            draw(st.one_of(st.none(), st.floats(10, 2e5))),
        )
        for i in range(draw(st.integers(0, 6)))
    ]
    return jobs, devices


def named(devices: Sequence[Device]) -> dict[str, Device]:
    return {d.name: d for d in devices}


@given(problems())
@settings(max_examples=150, deadline=None)
def test_every_job_is_placed_once_or_said_to_be_impossible(problem: tuple[list[Job], list[Device]]) -> None:
    jobs, devices = problem
    made = place(jobs, devices)
    assert sorted([p.job for p in made.placed] + list(made.impossible)) == sorted(job.name for job in jobs)
    for reason in (*made.impossible.values(), *(p.reason for p in made.placed)):
        assert reason
        assert "\n" not in reason


@given(problems())
@settings(max_examples=150, deadline=None)
def test_never_over_memory_and_never_two_of_ours_at_once(problem: tuple[list[Job], list[Device]]) -> None:
    jobs, devices = problem
    for d in devices:
        mine = sorted((p for p in place(jobs, devices).placed if p.device == d.name), key=lambda p: p.start.p95)
        for p in mine:
            assert p.way.memory <= d.memory
            if p.beside or p.start.p95 < d.free_from - 1e-6:
                assert p.way.memory <= d.free_now
            assert p.way.device in (None, d.name)
        for before, after in pairwise(mine):
            assert after.start.p95 >= before.end.p95 - 1e-6
            assert after.start.p50 >= before.end.p50 - 1e-6


@given(problems())
@settings(max_examples=150, deadline=None)
def test_deadlines_hold_and_nothing_takes_less_than_its_time(problem: tuple[list[Job], list[Device]]) -> None:
    jobs, devices = problem
    by_name = {job.name: job for job in jobs}
    for p in place(jobs, devices).placed:
        deadline = by_name[p.job].deadline
        assert deadline is None or p.end.p95 <= deadline
        assert p.start.p50 <= p.start.p95 + 1e-9
        assert p.end.p50 <= p.end.p95 + 1e-6
        assert p.end.p95 - p.start.p95 >= p.way.seconds.p95 - 1e-6
        if not p.beside:
            assert p.end.p95 - p.start.p95 == pytest.approx(p.way.seconds.p95)


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_in_which_things_are_given_does_not_matter(
    problem: tuple[list[Job], list[Device]], shuffle: random.Random
) -> None:
    jobs, devices = problem
    first = place(jobs, devices)
    shuffle.shuffle(jobs)
    shuffle.shuffle(devices)
    again = [Job(job.name, tuple(shuffle.sample(job.ways, len(job.ways))), job.pick, job.deadline) for job in jobs]
    assert [(p.job, p.device, p.start, p.end, p.way.memory) for p in place(again, devices).placed] == [
        (p.job, p.device, p.start, p.end, p.way.memory) for p in first.placed
    ]


def simple(jobs: Sequence[Job], devices: Sequence[Device]) -> tuple[int, float, float]:
    """A greedy one of its own, on idle devices: by name, to the cheapest (or soonest) that holds it and is in time.

    Returns how many it could not place, what its thrifty jobs cost, and when the last one ends.
    """
    busy = dict.fromkeys((d.name for d in devices), 0.0)
    lost, money = 0, 0.0
    for job in sorted(jobs, key=lambda job: job.name):
        options = []
        for w in job.ways:
            for d in devices:
                end = busy[d.name] + w.seconds.p95
                cost = d.price.amount * w.seconds.p50 if d.price is not None else float(d.memory)
                if w.memory <= d.memory and w.device in (None, d.name) and end <= (job.deadline or float("inf")):
                    options.append(
                        (cost, end, d.memory, d.name) if job.pick == "cheapest" else (end, cost, d.memory, d.name)
                    )
        if not options:
            lost += 1
            continue
        best = min(options)
        end, cost = (best[1], best[0]) if job.pick == "cheapest" else (best[0], best[1])
        busy[best[3]] = end
        money += cost if job.pick == "cheapest" else 0.0
    return lost, money, max(busy.values(), default=0.0)


def measured(made: Placement, jobs: Sequence[Job], devices: Sequence[Device]) -> tuple[int, float, float]:
    thrifty = {job.name for job in jobs if job.pick == "cheapest"}
    fleet, money = named(devices), 0.0
    for p in made.placed:
        price = fleet[p.device].price
        if p.job in thrifty:
            money += price.amount * p.way.seconds.p50 if price is not None else float(fleet[p.device].memory)
    return len(made.impossible), money, made.last_end


@given(problems())
@settings(max_examples=150, deadline=None)
def test_never_worse_than_a_simple_greedy(problem: tuple[list[Job], list[Device]]) -> None:
    jobs, devices = problem
    idle = [Device(d.name, d.memory, d.price) for d in devices]
    lost, money, last = simple(jobs, idle)
    ours = measured(place(jobs, idle), jobs, idle)
    assert ours[0] <= lost
    if ours[0] == lost:
        assert ours[1] <= money * (1 + 1e-9) + 1e-6
        if ours[1] == pytest.approx(money):
            assert ours[2] <= last * (1 + 1e-9) or ours[1] < money


@given(problems())
@settings(max_examples=100, deadline=None)
def test_without_a_rival_a_job_gets_what_it_picks(problem: tuple[list[Job], list[Device]]) -> None:
    jobs, devices = problem
    for job in jobs:
        found = place([job], devices).of(job.name)
        if found is None or job.pick != "fastest":
            continue
        idle = [
            w.seconds.p95
            for w in job.ways
            for d in devices
            if d.free_from == 0 and w.memory <= d.memory and w.device in (None, d.name)
        ]
        assert found.end.p95 <= min(idle, default=float("inf")) + 1e-6


# -- cases ------------------------------------------------------------------------------------------------------------


def test_qlora_goes_to_the_smallest_card_that_holds_it_and_full_to_the_big_one() -> None:
    fleet = [device(d.name, d.memory / GB) for d in (BIG, SMALL, MIDDLE)]
    made = place(
        [
            Job("tune", (way("qlora", 9, 2),)),
            Job("larger", (way("qlora", 15, 2),)),
            Job("whole", (way("full", 60, 5),)),
        ],
        fleet,
    )
    assert {p.job: p.device for p in made.placed} == {"tune": "rtx-3060", "larger": "rtx-4090", "whole": "h100"}
    assert all(p.start.p95 == 0 for p in made.placed)
    assert made.of("whole").reason == "only h100 holds the 60.0 GB of full"  # type: ignore[union-attr]
    assert "rtx-3060 is the smallest" in made.of("tune").reason  # type: ignore[union-attr]


def test_the_cheapest_is_the_lowest_cost_not_the_lowest_price() -> None:
    job = Job("tune", (way("qlora", 9, 10, "rtx-3060"), way("lora", 18, 1, "rtx-4090"), way("lora", 18, 0.5, "h100")))
    made = place([job], [SMALL, MIDDLE, BIG])
    assert made.placed[0].device == "rtx-4090"
    assert made.placed[0].cost is not None
    assert (made.placed[0].cost.p50, made.placed[0].cost.p95) == pytest.approx((0.4, 0.6))
    assert str(made.cost) == "0.40 EUR"
    fast = place([Job("tune", job.ways, "fastest")], [SMALL, MIDDLE, BIG])
    assert fast.placed[0].device == "h100"


def test_a_deadline_moves_a_job_to_a_faster_device() -> None:
    ways = (way("qlora", 9, 6, "rtx-3060"), way("qlora", 9, 2, "h100"))
    assert place([Job("t", ways)], [SMALL, BIG]).placed[0].device == "rtx-3060"
    made = place([Job("t", ways, deadline=4 * HOUR)], [SMALL, BIG])
    assert made.placed[0].device == "h100"
    assert "keeps the deadline" in made.placed[0].reason
    assert place([Job("t", ways, deadline=HOUR)], [SMALL, BIG]).impossible == {
        "t": "it cannot be done within 60 min: the earliest end is 3.0 h from now (qlora on h100)"
    }


def test_what_no_device_holds_is_said() -> None:
    assert place([Job("big", (way("full", 120, 1), way("lora", 90, 1)))], [SMALL, BIG]).impossible == {
        "big": "the least that it needs is 90.0 GB (lora), and h100, the largest device, has 79.0 GB"
    }
    only = place([Job("big", (way("full", 120, 1, "rtx-3060"),))], [SMALL, BIG]).impossible["big"]
    assert only == "the least that it needs is 120.0 GB (full), and rtx-3060 has 11.5 GB"
    assert place([Job("x", (way("lora", 1, 1),))], []).impossible == {"x": "there is no device"}
    foreign = place([Job("x", (way("lora", 1, 1, "l4"),))], [SMALL]).impossible["x"]
    assert foreign == "none of its ways is for any of these devices"


def test_a_job_waits_for_those_before_it_and_says_so() -> None:
    made = place([Job("a", (way("full", 60, 5),)), Job("b", (way("full", 70, 2),))], [BIG, SMALL])
    first, second = made.placed
    assert (first.job, second.job) == ("b", "a")
    assert second.start == first.end
    assert "it waits 2.0 h for the jobs before it" in second.reason


def test_a_short_job_runs_beside_a_long_one_where_both_fit() -> None:
    busy = device("h100", 79, free=30, free_from=10)
    made = place([Job("short", (way("qlora", 20, 1),))], [busy]).placed[0]
    assert made.beside
    assert (made.start.p95, made.end.p50, made.end.p95) == (0, 2 * HOUR, 3 * HOUR)  # half the speed
    assert "beside what is there, at half speed" in made.reason
    large = place([Job("large", (way("lora", 40, 1),))], [busy]).placed[0]
    assert not large.beside
    assert large.start.p50 == 10 * HOUR
    assert "waits 10.0 h for what runs there now" in large.reason
    long = place([Job("long", (way("qlora", 20, 20),))], [busy]).placed[0]
    assert not long.beside, "side by side it would end no sooner, and the other work later"


def test_what_runs_there_ends_later_by_what_runs_beside_it() -> None:
    busy = device("h100", 79, free=30, free_from=10)
    made = place([Job("short", (way("qlora", 20, 1),)), Job("whole", (way("full", 70, 1),))], [busy])
    assert made.of("short").end.p95 == 3 * HOUR  # type: ignore[union-attr]
    assert made.of("whole").start.p95 == 11.5 * HOUR  # type: ignore[union-attr]


def test_a_machine_of_the_catalogue_is_a_device() -> None:
    card = find_machine("rtx-3060")
    assert Device.of(card) == Device("rtx-3060", card.usable, None, None, 0.0)
    assert Device.of(card, free=GB, free_from=60.0).free_now == GB
    assert Device.of(card, free=GB).free_now == card.usable, "nobody is on it"


def test_wrong_questions_are_one_line() -> None:
    with pytest.raises(UsageError, match="two jobs are called a"):
        place([Job("a", (way("lora", 1, 1),)), Job("a", (way("lora", 1, 1),))], [SMALL])
    with pytest.raises(UsageError, match="two devices are called h100"):
        place([], [BIG, BIG])
    with pytest.raises(UsageError, match="job a has no way"):
        place([Job("a", ())], [SMALL])
    with pytest.raises(UsageError, match="two currencies"):
        place([Job("a", (way("lora", 1, 1),))], [SMALL, Device("us", GB, Price(1, "USD"))])
