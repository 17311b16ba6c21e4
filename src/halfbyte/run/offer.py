"""What `halfbyte plan` answers: one machine's plan, or where among several a run should go."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from halfbyte.errors import DoesNotFit, UsageError
from halfbyte.plan import catalog
from halfbyte.plan.catalog import Machine
from halfbyte.plan.place import Device, Job, Pick, Placed, Way, place
from halfbyte.plan.price import Price, one_currency
from halfbyte.plan.recommend import Plan, check_fits
from halfbyte.run.config import RunConfig
from halfbyte.run.continued import with_adapter
from halfbyte.run.planning import Ask, make, survey
from halfbyte.run.variants import known_methods

SCHEMA_VERSION = 1
HERE = "this machine"
LOCAL = ("auto", "cpu", "cuda")
"""Values of `device` that mean this machine."""
_UNITS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "hr": 3600, "hour": 3600, "d": 86400, "day": 86400}
_LONGEST = 3.2e9


@dataclass(frozen=True)
class Where:
    """A run on each of several machines, and where it should go if that was asked.

    placed    None: nobody asked (no `pick`), or it goes nowhere
    problem   in a sentence, why it goes nowhere
    """

    plans: tuple[Plan, ...]
    pick: Pick | None = None
    placed: Placed | None = None
    deadline: float | None = None
    problem: str | None = None

    def name_of(self, plan: Plan) -> str:
        return plan.machine or HERE

    @property
    def picked(self) -> Plan | None:
        return next((p for p in self.plans if self.placed is not None and self.name_of(p) == self.placed.device), None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "pick": self.pick,
            "deadline_seconds": self.deadline,
            "device": None if self.placed is None else self.placed.device,
            "reason": self.problem if self.placed is None else self.placed.reason,
            "devices": [{"device": self.name_of(plan), **plan.as_dict()} for plan in self.plans],
        }


def offer(
    config: RunConfig,
    *,
    methods: Sequence[str] = (),
    devices: Sequence[str] = (),
    price: str | None = None,
    deadline: str | None = None,
    pick: str | None = None,
    machines: Path | None = None,
) -> Plan | Where:
    """The answer to `halfbyte plan`: a `Plan` for one machine, a `Where` for several.

    methods    names of `run.methods`; by default full, LoRA, QLoRA and the config's own
    devices    machines of the catalogue; auto, cpu and cuda mean this one
    price      of this machine (or of the only one), as `0.34 EUR/h`
    deadline   as `90m`, `6h` or `2d`
    pick       cheapest or fastest
    machines   a file of machines beside the catalogue, by default the user's own

    UsageError for what none of these can be. What does not fit is in the answer: see `refuse`.
    """
    names = known_methods(methods)
    until = None if deadline is None else duration(deadline)
    if pick is not None and pick not in get_args(Pick):
        raise UsageError(f"--pick {pick}: it is cheapest or fastest")
    chosen = _machines(devices, machines)
    local = next((name for name, machine in chosen.items() if machine is None and name in LOCAL), None)
    if local is not None:
        config = config.replace(device=local)
    elif devices:
        config = config.replace(device="auto")  # whatever the config asks of this machine, it is about others
    amount = None if price is None else Price.parse(price)
    if amount is not None and len(chosen) > 1 and local is None:
        raise UsageError(
            f"--price is the price of one machine, and {len(chosen)} were given: put theirs into {_file(machines)}"
        )
    found = survey(with_adapter(config), to_train=False)
    plans = []
    for machine in chosen.values():
        own = amount if machine is None or len(chosen) == 1 else None
        ask = Ask(names, own, until, machine, advise=len(chosen) == 1)
        plans.append(make(found, ask=ask))
    if len(plans) == 1 and pick is None:
        return plans[0]
    where = Where(
        tuple(plans), None if pick is None else "cheapest" if pick == "cheapest" else "fastest", deadline=until
    )
    return _picked(where, machines)


def refuse(answer: Plan | Where) -> None:
    """DoesNotFit if the answer is that it cannot be done."""
    if isinstance(answer, Plan):
        check_fits(answer)
    elif answer.problem is not None:
        raise DoesNotFit(answer.problem)


def duration(text: str) -> float:
    """Seconds of `45s`, `90m`, `6h`, `1h30m` or `2d`. UsageError for anything else."""
    pieces = re.findall(r"([0-9]*\.?[0-9]+)\s*([a-z]+)", text.lower())
    rest = re.sub(r"([0-9]*\.?[0-9]+)\s*([a-z]+)", "", text.lower()).strip()
    units = [unit if unit in _UNITS else unit.removesuffix("s") for _, unit in pieces]
    seconds = sum(float(number) * _UNITS.get(unit, 0) for (number, _), unit in zip(pieces, units, strict=True))
    if not pieces or rest or not all(unit in _UNITS for unit in units) or not 0 < seconds < _LONGEST:
        raise UsageError(f"--deadline {text!r} is not a duration: write a number and a unit, as in 30m, 6h or 2d")
    return seconds


def _machines(names: Sequence[str], extra: Path | None) -> dict[str, Machine | None]:
    """Name → machine, None for this one; each once."""
    found: dict[str, Machine | None] = {}
    for word in (part.strip() for text in names for part in text.split(",")):
        if word.lower() in LOCAL:
            found[word.lower()] = None
        else:
            machine = catalog.find_machine(word, extra)
            found[machine.name] = machine
    here = [name for name, machine in found.items() if machine is None]
    if len(here) > 1:
        raise UsageError(f"--device: {' and '.join(here)} are both this machine: name one of them")
    return found or {"": None}


def _picked(where: Where, extra: Path | None) -> Where:
    """With the machine that is the cheapest or the fastest, as its `pick` says, or why there is none."""
    pick, able = where.pick, [plan for plan in where.plans if plan.fits(plan.chosen)]
    if not able:
        return replace(where, problem=_none_holds(where))
    if pick is None:
        return where
    if pick == "cheapest":
        bare = [where.name_of(plan) for plan in able if plan.chosen.price is None]
        if bare:
            raise UsageError(_no_price(bare, extra))
        one_currency((where.name_of(plan), plan.chosen.price) for plan in able)
    ways = tuple(Way(plan.chosen.name, plan.chosen.peak_p95, plan.chosen.time, where.name_of(plan)) for plan in able)
    devices = [
        Device(where.name_of(plan), plan.budget, plan.chosen.price if pick == "cheapest" else None) for plan in able
    ]
    placement = place([Job("run", ways, pick, where.deadline)], devices)
    placed = placement.of("run")
    if placed is None:
        return replace(where, problem=f"{placement.impossible['run']}: give a longer --deadline, or fewer --max-steps")
    return replace(where, placed=placed)


def _none_holds(where: Where) -> str:
    least = min(where.plans, key=lambda plan: plan.chosen.peak_p95 - plan.budget)
    return (
        f"none of these devices holds it: the nearest is {where.name_of(least)}, where {least.chosen.name} needs at "
        f"least {least.chosen.peak_p95 / 1e9:.2f} GB of {least.budget / 1e9:.2f} GB"
    )


def _no_price(names: Sequence[str], extra: Path | None) -> str:
    here = ", and this machine's as --price '0.34 EUR/h'" if HERE in names else ""
    listed = [name for name in names if name != HERE]
    file = f"put a line `price: 0.34 EUR/h` under {listed[0]}: in {_file(extra)}" if listed else ""
    how = f"{file}{here}" if listed else "give --price '0.34 EUR/h'"
    return f"--pick cheapest needs prices, and there is none for {', '.join(names)} (none ships): {how}"


def _file(extra: Path | None) -> Path:
    return extra or catalog.user_file()
