"""Where jobs should run: a pure function from needs and devices to a schedule, with a reason for whatever must wait.

    place(jobs, devices) -> Placement

A job names the ways in which it can be done (a method on a device: how much memory, how long), a device what it has and
whether somebody is on it. Each job gets the way and the device that its `pick` asks for:

    cheapest   the lowest cost where every device that holds it has a price, else the smallest device that holds it
               (which is how QLoRA leaves the big ones to full fine-tuning)
    fastest    the earliest end; then the cheaper or smaller device

A job that would end after its deadline (at p95) is placed elsewhere, or not at all. Jobs of ours follow one another on
a device: side by side they would share its time, so that none would end sooner and most would end later. Beside
somebody else's work a job runs where both fit and it is the shorter one, both at half speed; else it waits for that
work's end.

Deterministic and blind to the order in which jobs and devices are given: several orders of placing are tried, and the
best whole schedule is taken: most jobs placed, then the lowest cost of those that ask for it, then the earliest last
end.

Units: bytes, seconds from now.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

from halfbyte.errors import UsageError
from halfbyte.plan.calibration import Interval
from halfbyte.plan.catalog import Machine
from halfbyte.plan.price import Cost, Price, one_currency

Pick = Literal["cheapest", "fastest"]


@dataclass(frozen=True)
class Way:
    """One way to do a job.

    method    qlora, lora, full, or whatever the job calls it
    memory    peak bytes at p95
    seconds   how long it takes alone, p50 and p95
    device    the device that these figures are for; None: they hold on every device
    """

    method: str
    memory: int
    seconds: Interval
    device: str | None = None


@dataclass(frozen=True)
class Job:
    """What is to be placed. `ways` are alternatives, none better than another but by `pick`; one way is a fixed need.

    deadline   seconds from now that its end must not exceed at p95
    """

    name: str
    ways: tuple[Way, ...]
    pick: Pick = "cheapest"
    deadline: float | None = None


@dataclass(frozen=True)
class Device:
    """Where jobs can run.

    memory      usable bytes when nothing else runs
    free        usable bytes now, while somebody is on it; None: all of it
    free_from   seconds until that work ends, if it goes on alone; 0: nobody is on it
    """

    name: str
    memory: int
    price: Price | None = None
    free: int | None = None
    free_from: float = 0.0

    @classmethod
    def of(cls, machine: Machine, free: int | None = None, free_from: float = 0.0) -> "Device":
        """A machine of the catalogue, idle unless told otherwise."""
        return cls(machine.name, machine.usable, machine.price, free, free_from)

    @property
    def free_now(self) -> int:
        return self.memory if self.free is None or self.free_from <= 0 else min(self.free, self.memory)


Named = TypeVar("Named", Job, Device)


@dataclass(frozen=True)
class Placed:
    """Where and when a job runs, and why there.

    cost     what its own time costs, p50 and p95; None where the device has no price
    beside   next to somebody else's work
    """

    job: str
    device: str
    way: Way
    start: Interval
    end: Interval
    cost: Interval | None
    currency: str | None
    beside: bool
    reason: str


@dataclass(frozen=True)
class Placement:
    """Every job is in one of the two: placed, or with the sentence that says why it cannot be."""

    placed: tuple[Placed, ...]
    impossible: Mapping[str, str]

    def of(self, job: str) -> Placed | None:
        return next((p for p in self.placed if p.job == job), None)

    @property
    def last_end(self) -> float:
        """Seconds until everything that was placed is done, at p95."""
        return max((p.end.p95 for p in self.placed), default=0.0)

    @property
    def cost(self) -> Cost | None:
        """What all of it costs at p50; None unless every device in use has a price."""
        amounts = [p.cost.p50 for p in self.placed if p.cost is not None]
        currency = next((p.currency for p in self.placed if p.currency), None)
        return None if currency is None or len(amounts) < len(self.placed) else Cost(sum(amounts), currency)


@dataclass(frozen=True)
class _Slot:
    """A job's time on a device, and when the work of others there then ends."""

    start: Interval
    end: Interval
    beside: bool
    theirs: Interval


