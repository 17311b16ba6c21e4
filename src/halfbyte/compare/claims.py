"""Other people's claims held against what was measured: `halfbyte compare --claims`.

A claim that measurement can decide has a small function here, under the number that it has in `plan/claims.yaml`; each
takes the reports that there are and says what they say. The rules, the same for all:

    a share or a ratio with a range      confirmed where its 95 % interval is inside the range, refuted where it is
                                         outside, else not testable here: the interval is wider than the question
    one method better than another       confirmed or refuted where a difference was found, else not testable here, with
                                         the difference that would have been found
    one no worse than another            a difference that was not found confirms nothing: confirmed where the interval
                                         leaves out that it is worse by more than MARGIN of the other's figure
    several parts                        all confirmed or it is `partly`; a part that is open confirms nothing
    several reports                      each is asked; reports that disagree make it `partly`

Where a claim has only a word ("slightly", "comparable"), the range that is taken for it is told as that.

`not testable here` always says what would be needed.

    python -m halfbyte.compare.claims FOLDER… > docs/claims.md     judges the reports there, kept in claims.yaml
"""

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.compare.statistics import Figure, mean_interval
from halfbyte.errors import UsageError
from halfbyte.plan import claims as claim_file
from halfbyte.run.folder import read_json

CONFIRMED, REFUTED, PARTLY, OPEN = "confirmed", "refuted", "partly", "not testable here"
NONE = "no difference found"
FILE = "report.json"


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
class Verdict:
    """What all reports together say. `evidence`: the reports' paths."""

    claim: int
    verdict: str
    sentence: str
    figure: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    evidence: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """report.json, as the claims ask it."""

    path: Path
    data: Mapping[str, Any]

    def variants(self, method: str) -> list[Mapping[str, Any]]:
        """All of a method that do not go on from another's adapter; the plain ones first."""
        found = [v for v in self.data["variants"] if v["method_name"] == method and not _chained(v)]
        return sorted(found, key=lambda v: bool(_own(v)))

    def variant(self, method: str, **fields: Any) -> Mapping[str, Any] | None:
        """The variant of this method that changes these fields and nothing else; alpha may go with the rank."""
        found = self.variants(method)
        return next((v for v in found if {k: x for k, x in _own(v).items() if k != "lora_alpha"} == fields), None)

    def any_variant(self, method: str) -> Mapping[str, Any] | None:
        """The plain variant of a method, else the first one of it."""
        return next(iter(self.variants(method)), None)

    def pair(self, first: str, second: str) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
        """Two variants that differ in nothing but the method; the plain ones where there are such."""
        pairs = itertools.product(self.variants(first), self.variants(second))
        return next(((one, other) for one, other in pairs if _own(one) == _own(other)), None)

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


def _own(variant: Mapping[str, Any]) -> dict[str, Any]:
    """What a variant changes beside the method."""
    return {name: value for name, value in variant["fields"].items() if name != "method"}


def _chained(variant: Mapping[str, Any]) -> bool:
    return any(note.startswith("goes on from") for note in variant["notes"])


Test = Callable[[Sequence[Report]], list[Said]]
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
        verdict = REFUTED
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
    return replace(main, verdict=verdict, sentence=" ".join(_ended(part.sentence) for part in parts))


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith(".") else f"{sentence}."


def ratio(one: Mapping[str, Any], other: Mapping[str, Any], metric: str) -> Figure | None:
    """The first variant's figure over the second's, seed by seed; None where they have not the same seeds."""
    mine, theirs = one["figures"].get(metric), other["figures"].get(metric)
    if mine is None or theirs is None or mine["n"] != theirs["n"] or not all(theirs["values"]):
        return None
    return mean_interval([a / b for a, b in zip(mine["values"], theirs["values"], strict=True)])


def together(said: Sequence[Said]) -> str:
    """The verdict of several."""
    found = {one.verdict for one in said}
    decided = found - {OPEN}
    if not decided:
        return OPEN
    return next(iter(decided)) if len(decided) == 1 else PARTLY


