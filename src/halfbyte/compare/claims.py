"""Other people's claims held against what was measured: `halfbyte compare --claims`.

A claim that measurement can decide has a small function here, under the number that it has in `plan/claims.yaml`; each
takes the reports that there are and says what they say. The rules, the same for all:

    a share or a ratio with a range      confirmed where its 95 % interval is inside the range, refuted where it is
                                         outside, else not testable here: the interval is wider than the question
    one method better than another       confirmed or refuted where a difference was found, else not testable here, with
                                         the difference that would have been found
    several reports                      each is asked; reports that disagree make it `partly`

`not testable here` always says what would be needed.

    python -m halfbyte.compare.claims FOLDER… > docs/claims.md     judges the reports there, kept in claims.yaml
"""

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

    def variant(self, method: str, **fields: Any) -> Mapping[str, Any] | None:
        """The variant of this method that changes nothing else, or the fields given; the first where there are more."""
        for variant in self.data["variants"]:
            own = {name: value for name, value in variant["fields"].items() if name != "method"}
            chained = any(note.startswith("goes on from") for note in variant["notes"])
            same = variant["method_name"] == method and all(own.get(k) == v for k, v in fields.items())
            if same and not chained and (fields or not own):
                return variant  # type: ignore[no-any-return]
        return None

    def any_variant(self, method: str) -> Mapping[str, Any] | None:
        """The plain variant of a method, else the first one of it."""
        plain = self.variant(method)
        return plain or next((v for v in self.data["variants"] if v["method_name"] == method), None)

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


Test = Callable[[Sequence[Report]], list[Said]]


# ---------------------------------------------------------------- rules


def within(figure: Figure, low: float, high: float, what: str) -> Said:
    """A figure against a claimed range, both ends included."""
    shown = f"{what}: {figure.mean:.3f}"
    if figure.low is None or figure.high is None:
        return Said(OPEN, f"{shown} with one seed; it would take more seeds", figure.mean)
    shown += f" ({figure.low:.3f} to {figure.high:.3f}), claimed {low:g} to {high:g}"
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
    found = [(report, report.any_variant(first), report.any_variant(second)) for report in reports]
    return [(report, one, other) for report, one, other in found if one is not None and other is not None]


def _ratios(
    reports: Sequence[Report], first: str, second: str, metric: str, low: float, high: float, what: str
) -> list[Said]:
    found = []
    for report, one, other in _pairs(reports, first, second):
        figure = ratio(one, other, metric)
        if figure is not None:
            found.append(within(figure, low, high, f"{_named(report)}: {what}"))
    return found


def _named(report: Report) -> str:
    names = ", ".join(data["name"] for data in report.data["data"])
    return f"{report.data['model']['name']} on {names}"


def _shares(reports: Sequence[Report], method: str, low: float, high: float) -> list[Said]:
    """A method's quality as a share of full's, of scores; a loss is no share of quality."""
    found = []
    for report in reports:
        variant = report.any_variant(method)
        against = variant["against_full"] if variant is not None else None
        if against is None or report.metric(against["metric"])["better"] != "higher":
            continue
        share = Figure(against["share"]["mean"], against["share"]["low"], against["share"]["high"], ())
        found.append(within(share, low, high, f"{_named(report)}: {method}'s {against['metric']} as a share of full's"))
    return found


# ---------------------------------------------------------------- the claims, by number


def quality_shares(reports: Sequence[Report]) -> list[Said]:
    return _shares(reports, "qlora", 0.95, 0.99) + _shares(reports, "lora", 0.97, 0.99)


def comparable_to_full(reports: Sequence[Report]) -> list[Said]:
    found = []
    for report, qlora, full in _pairs(reports, "qlora", "full"):
        made = better(report, full, qlora, report.quality["key"])
        verdict = {CONFIRMED: REFUTED, REFUTED: CONFIRMED, OPEN: CONFIRMED}[made.verdict]
        winner, comparison = report.compared(full, qlora, report.quality["key"])
        if winner == NONE and comparison["detectable"] is None:
            verdict = OPEN
        sentence = f"{_named(report)}: {comparison['sentence']}"
        found.append(Said(verdict, sentence, made.figure, made.low, made.high, made.unit))
    return found


