"""What a report says of a claim: the rules, the same for all claims (`compare.claims` tells them in words)."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.compare.others import QUIET
from halfbyte.compare.statistics import ENOUGH_ROWS, Figure, mean_ratio

CONFIRMED, REFUTED, PARTLY, OPEN = "confirmed", "refuted", "partly", "not testable here"
NONE = "no difference found"


@dataclass(frozen=True)
class Said:
    """What one report says of one claim, or of a part of it."""

    verdict: str
    sentence: str
    figure: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Report:
    """report.json, as the claims ask it."""

    path: Path
    data: Mapping[str, Any]

    def variants(self, method: str) -> list[Mapping[str, Any]]:
        """All of a method that do not go on from another's adapter; the plain ones first."""
        found = [v for v in self.data["variants"] if v["method_name"] == method and not chained(v)]
        return sorted(found, key=lambda v: bool(own_fields(v)))

    def variant(self, method: str, **fields: Any) -> Mapping[str, Any] | None:
        """The variant of this method that changes these fields and nothing else; alpha may go with the rank."""
        found = self.variants(method)
        return next((v for v in found if {k: x for k, x in own_fields(v).items() if k != "lora_alpha"} == fields), None)

    def any_variant(self, method: str) -> Mapping[str, Any] | None:
        """The plain variant of a method, else the first one of it."""
        return next(iter(self.variants(method)), None)

    def pair(self, first: str, second: str) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """Two variants that differ in nothing but the method; the plain ones where there are such."""
        pairs = itertools.product(self.variants(first), self.variants(second))
        return next(((one, other) for one, other in pairs if own_fields(one) == own_fields(other)), None)

    @property
    def quality(self) -> Mapping[str, Any]:
        """The first metric of quality: the task's own where it has one."""
        return next(metric for metric in self.data["metrics"] if metric["quality"])

    def metric(self, key: str) -> Mapping[str, Any]:
        return next(metric for metric in self.data["metrics"] if metric["key"] == key)

    def compared(self, one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> tuple[str, Mapping[str, Any]]:
        """(first better | second better | no difference found, the comparison) of two variants, seen from the first."""
        for made in self.data["comparisons"]:
            if made["metric"] == metric and {made["a"], made["b"]} == {one["key"], other["key"]}:
                if made["verdict"] == NONE:
                    return NONE, made
                return ("first" if (made["verdict"] == "a better") == (made["a"] == one["key"]) else "second"), made
        return NONE, {"difference": {"mean": None, "low": None, "high": None}, "detectable": None, "sentence": ""}


def own_fields(variant: Mapping[str, Any]) -> dict[str, Any]:
    """What a variant changes beside the method."""
    return {name: value for name, value in variant["fields"].items() if name != "method"}


def chained(variant: Mapping[str, Any]) -> bool:
    return any(note.startswith("goes on from") for note in variant["notes"])


MARGIN = 0.02
"""Of a figure: how much worse is still "comparable" or "marginal"."""
SLIGHTLY = 1.15
"""Of a rate: how much more is still "slightly faster"."""
POINT = 0.01
PRECISE = ("exact_match", "pass@1")  # and a user's own that is called so: gsm8k_exact_match


# ---------------------------------------------------------------- rules


def within(figure: Figure, low: float, high: float, what: str, said: str = "claimed") -> Said:
    """A figure against a range, both ends included. `said`: whose range it is."""
    shown = f"{what}: {figure.mean:.3f}"
    if figure.low is None or figure.high is None:
        return Said(OPEN, f"{shown} with one seed; it would take more seeds", figure.mean)
    shown += f" ({figure.low:.3f} to {figure.high:.3f}), {said} {low:g} to {high:g}"
    if figure.low >= low and figure.high <= high:
        verdict = CONFIRMED
    elif figure.high < low or figure.low > high:
        verdict, shown = REFUTED, f"{shown}; it is {'below' if figure.high < low else 'above'} that"
    else:
        verdict, shown = OPEN, f"{shown}; the interval is wider than the question: it would take more seeds or rows"
    return Said(verdict, shown, figure.mean, figure.low, figure.high)


def better(report: Report, one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> Said:
    """Whether the first variant is better than the second."""
    winner, made = report.compared(one, other, metric)
    difference = made["difference"]
    verdict = {"first": CONFIRMED, "second": REFUTED}.get(winner, OPEN)
    needed = "" if verdict != OPEN else " It would take more seeds or rows to find a smaller one."
    unit = str(report.metric(metric)["unit"])
    return Said(
        verdict, str(made["sentence"]) + needed, difference["mean"], difference["low"], difference["high"], unit
    )


def gain(report: Report, one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> Figure | None:
    """How much better the first is, as a share of the second's figure; None where they were not compared."""
    _, made = report.compared(one, other, metric)
    whole, difference = other["figures"].get(metric), made["difference"]
    if whole is None or not whole["mean"] or difference["low"] is None or difference["high"] is None:
        return None
    first = 1 if made["a"] == one["key"] else -1
    sign = first * (1 if report.metric(metric)["better"] == "higher" else -1) / abs(whole["mean"])
    low, high = sorted((sign * difference["low"], sign * difference["high"]))
    return Figure(sign * difference["mean"], low, high, ())


def no_worse(report: Report, one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> Said:
    """Whether the first is at most MARGIN worse than the second."""
    _, made = report.compared(one, other, metric)
    found = gain(report, one, other, metric)
    if found is None or found.low is None or found.high is None:
        return Said(OPEN, f"{made['sentence'] or metric + ' was not compared.'} It would take more seeds.")
    verdict = CONFIRMED if found.low >= -MARGIN else REFUTED if found.high < -MARGIN else OPEN
    share = f"{found.mean:+.1%} ({found.low:+.1%} to {found.high:+.1%})"
    gained = f"As a gain, {one['key']} over {other['key']}: {share}, taken for no worse down to {-MARGIN:.0%}"
    text = f"{made['sentence']} {gained}"
    text += "; it would take more seeds or rows to tell" if verdict == OPEN else ""
    return Said(verdict, text, found.mean, found.low, found.high, "share")


def all_of(parts: Sequence[Said]) -> Said:
    """A claim that says several things at once."""
    found = {part.verdict for part in parts}
    mixed = PARTLY if found & {CONFIRMED, PARTLY} else REFUTED
    verdict = next(iter(found)) if len(found) == 1 else mixed
    main = next((part for part in parts if part.verdict != OPEN), parts[0])
    return replace(main, verdict=verdict, sentence=" ".join(ended(part.sentence) for part in parts))


def asked_each(said: Sequence[Said]) -> Said:
    """What several reports, or several pairs, say of one thing."""
    return replace(all_of(said), verdict=together(said))


def ended(sentence: str) -> str:
    return sentence if sentence.endswith(".") else f"{sentence}."


def ratio(one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> Figure | None:
    """The first variant's figure over the second's, seed by seed; None where they have not the same seeds."""
    mine, theirs = one["figures"].get(metric), other["figures"].get(metric)
    if mine is None or theirs is None or mine["n"] != theirs["n"] or min(*mine["values"], *theirs["values"]) <= 0:
        return None
    return mean_ratio([a / b for a, b in zip(mine["values"], theirs["values"], strict=True)])


def together(said: Sequence[Said]) -> str:
    """The verdict of several."""
    found = {one.verdict for one in said}
    decided = found - {OPEN}
    if not decided:
        return OPEN
    return next(iter(decided)) if len(decided) == 1 else PARTLY


def pairs_of(reports: Sequence[Report], first: str, second: str) -> list[tuple[Report, Any, Any]]:
    found = [(report, report.pair(first, second)) for report in reports]
    return [(report, pair[0], pair[1]) for report, pair in found if pair is not None]


def learning_pairs_of(reports: Sequence[Report], first: str, second: str) -> list[tuple[Report, Any, Any]]:
    """`pairs_of`, of the reports that may be asked which of the two learns more."""
    pairs = pairs_of(reports, first, second)
    asked = of_learning([report for report, _, _ in pairs])
    return [pair for pair in pairs if any(pair[0] is report for report in asked)]


def ratio_within(
    report: Report, pair: tuple[Any, Any], metric: str, ends: tuple[float, float], what: str, said: str = "claimed"
) -> list[Said]:
    """The first's figure over the second's against a range; nothing where they have not both been measured."""
    figure = ratio(*pair, metric) if runs_of(report, pair[0]) == runs_of(report, pair[1]) else None
    return [] if figure is None else [within(figure, *ends, f"{title_of(report)}: {what}", said)]


def of_quiet_machines(reports: Sequence[Report]) -> list[Report]:
    """The reports that may be asked for speed: those whose runs are known to have had the machine for themselves; where
    there are none, those of which nothing is known."""
    known = [(report, _busiest(report)) for report in reports]
    quiet = [report for report, share in known if share is not None and share <= QUIET]
    return quiet or [report for report, share in known if share is None]


def of_learning(reports: Sequence[Report]) -> list[Report]:
    """The reports that may be asked which method learns more, where there are such: those with enough held-out rows,
    and of them, of one model and the same data, those that searched the learning rates. A default rate may suit one
    method and not another.
    """
    enough = [report for report in reports if _held_out(report) >= ENOUGH_ROWS] or list(reports)
    searched = {_subject(report) for report in enough if report.data["settings"].get("tune_lr")}
    return [r for r in enough if r.data["settings"].get("tune_lr") or _subject(r) not in searched]


def _held_out(report: Report) -> int:
    return sum(data.get("eval_rows", 0) for data in report.data["data"])


def _subject(report: Report) -> tuple[object, ...]:
    """What tells a report's model and data; fingerprints are of the rows that were trained on, which may be fewer."""
    rows = [(data["name"], data.get("rows", 0) + data.get("eval_rows", 0)) for data in report.data["data"]]
    return (report.data["model"]["name"], *rows)


def _busiest(report: Report) -> float | None:
    """The largest share of the processor that other work took beside a run; None: of some it is not known."""
    shares = [cell.get("others_share") for cell in report.data["cells"] if cell["status"] == "done"]
    known = [share for share in shares if share is not None]
    if known and max(known) > QUIET:
        return float(max(known))
    return float(max(known)) if known and len(known) == len(shares) else None


def runs_of(report: Report, variant: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The seeds of a variant's finished runs, and the other machine that ran them."""
    done = [c for c in report.data["cells"] if c["variant"] == variant["key"] and c["status"] == "done"]
    return [(c["seed"], c["origin"] if c["origin"].startswith("another machine") else "") for c in done]


def title_of(report: Report) -> str:
    return str(report.data["title"])


def share_of_full(report: Report, method: str, low: float, high: float) -> Said:
    """A method's quality as a share of full's, of scores; a loss is no share of quality."""
    variant = report.any_variant(method)
    against = variant["against_full"] if variant is not None else None
    if against is None or report.metric(against["metric"])["better"] != "higher":
        return Said(OPEN, f"{title_of(report)}: {method} has no score to hold against full's")
    share = Figure(against["share"]["mean"], against["share"]["low"], against["share"]["high"], ())
    return within(share, low, high, f"{title_of(report)}: {method}'s {against['metric']} as a share of full's")


def scored(reports: Sequence[Report], *methods: str) -> list[Report]:
    """The reports that hold one of the methods' scores against full's."""
    found = []
    for report in reports:
        variants = [report.any_variant(method) for method in methods]
        shares = [v["against_full"] for v in variants if v is not None and v["against_full"] is not None]
        if any(report.metric(share["metric"])["better"] == "higher" for share in shares):
            found.append(report)
    return found


def titled(report: Report, made: Said) -> Said:
    return replace(made, sentence=f"{title_of(report)}: {made.sentence}")