def _pairs(reports: Sequence[Report], first: str, second: str) -> list[tuple[Report, Any, Any]]:
    found = [(report, report.pair(first, second)) for report in reports]
    return [(report, pair[0], pair[1]) for report, pair in found if pair is not None]


def _ratio(
    report: Report, pair: tuple[Any, Any], metric: str, ends: tuple[float, float], what: str, said: str = "claimed"
) -> list[Said]:
    """The first's figure over the second's against a range; nothing where they have not both been measured."""
    figure = ratio(*pair, metric) if _runs(report, pair[0]) == _runs(report, pair[1]) else None
    return [] if figure is None else [within(figure, *ends, f"{_named(report)}: {what}", said)]


def _runs(report: Report, variant: Mapping[str, Any]) -> list[tuple[int, str]]:
    """The seeds of a variant's finished runs, and the other machine that ran them."""
    done = [c for c in report.data["cells"] if c["variant"] == variant["key"] and c["status"] == "done"]
    return [(c["seed"], c["origin"] if c["origin"].startswith("another machine") else "") for c in done]


def _named(report: Report) -> str:
    return str(report.data["title"])


def _share(report: Report, method: str, low: float, high: float) -> Said:
    """A method's quality as a share of full's, of scores; a loss is no share of quality."""
    variant = report.any_variant(method)
    against = variant["against_full"] if variant is not None else None
    if against is None or report.metric(against["metric"])["better"] != "higher":
        return Said(OPEN, f"{_named(report)}: {method} has no score to hold against full's")
    share = Figure(against["share"]["mean"], against["share"]["low"], against["share"]["high"], ())
    return within(share, low, high, f"{_named(report)}: {method}'s {against['metric']} as a share of full's")


def _scored(reports: Sequence[Report], *methods: str) -> list[Report]:
    """The reports that hold one of the methods' scores against full's."""
    found = []
    for report in reports:
        variants = [report.any_variant(method) for method in methods]
        shares = [v["against_full"] for v in variants if v is not None and v["against_full"] is not None]
        if any(report.metric(share["metric"])["better"] == "higher" for share in shares):
            found.append(report)
    return found


# ---------------------------------------------------------------- the claims, by number


def quality_shares(reports: Sequence[Report]) -> list[Said]:
    return [
        all_of([_share(report, "qlora", 0.95, 0.99), _share(report, "lora", 0.97, 0.99)])
        for report in _scored(reports, "qlora", "lora")
    ]


def comparable_to_full(reports: Sequence[Report]) -> list[Said]:
    return [
        _of(report, no_worse(report, qlora, full, report.quality["key"]))
        for report, qlora, full in _pairs(reports, "qlora", "full")
    ]


def _of(report: Report, made: Said) -> Said:
    return replace(made, sentence=f"{_named(report)}: {made.sentence}")


def precise_tasks_only(reports: Sequence[Report]) -> list[Said]:
    """A loss on exact matches and none elsewhere: both have to be seen."""
    parts = []
    for report, qlora, lora in _pairs(reports, "qlora", "lora"):
        key = report.quality["key"]
        made, lost = no_worse(report, qlora, lora, key), better(report, lora, qlora, key).verdict == CONFIRMED
        if key.endswith(PRECISE):
            verdict = CONFIRMED if lost else REFUTED if made.verdict == CONFIRMED else OPEN
        else:
            verdict = REFUTED if lost and made.verdict != CONFIRMED else made.verdict
        parts.append((key.endswith(PRECISE), _of(report, replace(made, verdict=verdict))))
    if not parts:
        return []
    if len({precise for precise, _ in parts}) < 2:
        return [Said(OPEN, "it needs a comparison with exact_match or pass@1 beside one without")]
    return [all_of([part for _, part in parts])]


def lora_slightly_faster(reports: Sequence[Report]) -> list[Said]:
    return [made for report, lora, qlora in _pairs(reports, "lora", "qlora") for made in _faster(report, (lora, qlora))]