def precise_tasks_only(reports: Sequence[Report]) -> list[Said]:
    """A loss on exact matches and none elsewhere confirms it; one elsewhere refutes it."""
    found = []
    for report, qlora, lora in _pairs(reports, "qlora", "lora"):
        precise = report.quality["key"] in ("exact_match", "pass@1")
        made = better(report, lora, qlora, report.quality["key"])
        lost = made.verdict == CONFIRMED
        verdict = (CONFIRMED if precise else REFUTED) if lost else OPEN if precise else CONFIRMED
        kind = "precision-sensitive" if precise else "not precision-sensitive"
        found.append(replace(made, verdict=verdict, sentence=f"{_named(report)} ({kind}): {made.sentence}"))
    if not any("(precision-sensitive)" in one.sentence for one in found):
        return [Said(OPEN, "it needs a comparison with exact_match or pass@1 beside one without")] if found else []
    return found


def lora_slightly_faster(reports: Sequence[Report]) -> list[Said]:
    return _ratios(reports, "lora", "qlora", "tokens_per_second", 1.0, 1.15, "LoRA's tokens a second over QLoRA's")


def lora_66_percent_faster(reports: Sequence[Report]) -> list[Said]:
    return _ratios(reports, "lora", "qlora", "tokens_per_second", 1.33, 1.66, "LoRA's tokens a second over QLoRA's")


def equal_on_sst2(reports: Sequence[Report]) -> list[Said]:
    """The difference that is claimed is 0.1 points: inside the measured interval or not."""
    found = []
    for report, lora, qlora in _pairs(reports, "lora", "qlora"):
        if report.quality["key"] != "accuracy" or "sst2" not in _named(report).lower().replace("-", ""):
            continue
        _, made = report.compared(lora, qlora, "accuracy")
        ends = made["difference"]["low"], made["difference"]["high"]
        if ends[0] is None:
            found.append(Said(OPEN, f"{_named(report)}: one seed; it would take more"))
            continue
        low, high = sorted(ends) if made["a"] == lora["key"] else sorted(-x for x in ends)
        mean = made["difference"]["mean"] * (1 if made["a"] == lora["key"] else -1)
        inside = low <= 0.001 <= high
        least = f"; one of {made['detectable'] * 100:.2f} points would have been found" if made["detectable"] else ""
        between = f"{mean * 100:+.2f} points ({low * 100:+.2f} to {high * 100:+.2f})"
        sentence = f"{_named(report)}: LoRA minus QLoRA {between}{least}"
        found.append(Said(CONFIRMED if inside else REFUTED, sentence, mean, low, high, "share"))
    return found


def _tokens_to_loss(report: Report, first: Mapping[str, Any], second: Mapping[str, Any]) -> Figure | None:
    """Supervised tokens to the lowest told loss that all runs of both reached: first over second, seed by seed."""
    for level in sorted(report.data["convergence"], key=lambda level: level["loss"]):
        rows = {row["variant"]: row for row in level["rows"]}
        one, other = rows.get(first["key"]), rows.get(second["key"])
        seeds = len(report.data["settings"]["seeds"])
        if one and other and one["reached"] == other["reached"] == seeds:
            pairs = zip(one["supervised_tokens"]["values"], other["supervised_tokens"]["values"], strict=True)
            return mean_interval([a / b for a, b in pairs if b])
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
        verdict = PARTLY if one.low > 1 else REFUTED
        found.append(Said(verdict, f"{text}; epochs do not depend on speed", one.figure, one.low, one.high))
    return found


def switch_to_lora(reports: Sequence[Report]) -> list[Said]:
    found = []
    for report in reports:
        switch = next(
            (v for v in report.data["variants"] if any(note.startswith("goes on from") for note in v["notes"])), None
        )
        methods = (report.any_variant("lora"), report.any_variant("qlora"))
        alone = [v for v in methods if v is not None and v is not switch]
        if switch is None or len(alone) < 2:
            continue
        key = report.quality["key"]
        winners = [report.compared(switch, other, key) for other in alone]
        gained = CONFIRMED if winners[1][0] == "first" else PARTLY
        verdict = REFUTED if winners[0][0] == "second" else gained
        sentence = f"{_named(report)}: {winners[0][1]['sentence']} {winners[1][1]['sentence']}"
        difference = winners[1][1]["difference"]
        found.append(Said(verdict, sentence, difference["mean"], difference["low"], difference["high"]))
    return found


