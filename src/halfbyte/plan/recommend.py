"""What `halfbyte plan` says: every method's memory, disk, time and cost, which fit, which one to use and why.

The arithmetic of one method is in `plan.estimate`, the rule that chooses among them in `plan.rule`, and what would have
to change for one that does not fit in `plan.change`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from halfbyte.errors import DoesNotFit
from halfbyte.models.foreign_spec import ForeignSpec
from halfbyte.models.spec import ModelSpec
from halfbyte.plan import calibration, change, foreign, memory, rule
from halfbyte.plan.calibration import Calibration
from halfbyte.plan.estimate import Candidate, DataShape, Estimate, Request, Shape, estimate, least_peak
from halfbyte.plan.hardware import Hardware, Rates
from halfbyte.plan.price import Price
from halfbyte.plan.rule import gb, hours

__all__ = [
    "Candidate", "DataShape", "Estimate", "Plan", "Request", "Shape", "check_fits", "estimate",
    "least_peak", "make_plan", "too_big",
]  # fmt: skip

SCHEMA_VERSION = 2
"""Of plan.json. Before 2, phases and components had one figure instead of an interval."""
METHODS = ("qlora", "lora", "full")

Verdict = Literal["fits", "tight", "does not fit"]


@dataclass(frozen=True)
class Plan:
    """Every method's estimate, which fit, the chosen one and the reason. `as_dict()` is plan.json.

    method     how the chosen one holds its base: full, lora or qlora; `name` is what people call it
    clause     the clause of the rule that chose it, or `asked`
    changes    name → what would have to change for a method that does not fit surely
    machine    the catalogue's name of another machine; None: this one
    assumed    what the figures take for granted, a sentence each
    """

    estimates: tuple[Estimate, ...]
    budget: int
    budget_reason: str
    method: str
    reason: str
    data: DataShape
    hardware: dict[str, Any]
    rates: dict[str, Any]
    name: str = ""
    clause: str = "asked"
    changes: Mapping[str, tuple[change.Change, ...]] | None = None
    deadline: float | None = None
    machine: str | None = None
    assumed: tuple[str, ...] = ()

    @property
    def chosen(self) -> Estimate:
        return next(e for e in self.estimates if e.name == self.name and e.method == self.method)

    def fits(self, estimate: Estimate) -> bool:
        return estimate.peak_p95 <= self.budget

    @property
    def installed(self) -> int:
        """Bytes that the device has in all, whatever the budget says."""
        gpus = self.hardware["gpus"]
        own: int = gpus[0]["memory"] if self.chosen.job.device == "cuda" and gpus else self.hardware["memory_total"]
        return own

    def verdict(self, estimate: Estimate) -> Verdict:
        """`fits` is a promise (P95), `tight` is more likely than not (P50)."""
        if self.fits(estimate):
            return "fits"
        return "tight" if estimate.peak <= self.budget else "does not fit"

    def corrected(self, seconds: Mapping[str, float]) -> "Plan":
        """After a probe of the run itself: the chosen method's seconds by phase are these, their interval narrower."""
        chosen = self.chosen
        better = replace(chosen, seconds={**chosen.seconds, **seconds}, probed=True)
        return replace(self, estimates=tuple(better if e is chosen else e for e in self.estimates))

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            **self.chosen.as_dict(),
            "verdict": self.verdict(self.chosen),
            "reason": self.reason,
            "clause": self.clause,
            "budget_bytes": self.budget,
            "budget_reason": self.budget_reason,
            "deadline_seconds": self.deadline,
            "methods": [
                {
                    **e.as_dict(),
                    "fits": self.fits(e),
                    "verdict": self.verdict(e),
                    "changes": [c.as_dict() for c in (self.changes or {}).get(e.name, ())],
                }
                for e in self.estimates
            ],
            "data": asdict(self.data),
            "machine": self.machine,
            "hardware": self.hardware,
            "rates": self.rates,
            "price": None if self.chosen.price is None else str(self.chosen.price),
            "calibration": asdict(self.chosen.calibration),
            "assumptions": list(self.assumed),
        }


def make_plan(
    spec: Shape,
    request: Request,
    data: DataShape,
    hardware: Hardware,
    rates: Rates,
    budget: int | None,
    candidates: Sequence[Candidate] | None = None,
    *,
    asked: str | None = None,
    budget_reason: str | None = None,
    stated: bool | None = None,
    constants: Calibration | None = None,
    price: Price | None = None,
    deadline: float | None = None,
    advise: bool = False,
) -> Plan:
    """Estimate every method and choose one; `request.method` of `auto` leaves the choice to `plan.rule`.

    candidates  what to estimate, by default the three ways to hold a base, each with `request`'s other fields
    asked       the candidate's name that `request` is, by default its method
    stated      whether the user gave the budget; by default whether there is one
    constants   of this machine, by default those that ship for the kind of device
    deadline    seconds
    advise      also look for changes that make fit what does not

    Nothing is refused here: where no method fits, the plan is of the one that needs least (see `check_fits`).
    """
    limit = hardware.usable if budget is None else budget
    why = budget_reason or (f"90 % of the {where(request.device)} that is free now" if budget is None else "--memory")
    whole = not isinstance(spec, ForeignSpec)
    made = constants or (calibration.of(request.device) if whole else foreign.CALIBRATION)
    if candidates is None:
        bases = [method for method in METHODS if whole or method != "full"]
        candidates = [Candidate(method, replace(request, method=method)) for method in bases]
    ranked = [_ranked(spec, candidate, data, rates, limit, made, price) for candidate in candidates]
    estimates = tuple(found for _, found in ranked)
    if request.method == "auto":
        offered = [e for c, e in ranked if c.choosable]
        name, clause, reason = _choose(
            spec, request, offered, data, limit, (budget is not None) if stated is None else stated, deadline
        )
    else:
        name, clause, reason = asked or request.method, "asked", "asked for"
    chosen = next(e for e in estimates if e.name == name)
    if clause != "deadline":  # that reason says it
        reason += _lateness(chosen, deadline)
    changes = _changes(spec, ranked, data, rates, limit, made) if advise else None
    return Plan(
        estimates, limit, why, chosen.method, reason, data, hardware.as_dict(), asdict(rates),
        name=name, clause=clause, changes=changes, deadline=deadline,
    )  # fmt: skip