def _faster(report: Report, pair: tuple[Any, Any]) -> list[Said]:
    what = "LoRA's tokens a second over QLoRA's"
    return _ratio(report, pair, "tokens_per_second", (1.0, SLIGHTLY), what, "taken for slightly faster:")


def lora_66_percent_faster(reports: Sequence[Report]) -> list[Said]:
    what = "LoRA's tokens a second over QLoRA's"
    return [
        made
        for report, lora, qlora in _pairs(reports, "lora", "qlora")
        for made in _ratio(report, (lora, qlora), "tokens_per_second", (1.33, 1.66), what)
    ]


def equal_on_sst2(reports: Sequence[Report]) -> list[Said]:
    """0.1 points are claimed: inside the measured interval, and that inside a point either way. The claim's other two
    tasks are not asked."""
    found = []
    for report, lora, qlora in _pairs(reports, "lora", "qlora"):
        if report.quality["key"] != "accuracy" or "sst2" not in _data_of(report):
            continue
        _, made = report.compared(lora, qlora, "accuracy")
        ends = made["difference"]["low"], made["difference"]["high"]
        if ends[0] is None:
            found.append(Said(OPEN, f"{_named(report)}: one seed; it would take more"))
            continue
        low, high = sorted(ends) if made["a"] == lora["key"] else sorted(-x for x in ends)
        mean = made["difference"]["mean"] * (1 if made["a"] == lora["key"] else -1)
        verdict = REFUTED if not low <= 0.001 <= high else CONFIRMED if low >= -POINT and high <= POINT else OPEN
        least = f"; one of {made['detectable'] * 100:.2f} points would have been found" if made["detectable"] else ""
        between = f"{mean * 100:+.2f} points ({low * 100:+.2f} to {high * 100:+.2f})"
        wide = "; the interval is wider than a point either way: it would take more rows" if verdict == OPEN else ""
        sentence = f"{_named(report)}: LoRA minus QLoRA {between}{least}{wide}"
        found.append(Said(verdict, sentence, mean, low, high, "share"))
    return found


def _data_of(report: Report) -> str:
    """What says which rows: title and files, as one word."""
    names = [report.data["title"], *(data["name"] for data in report.data["data"])]
    return " ".join(names).lower().replace("-", "")


def _tokens_to_loss(report: Report, first: Mapping[str, Any], second: Mapping[str, Any]) -> Figure | None:
    """Supervised tokens to the lowest told loss that all runs of both reached: first over second, seed by seed."""
    for level in sorted(report.data["convergence"], key=lambda level: level["loss"]):
        rows = {row["variant"]: row for row in level["rows"]}
        one, other = rows.get(first["key"]), rows.get(second["key"])
        seeds = len(report.data["settings"]["seeds"])
        if one and other and one["reached"] == other["reached"] == seeds:
            pairs = zip(one["supervised_tokens"]["values"], other["supervised_tokens"]["values"], strict=True)
            shares = [a / b for a, b in pairs if b]
            return mean_interval(shares) if shares else None
    return None


def more_steps(reports: Sequence[Report]) -> list[Said]:
    found = []
    for report, qlora, lora in _pairs(reports, "qlora", "lora"):
        figure = _tokens_to_loss(report, qlora, lora)
        if figure is not None:
            what = f"{_named(report)}: supervised tokens to the same held-out loss, QLoRA's over LoRA's"
            found.append(within(figure, 1.2, 1.3, what))
    return found


def fewer_epochs_because_faster(reports: Sequence[Report]) -> list[Said]:
    """Epochs count rows, and rows do not depend on speed: at most the first half can hold."""
    found = []
    for one in more_steps(reports):
        if one.low is None:
            found.append(one)
            continue
        text = one.sentence.partition(", claimed")[0]
        verdict = PARTLY if one.low > 1 else REFUTED if one.high is not None and one.high <= 1 else OPEN
        found.append(Said(verdict, f"{text}; epochs do not depend on speed", one.figure, one.low, one.high))
    return found