def marginally_worse_slightly_slower(reports: Sequence[Report]) -> list[Said]:
    found = _ratios(reports, "lora", "qlora", "tokens_per_second", 1.0, 1.15, "LoRA's tokens a second over QLoRA's")
    for report, lora, qlora in _pairs(reports, "lora", "qlora"):
        made = better(report, lora, qlora, report.quality["key"])
        found.append(replace(made, sentence=f"{_named(report)}: {made.sentence}"))
    return found


def two_ranges(reports: Sequence[Report]) -> list[Said]:
    return _shares(reports, "qlora", 0.80, 0.97)


def nf4_loses_less(reports: Sequence[Report]) -> list[Said]:
    found = []
    for report in reports:
        nf4 = next((v for v in report.data["variants"] if v["quant_type"] == "nf4"), None)
        int4 = next((v for v in report.data["variants"] if v["quant_type"] == "int4"), None)
        if nf4 is not None and int4 is not None:
            found.append(better(report, nf4, int4, "eval_loss"))
    return found


def steps_cost_more(reports: Sequence[Report]) -> list[Said]:
    return _ratios(reports, "qlora", "lora", "step_seconds", 1.10, 1.20, "QLoRA's time of an update over LoRA's")


def higher_rank_needed(reports: Sequence[Report]) -> list[Said]:
    found = []
    for report in reports:
        lora8, qlora8 = report.variant("lora", lora_r=8), report.variant("qlora", lora_r=8)
        if lora8 is None or qlora8 is None:
            continue
        made = better(report, lora8, qlora8, report.quality["key"])
        text = f"{_named(report)}, rank 8: {made.sentence}"
        higher = [v for v in (report.variant("qlora", lora_r=rank) for rank in (16, 32)) if v is not None]
        gains = [better(report, v, qlora8, report.quality["key"]) for v in higher]
        if gains:
            text += " " + " ".join(gain.sentence for gain in gains)
        needed = made.verdict == CONFIRMED and any(gain.verdict == CONFIRMED for gain in gains)
        verdict = CONFIRMED if needed else REFUTED if made.verdict == REFUTED else OPEN
        found.append(Said(verdict, text, made.figure, made.low, made.high, made.unit))
    return found


def larger_with_qlora(reports: Sequence[Report]) -> list[Said]:
    """Two models on the same data by the same score: intervals that do not touch. One example: the families differ."""
    found = []
    for big in reports:
        qlora = big.any_variant("qlora")
        for small in reports:
            full = small.any_variant("full")
            sizes = [r.data["model"]["parameters"] or 0 for r in (big, small)]
            names = [[d["name"] for d in r.data["data"]] for r in (big, small)]
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
                f"{_named(big)} with QLoRA {mine['mean']:.3f}, {small.data['model']['name']} in full "
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
            found.append(within(figure, 0.99, 1.01, what))
    return found


def dora_galore_loftq(reports: Sequence[Report]) -> list[Said]:
    """Three claims in one: DoRA better than LoRA, GaLore better than LoRA, LoftQ faster to a loss than QLoRA."""
    found = []
    for first, second in (("dora", "lora"), ("qdora", "qlora"), ("galore", "lora")):
        for report, one, other in _pairs(reports, first, second):
            made = better(report, one, other, report.quality["key"])
            found.append(replace(made, sentence=f"{_named(report)}: {made.sentence}"))
    for report, loftq, qlora in _pairs(reports, "loftq", "qlora"):
        figure = _tokens_to_loss(report, loftq, qlora)
        if figure is not None:
            what = f"{_named(report)}: supervised tokens to the same held-out loss, LoftQ's over QLoRA's"
            made = within(figure, 0.0, 1.0, what)
            found.append(made)
    return found


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
    42: higher_rank_needed,
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
    42: "a comparison of lora and qlora with --vary lora_r=8,16,32",
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
    sentence = " ".join(one.sentence if one.sentence.endswith(".") else one.sentence + "." for one in said)
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