def _lateness(chosen: Estimate, deadline: float | None) -> str:
    """What the reason adds where the deadline is not sure to be kept."""
    if deadline is None or chosen.time.p95 <= deadline:
        return ""
    if chosen.time.p50 <= deadline:
        return f"; it may take longer than the {hours(deadline)} that it has"
    return f"; it is not done within {hours(deadline)}"


def where(device: str) -> str:
    return "GPU memory" if device == "cuda" else "memory"


def _ranked(
    spec: Shape,
    candidate: Candidate,
    data: DataShape,
    rates: Rates,
    limit: int,
    constants: Calibration,
    price: Price | None,
) -> tuple[Candidate, Estimate]:
    """A candidate with its rank made out, and its estimate: a raised rank must not cost the layout."""
    request = candidate.request
    tries = [request]
    if request.open_rank and request.method != "full":
        each, linears = adapter_sizes(spec, request)
        tries = [request.with_rank(r) for r in rule.ranks(request.method == "qlora", data.supervised, each, linears)]
    for tried in tries:
        one = replace(candidate, request=tried)
        made = estimate(spec, one, data, rates, limit, constants, price)
        if made.peak_p95 <= limit and (not made.job.checkpointing or request.checkpointing):
            break
    return one, made


def _changes(
    spec: Shape,
    ranked: Sequence[tuple[Candidate, Estimate]],
    data: DataShape,
    rates: Rates,
    limit: int,
    constants: Calibration,
) -> dict[str, tuple[change.Change, ...]]:
    """By name, for each method that does not fit: what would make it fit, and the same method on a quantized base."""
    qlora = next((e for _, e in ranked if e.name == "qlora" and e.peak_p95 <= limit), None)
    found = {}
    for candidate, made in ranked:
        if made.peak_p95 <= limit:
            continue
        changes = change.find(spec, candidate, data, rates, limit, constants)
        if qlora is not None:
            changes += (change.Change({"method": "qlora"}, qlora.peak_p95),)
        found[made.name] = changes
    return found


def adapter_sizes(spec: Shape, request: Request) -> tuple[int, int]:
    """(adapter parameters that a rank adds, parameters of the linears that are adapted)."""
    job = memory.Job("lora", request.dtype, request.quant, request.lora)
    linears = memory.targets(cast(ModelSpec, spec), job)
    return sum(x.in_features + x.out_features for x in linears), sum(x.parameters for x in linears)


def _choose(
    spec: Shape,
    request: Request,
    estimates: Sequence[Estimate],
    data: DataShape,
    budget: int,
    stated: bool,
    deadline: float | None,
) -> tuple[str, str, str]:
    """(name, clause, reason) by the rule; the method that needs least if nothing fits."""
    adapters = [e for e in estimates if e.method != "full"]
    case = rule.Case(
        budget=budget,
        stated=stated,
        deadline=deadline,
        tokens=data.supervised,
        parameters=spec.total_parameters,
        own_blocks=request.own_blocks,
        capacity=rule.largest_adapters(*adapter_sizes(spec, request)),
    )
    choice = rule.choose(case, [e.offer for e in estimates])
    if choice is None:
        least = min(adapters or estimates, key=lambda e: e.peak_p95)
        return least.name, "none", f"no method fits in {gb(budget)}; this one needs the least, {gb(least.peak_p95)}"
    return choice.name, choice.clause, choice.reason


def check_fits(plan: Plan) -> None:
    """DoesNotFit if the plan's method is over its budget at p95, or over what the machine has in all."""
    if not plan.fits(plan.chosen):
        raise DoesNotFit(too_big(plan.chosen, plan.budget, plan.budget_reason, plan))
    if plan.chosen.peak_p95 > plan.installed:
        raise DoesNotFit(
            f"{plan.name} needs up to {gb(plan.chosen.peak_p95)}, and this machine has {gb(plan.installed)} of "
            f"{where(plan.chosen.job.device)} in all, whatever --memory says: plan again with less"
        )


def too_big(e: Estimate, budget: int, why: str, plan: Plan | None = None) -> str:
    """One line: what does not fit, by how much, the minimum, and the nearest thing that would."""
    smaller = [o for o in plan.estimates if plan.fits(o)] if plan is not None else []
    if smaller:
        best = min(smaller, key=lambda o: o.peak_p95)
        advice = f"--method {best.name} fits ({gb(best.peak_p95)})"
    else:
        parts = e.memory[e.peak_phase]
        largest = max(parts, key=lambda name: parts[name])
        tips = {
            "activations": "try a smaller --max-seq-length",
            "optimizer": "try --optim adamw_8bit, or paged_adamw, which keeps it on the disk",
            "gradients": "try --optim paged_adamw, which keeps them on the disk",
            "runtime": "that is Python, torch and the tokenizer, which every run needs",
        }
        advice = f"most of it is {largest} ({gb(parts[largest])}): {tips.get(largest, 'try a smaller model')}"
    return (
        f"{e.name} needs at least {gb(e.peak_p95)} (expected {gb(e.peak)}, in phase '{e.peak_phase}', with "
        f"{e.layout}), and the budget is {gb(budget)} ({why}): {advice}"
    )