@dataclass
class _Queue:
    """One device while a schedule is made: when our jobs there end, and when the work of others does."""

    device: Device
    ours: Interval
    theirs: Interval

    @classmethod
    def empty(cls, device: Device) -> "_Queue":
        busy = max(device.free_from, 0.0)
        return cls(device, Interval(0.0, 0.0), Interval(busy, busy))

    def slot(self, way: Way) -> _Slot:
        """Behind our jobs; and beside the work of others where both fit and this is the shorter, else behind it too."""
        left = self.theirs.p95 - self.ours.p95
        if way.memory <= self.device.free_now and way.seconds.p95 < left:
            ends = _each(_beside, self.ours, self.theirs, way.seconds)
            return _Slot(self.ours, ends, True, _each(_delayed, self.ours, self.theirs, way.seconds))
        start = _each(max, self.ours, self.theirs)
        return _Slot(start, _each(lambda a, b: a + b, start, way.seconds), False, self.theirs)


def _each(function: Callable[..., float], *intervals: Interval) -> Interval:
    return Interval(function(*(i.p50 for i in intervals)), function(*(i.p95 for i in intervals)))


def _beside(start: float, theirs: float, seconds: float) -> float:
    """When a job ends that starts beside work which would end at `theirs`: both go at half speed until one is done."""
    return start + seconds + min(seconds, max(theirs - start, 0.0))


def _delayed(start: float, theirs: float, seconds: float) -> float:
    """When that work then ends: later by what is done beside it."""
    return theirs + min(seconds, max(theirs - start, 0.0))


def place(jobs: Iterable[Job], devices: Iterable[Device]) -> Placement:
    """Where and when every job runs, or why it cannot.

    UsageError for two jobs or devices of one name, a job without a way, and prices in two currencies.
    """
    asked, fleet = _by_name(jobs, "jobs"), _by_name(devices, "devices")
    for job in asked:
        if not job.ways:
            raise UsageError(f"job {job.name} has no way in which it could be done")
    one_currency((device.name, device.price) for device in fleet)
    made = [_schedule(sorted(asked, key=order), fleet) for order in _ORDERS]
    best = min(made, key=lambda placement: _score(placement, asked, fleet))
    return Placement(tuple(sorted(best.placed, key=lambda p: (p.start.p50, p.device, p.job))), best.impossible)


def _by_name(things: Iterable[Named], what: str) -> list[Named]:
    found = sorted(things, key=lambda thing: thing.name)
    for one, other in pairwise(found):
        if one.name == other.name:
            raise UsageError(f"two {what} are called {one.name}: give each a name of its own")
    return found


def _deadline(job: Job) -> float:
    return float("inf") if job.deadline is None else job.deadline


def _need(job: Job) -> int:
    return min(way.memory for way in job.ways)


def _length(job: Job) -> float:
    return min(way.seconds.p95 for way in job.ways)


# Orders of placing: whoever is placed first has the choice. Urgent first in all but the last; what only big devices can
# take, or what takes long, before what fits into the gaps.
_ORDERS: tuple[Callable[[Job], tuple[object, ...]], ...] = (
    lambda job: (_deadline(job), -_need(job), -_length(job), job.name),
    lambda job: (_deadline(job), -_length(job), job.name),
    lambda job: (_deadline(job), _length(job), job.name),
    lambda job: (-_need(job), _deadline(job), -_length(job), job.name),
    lambda job: (job.name,),
)


def _schedule(jobs: Sequence[Job], devices: Sequence[Device]) -> Placement:
    """Each job in turn to the best place that is left."""
    queues = [_Queue.empty(device) for device in devices]
    placed: list[Placed] = []
    impossible: dict[str, str] = {}
    for job in jobs:
        options = [
            (way, queue, queue.slot(way))
            for way in job.ways
            for queue in queues
            if way.device in (None, queue.device.name) and way.memory <= queue.device.memory
        ]
        in_time = [option for option in options if option[2].end.p95 <= _deadline(job)]
        if not in_time:
            impossible[job.name] = _why_not(job, options, devices)
            continue
        priced = all(queue.device.price is not None for _, queue, _ in options)
        chosen = min(in_time, key=lambda option: _rank(job, priced, *option))
        placed.append(_placed(job, priced, options, *chosen))
        _, queue, slot = chosen
        queue.ours, queue.theirs = slot.end, slot.theirs
    return Placement(tuple(placed), impossible)