def switch_to_lora(reports: Sequence[Report]) -> list[Said]:
    """Going on with LoRA gains on QLoRA alone, and beginning with QLoRA loses nothing on LoRA alone."""
    found = []
    for report in reports:
        switch = next((v for v in report.data["variants"] if _chained(v)), None)
        lora, qlora = report.any_variant("lora"), report.any_variant("qlora")
        if switch is None or lora is None or qlora is None:
            continue
        key = report.quality["key"]
        gained, lost = better(report, switch, qlora, key), no_worse(report, switch, lora, key)
        found.append(_of(report, all_of([gained, lost])))
    return found


def marginally_worse_slightly_slower(reports: Sequence[Report]) -> list[Said]:
    found = []
    for report, qlora, lora in _pairs(reports, "qlora", "lora"):
        worse = _of(report, no_worse(report, qlora, lora, report.quality["key"]))
        found.append(all_of([worse, *_faster(report, (lora, qlora))]))
    return found


def two_ranges(reports: Sequence[Report]) -> list[Said]:
    return [_share(report, "qlora", 0.80, 0.97) for report in _scored(reports, "qlora")]


def nf4_loses_less(reports: Sequence[Report]) -> list[Said]:
    """Two variants that differ in the format and in nothing else."""
    found = []
    for report in reports:
        by_type: dict[str, list[Mapping[str, Any]]] = {"nf4": [], "int4": []}
        for variant in report.data["variants"]:
            if variant["quant_type"] in by_type and not _chained(variant):
                by_type[variant["quant_type"]].append(variant)
        pairs = itertools.product(by_type["nf4"], by_type["int4"])
        alike = next(((one, other) for one, other in pairs if _but_format(one) == _but_format(other)), None)
        if alike is not None:
            found.append(_of(report, better(report, *alike, "eval_loss")))
    return found


def _but_format(variant: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in _own(variant).items() if name != "quant_type"}
    return own | {"method": variant["method_name"]}


def steps_cost_more(reports: Sequence[Report]) -> list[Said]:
    """10 to 20 %, and nearly nothing with fused kernels: halfbyte's are, so that less is the claim's second half."""
    found = []
    for report, qlora, lora in _pairs(reports, "qlora", "lora"):
        what = "QLoRA's time of an update over LoRA's"
        for made in _ratio(report, (qlora, lora), "step_seconds", (1.10, 1.20), what):
            less = made.high is not None and made.high < 1.10
            text = f"{made.sentence}; with fused kernels it nearly disappears, as the claim also says"
            found.append(replace(made, verdict=PARTLY, sentence=text) if less else made)
    return found


def rank_and_targets(reports: Sequence[Report]) -> list[Said]:
    """A rank that does for LoRA does not for QLoRA, and a higher one does; MLP targets gain on attention alone."""
    ranks = [made for report in reports if (made := _higher_rank(report)) is not None]
    targets = [made for report in reports if (made := _more_targets(report)) is not None]
    return [all_of([*ranks, *targets])] if ranks and targets else ranks or targets


def _higher_rank(report: Report) -> Said | None:
    lora8, qlora8 = report.variant("lora", lora_r=8), report.variant("qlora", lora_r=8)
    higher = [v for v in (report.variant("qlora", lora_r=rank) for rank in (16, 32)) if v is not None]
    if lora8 is None or qlora8 is None or not higher:
        return None
    key = report.quality["key"]
    made, worse = no_worse(report, qlora8, lora8, key), better(report, lora8, qlora8, key)
    gains = [better(report, v, qlora8, key) for v in higher]
    needed = worse.verdict == CONFIRMED and any(gain.verdict == CONFIRMED for gain in gains)
    verdict = CONFIRMED if needed else REFUTED if made.verdict == CONFIRMED else OPEN
    text = " ".join(_ended(part.sentence) for part in (made, *gains))
    return replace(made, verdict=verdict, sentence=f"{_named(report)}, rank 8: {text}")