def _rank(job: Job, priced: bool, way: Way, queue: _Queue, slot: _Slot) -> tuple[object, ...]:
    price, device = queue.device.price, queue.device
    money = price.of(way.seconds.p50).amount if priced and price is not None else float(device.memory)
    first = (money, slot.end.p95) if job.pick == "cheapest" else (slot.end.p95, money)
    return (*first, device.memory, way.memory, device.name, way.method)


def _score(placement: Placement, jobs: Sequence[Job], devices: Sequence[Device]) -> tuple[object, ...]:
    """What makes one whole schedule better than another, the smaller the better."""
    sizes = {device.name: device.memory for device in devices}
    saving = {job.name for job in jobs if job.pick == "cheapest"}
    thrifty = [p for p in placement.placed if p.job in saving]
    money = sum(p.cost.p50 for p in thrifty if p.cost is not None)
    unpriced = sum(sizes[p.device] for p in thrifty if p.cost is None)
    ends = [p.end.p95 for p in placement.placed]
    return (len(placement.impossible), unpriced, round(money, 9), max(ends, default=0.0), sum(ends))


def _placed(
    job: Job,
    priced: bool,
    options: Sequence[tuple[Way, _Queue, _Slot]],
    way: Way,
    queue: _Queue,
    slot: _Slot,
) -> Placed:
    price = queue.device.price
    cost = None if price is None else _each(lambda seconds: price.of(seconds).amount, way.seconds)
    return Placed(
        job.name,
        queue.device.name,
        way,
        slot.start,
        slot.end,
        cost,
        None if price is None else price.currency,
        slot.beside,
        _why(job, priced, options, way, queue, slot),
    )


def _why(
    job: Job, priced: bool, options: Sequence[tuple[Way, _Queue, _Slot]], way: Way, queue: _Queue, slot: _Slot
) -> str:
    """One sentence: why this device, and why not at once."""
    name, holding = queue.device.name, {option[1].device.name for option in options}
    if len(holding) == 1:
        here = f"only {name} holds the {_gb(way.memory)} of {way.method}"
    elif job.pick == "fastest":
        here = f"of {len(holding)} devices that hold it, {name} is done first"
    else:
        here = f"of {len(holding)} devices that hold it, {name} is the {'cheapest' if priced else 'smallest'}"
    if job.deadline is not None and job.pick == "cheapest" and len(holding) > 1:
        here += " that keeps the deadline"
    if slot.beside:
        return f"{here}; it runs beside what is there, at half speed"
    if slot.start.p95 > 0:
        whose = "what runs there now" if queue.ours.p95 < queue.theirs.p95 else "the jobs before it"
        return f"{here}; it waits {_hours(slot.start.p50)} for {whose}"
    return here


def _why_not(job: Job, options: Sequence[tuple[Way, _Queue, _Slot]], devices: Sequence[Device]) -> str:
    """One sentence: no device holds it, or none has time."""
    if options:
        way, queue, slot = min(options, key=lambda o: (o[2].end.p95, o[1].device.name, o[0].method))
        behind = " behind the jobs before it" if queue.ours.p95 > 0 else ""
        return (
            f"it cannot be done within {_hours(_deadline(job))}: the earliest end is {_hours(slot.end.p95)} from now "
            f"({way.method} on {queue.device.name}{behind})"
        )
    if not devices:
        return "there is no device"
    names = {device.name for device in devices}
    usable = [way for way in job.ways if way.device is None or way.device in names]
    if not usable:
        return "none of its ways is for any of these devices"
    way = min(usable, key=lambda w: (w.memory, w.method, w.device or ""))
    largest = max(devices, key=lambda device: (device.memory, device.name))
    if way.device is not None:
        largest = next(device for device in devices if device.name == way.device)
    return (
        f"the least that it needs is {_gb(way.memory)} ({way.method}), and "
        f"{largest.name}{', the largest device,' if way.device is None else ''} has {_gb(largest.memory)}"
    )


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _hours(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