def _more_targets(report: Report) -> Said | None:
    """QLoRA on attention alone against QLoRA on all linears, of the same report."""
    everything = report.variant("qlora") or report.variant("qlora", target_modules="all-linear")
    few = [v for v in report.variants("qlora") if _own(v).keys() == {"target_modules"} and _attention_only(v)]
    if everything is None or not few:
        return None
    made = better(report, everything, few[0], report.quality["key"])
    return replace(made, sentence=f"{_named(report)}, targets: {made.sentence}")


def _attention_only(variant: Mapping[str, Any]) -> bool:
    targets = _own(variant)["target_modules"]
    return not isinstance(targets, str) and set(targets) <= {"q_proj", "k_proj", "v_proj", "o_proj"}


def larger_with_qlora(reports: Sequence[Report]) -> list[Said]:
    """Two models on the same data by the same score: intervals that do not touch. One example: the families differ."""
    found = []
    for big in reports:
        qlora = big.any_variant("qlora")
        for small in reports:
            full = small.any_variant("full")
            sizes = [r.data["model"]["parameters"] or 0 for r in (big, small)]
            names = [[(d["name"], d.get("rows"), d.get("eval_rows")) for d in r.data["data"]] for r in (big, small)]
            key = big.quality["key"]
            if qlora is None or full is None or sizes[0] <= sizes[1] or names[0] != names[1]:
                continue
            if key != small.quality["key"] or big.quality["better"] != "higher":
                continue
            mine, theirs = qlora["figures"][key], full["figures"][key]
            if None in (mine["low"], theirs["low"]):
                continue
            verdict = CONFIRMED if mine["low"] > theirs["high"] else REFUTED if mine["high"] < theirs["low"] else OPEN
            text = (
                f"{_named(big)} with QLoRA {mine['mean']:.3f}, {_named(small)} in full "
                f"{theirs['mean']:.3f} ({big.quality['label']}); two model families, so one example"
            )
            found.append(Said(verdict, text, mine["mean"] - theirs["mean"], None, None, "share"))
    return found


def merged_is_16_bit(reports: Sequence[Report]) -> list[Said]:
    """Merged into dequantized or 16-bit weights, the loss stays within one part in a hundred."""
    found = []
    for report in reports:
        qlora = report.any_variant("qlora")
        if qlora is None:
            continue
        unmerged = {"figures": {"merge_loss": qlora["figures"].get("eval_loss")}}
        figure = ratio(qlora, unmerged, "merge_loss")
        if figure is not None:
            what = f"{_named(report)}: held-out loss once merged to 16 bits, over the unmerged model's"
            found.append(within(figure, 0.99, 1.01, what, "taken for the same:"))
    return found


def dora_galore_loftq(reports: Sequence[Report]) -> list[Said]:
    """Three claims in one: DoRA better than LoRA, GaLore better than LoRA, LoftQ faster to a loss than QLoRA."""
    parts: list[list[Said]] = []
    for pairs in ((("dora", "lora"), ("qdora", "qlora")), (("galore", "lora"),)):
        parts.append(
            [
                _of(report, better(report, one, other, report.quality["key"]))
                for first, second in pairs
                for report, one, other in _pairs(reports, first, second)
            ]
        )
    what = "supervised tokens to the same held-out loss, LoftQ's over QLoRA's"
    parts.append(
        [
            within(figure, 0.0, 1.0, f"{_named(report)}: {what}", "taken for faster:")
            for report, loftq, qlora in _pairs(reports, "loftq", "qlora")
            if (figure := _tokens_to_loss(report, loftq, qlora)) is not None
        ]
    )
    if not any(parts):
        return []
    names = ("DoRA", "GaLore", "LoftQ")
    asked = [
        replace(all_of(said), verdict=together(said)) if said else Said(OPEN, f"{name}: not measured")
        for name, said in zip(names, parts, strict=True)
    ]
    return [all_of(asked)]


TESTS: dict[int, Test] = {
    6: quality_shares,
    7: comparable_to_full,
    8: precise_tasks_only,
    9: lora_slightly_faster,
    12: lora_66_percent_faster,
    15: equal_on_sst2,
    18: more_steps,
    19: fewer_epochs_because_faster,
    21: switch_to_lora,
    26: marginally_worse_slightly_slower,
    34: two_ranges,
    35: nf4_loses_less,
    40: steps_cost_more,
    42: rank_and_targets,
    43: larger_with_qlora,
    44: merged_is_16_bit,
    45: dora_galore_loftq,
}
"""By the claim's number in plan/claims.yaml."""

NEEDS: dict[int, str] = {
    6: "a comparison of full, lora and qlora with a task metric (--metrics, or rows with labels)",
    7: "a comparison of full and qlora",
    8: "comparisons of lora and qlora, one of them with --metrics exact_match or pass@1",
    9: "a comparison of lora and qlora",
    10: "a run under a memory limit that the optimizer's state exceeds, paged and not: no report has that",
    12: "a comparison of lora and qlora",
    15: "a comparison of lora and qlora on rows of SST-2",
    18: "a comparison of lora and qlora whose runs are evaluated several times (eval_steps)",
    19: "a comparison of lora and qlora whose runs are evaluated several times (eval_steps)",
    21: "a comparison of lora, qlora and a variant that continues a QLoRA adapter with lora (continue_from)",
    26: "a comparison of lora and qlora",
    34: "a comparison of full and qlora with a task metric",
    35: "a comparison of qlora with quant_type nf4 and int4",
    38: "memory by layer while a quantized model runs: no report has that",
    40: "a comparison of lora and qlora",
    42: "comparisons of lora and qlora with --vary lora_r=8,16,32, and of qlora on all linears and on attention alone",
    43: "two comparisons on the same rows with a task metric: a larger model with qlora, a smaller one in full",
    44: "a comparison with qlora and --merge-loss",
    45: "a comparison of lora, qlora, dora, galore and loftq",
}
"""What a claim needs to be decided, for those who have no such report."""


# ---------------------------------------------------------------- all of them


def load_reports(folders: Sequence[Path]) -> list[Report]:
    """Every report.json in or below the folders. UsageError where there is none."""
    paths = [path for folder in folders for path in ([folder] if folder.is_file() else sorted(folder.rglob(FILE)))]
    if not paths:
        places = ", ".join(map(str, folders))
        raise UsageError(f"no {FILE} in {places}: a comparison writes one (halfbyte compare … -o)")
    return [Report(path, read_json(path)) for path in paths]


def judge(number: int, reports: Sequence[Report]) -> Verdict:
    """What the reports say of one claim."""
    said = TESTS[number](reports) if number in TESTS else []
    if not said:
        return Verdict(number, OPEN, f"it needs {NEEDS[number]}")
    main = max(said, key=lambda one: (one.verdict != OPEN, one.low is not None))
    evidence = ", ".join(str(report.path) for report in reports if any(_named(report) in one.sentence for one in said))
    sentence = " ".join(_ended(one.sentence) for one in said)
    return Verdict(number, together(said), sentence, main.figure, main.low, main.high, main.unit, evidence)


def judge_all(folders: Sequence[Path]) -> list[Verdict]:
    """Every claim that measurement decides, by number."""
    reports = load_reports(folders)
    return [judge(number, reports) for number in sorted(NEEDS)]


def with_verdicts(held: claim_file.Claims, verdicts: Sequence[Verdict]) -> claim_file.Claims:
    """The claims' data with what was measured: claims that were not testable keep what they said before."""
    for one in verdicts:
        if one.evidence:
            held = held.with_verdict(
                one.claim, one.verdict, one.figure, one.low, one.high, one.sentence, one.evidence, one.unit
            )
    return held


def _main(arguments: Sequence[str]) -> None:
    """Judge the reports below the folders, keep the verdicts in claims.yaml, print the page."""
    if not arguments:
        raise SystemExit("python -m halfbyte.compare.claims FOLDER… > docs/claims.md")
    held = with_verdicts(claim_file.load(), judge_all([Path(folder) for folder in arguments]))
    held.save()
    sys.stdout.write(claim_file.page(held))


if __name__ == "__main__":
    _main(sys.argv[1:])
