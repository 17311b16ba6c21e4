"""The claims that comparisons decide, by number: each takes the reports that there are and says what they say."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from halfbyte.compare.claim_rules import (
    CONFIRMED,
    OPEN,
    PARTLY,
    POINT,
    PRECISE,
    REFUTED,
    SLIGHTLY,
    Report,
    Said,
    all_of,
    asked_each,
    better,
    chained,
    ended,
    learning_pairs_of,
    no_worse,
    of_learning,
    of_quiet_machines,
    own_fields,
    pairs_of,
    ratio,
    ratio_within,
    scored,
    share_of_full,
    title_of,
    titled,
    within,
)
from halfbyte.compare.statistics import Figure, mean_ratio

Test = Callable[[Sequence[Report]], list[Said]]


def quality_shares(reports: Sequence[Report]) -> list[Said]:
    return [
        all_of([share_of_full(report, "qlora", 0.95, 0.99), share_of_full(report, "lora", 0.97, 0.99)])
        for report in of_learning(scored(reports, "qlora", "lora"))
    ]


def comparable_to_full(reports: Sequence[Report]) -> list[Said]:
    return [
        titled(report, no_worse(report, qlora, full, report.quality["key"]))
        for report, qlora, full in learning_pairs_of(reports, "qlora", "full")
    ]


def precise_tasks_only(reports: Sequence[Report]) -> list[Said]:
    """A loss on exact matches and none elsewhere: both have to be seen."""
    parts = []
    for report, qlora, lora in learning_pairs_of(reports, "qlora", "lora"):
        key = report.quality["key"]
        made, lost = no_worse(report, qlora, lora, key), better(report, lora, qlora, key).verdict == CONFIRMED
        if key.endswith(PRECISE):
            verdict = CONFIRMED if lost else REFUTED if made.verdict == CONFIRMED else OPEN
        elif lost and made.verdict != CONFIRMED:
            made, verdict = better(report, lora, qlora, key), REFUTED
        else:
            verdict = made.verdict
        parts.append((key.endswith(PRECISE), titled(report, replace(made, verdict=verdict))))
    if not parts:
        return []
    if len({precise for precise, _ in parts}) < 2:
        return [Said(OPEN, "it needs a comparison with exact_match or pass@1 beside one without")]
    return [all_of([part for _, part in parts])]


def lora_slightly_faster(reports: Sequence[Report]) -> list[Said]:
    pairs = pairs_of(of_quiet_machines(reports), "lora", "qlora")
    return [made for report, lora, qlora in pairs for made in _faster(report, (lora, qlora))]


def _faster(report: Report, pair: tuple[Any, Any]) -> list[Said]:
    what = "LoRA's tokens a second over QLoRA's"
    return ratio_within(report, pair, "tokens_per_second", (1.0, SLIGHTLY), what, "taken for slightly faster:")


def lora_66_percent_faster(reports: Sequence[Report]) -> list[Said]:
    what = "LoRA's tokens a second over QLoRA's"
    return [
        made
        for report, lora, qlora in pairs_of(of_quiet_machines(reports), "lora", "qlora")
        for made in ratio_within(report, (lora, qlora), "tokens_per_second", (1.33, 1.66), what)
    ]


def equal_on_sst2(reports: Sequence[Report]) -> list[Said]:
    """0.1 points are claimed: inside the measured interval, and that inside a point either way. The claim's other two
    tasks are not asked."""
    found = []
    for report, lora, qlora in pairs_of(reports, "lora", "qlora"):
        if report.quality["key"] != "accuracy" or "sst2" not in _data_of(report):
            continue
        _, made = report.compared(lora, qlora, "accuracy")
        ends = made["difference"]["low"], made["difference"]["high"]
        if ends[0] is None:
            found.append(Said(OPEN, f"{title_of(report)}: one seed; it would take more"))
            continue
        low, high = sorted(ends) if made["a"] == lora["key"] else sorted(-x for x in ends)
        mean = made["difference"]["mean"] * (1 if made["a"] == lora["key"] else -1)
        verdict = REFUTED if not low <= 0.001 <= high else CONFIRMED if low >= -POINT and high <= POINT else OPEN
        least = f"; one of {made['detectable'] * 100:.2f} points would have been found" if made["detectable"] else ""
        between = f"{mean * 100:+.2f} points ({low * 100:+.2f} to {high * 100:+.2f})"
        wide = "; the interval is wider than a point either way: it would take more rows" if verdict == OPEN else ""
        sentence = f"{title_of(report)}: LoRA minus QLoRA {between}{least}{wide}"
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
        if one and other and one["reached"] == other["reached"] == seeds and not _at_first(one, other):
            spent = one["supervised_tokens"]["values"], other["supervised_tokens"]["values"]
            return mean_ratio([a / b for a, b in zip(*spent, strict=True)]) if all(map(all, spent)) else None
    return None


def _at_first(*rows: Mapping[str, Any]) -> bool:
    """Whether a run was there by its first evaluation, so that only an upper bound is known."""
    return any(row.get("at_first") for row in rows)


def more_steps(reports: Sequence[Report]) -> list[Said]:
    found = []
    for report, qlora, lora in learning_pairs_of(reports, "qlora", "lora"):
        figure = _tokens_to_loss(report, qlora, lora)
        if figure is not None:
            what = f"{title_of(report)}: supervised tokens to the same held-out loss, QLoRA's over LoRA's"
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
        switch = next((v for v in report.data["variants"] if chained(v)), None)
        lora, qlora = report.any_variant("lora"), report.any_variant("qlora")
        if switch is None or lora is None or qlora is None:
            continue
        key = report.quality["key"]
        gained, lost = better(report, switch, qlora, key), no_worse(report, switch, lora, key)
        sizes = Said(OPEN, "Which size of model it should begin at: not measured")
        found.append(titled(report, all_of([gained, lost, sizes])))
    return found


def marginally_worse_slightly_slower(reports: Sequence[Report]) -> list[Said]:
    """Two parts, and not of the same reports: what is learned where it was measured well, speed on a quiet machine."""
    pairs = learning_pairs_of(reports, "qlora", "lora")
    worse = [titled(report, no_worse(report, qlora, lora, report.quality["key"])) for report, qlora, lora in pairs]
    slower = lora_slightly_faster(reports) or [Said(OPEN, "Speed was not compared")]
    parts = [asked_each(said) for said in (worse, slower) if said]
    return [all_of(parts)] if worse else []


def two_ranges(reports: Sequence[Report]) -> list[Said]:
    """The second half needs full fine-tuning on such tasks."""
    found = of_learning(scored(reports, "qlora"))
    other = Said(OPEN, "On maths, strict code and rare languages: not measured against full")
    return [all_of([share_of_full(report, "qlora", 0.80, 0.97), other]) for report in found]


def nf4_loses_less(reports: Sequence[Report]) -> list[Said]:
    """Two variants that differ in the format and in nothing else."""
    found = []
    for report in reports:
        by_type: dict[str, list[Mapping[str, Any]]] = {"nf4": [], "int4": []}
        for variant in report.data["variants"]:
            if variant["quant_type"] in by_type and not chained(variant):
                by_type[variant["quant_type"]].append(variant)
        pairs = itertools.product(by_type["nf4"], by_type["int4"])
        alike = next(((one, other) for one, other in pairs if _but_format(one) == _but_format(other)), None)
        if alike is not None:
            found.append(titled(report, better(report, *alike, "eval_loss")))
    return found


def _but_format(variant: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in own_fields(variant).items() if name != "quant_type"}
    return own | {"method": variant["method_name"]}


def steps_cost_more(reports: Sequence[Report]) -> list[Said]:
    """10 to 20 %, and nearly nothing with fused kernels: halfbyte's are, so that less is the claim's second half."""
    found = []
    for report, qlora, lora in pairs_of(of_quiet_machines(reports), "qlora", "lora"):
        what = "QLoRA's time of an update over LoRA's"
        for made in ratio_within(report, (qlora, lora), "step_seconds", (1.10, 1.20), what):
            less = made.high is not None and made.high < 1.10
            text = f"{made.sentence}; with fused kernels it nearly disappears, as the claim also says"
            found.append(replace(made, verdict=PARTLY, sentence=text) if less else made)
    larger = Said(OPEN, "Whether larger batches offset it: not measured")
    return [all_of([asked_each(found), larger])] if found else []


def rank_and_targets(reports: Sequence[Report]) -> list[Said]:
    """A rank that does for LoRA does not for QLoRA, a higher one does; MLP targets gain on attention alone."""
    ranks = [made for report in reports if (made := _higher_rank(report)) is not None]
    targets = [made for report in reports if (made := _more_targets(report)) is not None]
    if not ranks and not targets:
        return []
    ranks = ranks or [Said(OPEN, "Ranks: not measured")]
    return [all_of([*ranks, *(targets or [Said(OPEN, "Targets: not measured")])])]


def _higher_rank(report: Report) -> Said | None:
    lora8, qlora8 = report.variant("lora", lora_r=8), report.variant("qlora", lora_r=8)
    higher = [v for v in (report.variant("qlora", lora_r=rank) for rank in (16, 32)) if v is not None]
    if lora8 is None or qlora8 is None or not higher:
        return None
    key = report.quality["key"]
    made, worse = no_worse(report, qlora8, lora8, key), better(report, lora8, qlora8, key)
    gains = [better(report, v, qlora8, key) for v in higher]
    level = [no_worse(report, v, lora8, key) for v in higher]
    verdict = OPEN
    if made.verdict == CONFIRMED:
        verdict = REFUTED
    elif worse.verdict == CONFIRMED and any(gain.verdict == CONFIRMED for gain in gains):
        if any(part.verdict == CONFIRMED for part in level):
            verdict = CONFIRMED
        elif all(better(report, lora8, v, key).verdict == CONFIRMED for v in higher):
            verdict = PARTLY  # a higher rank helps, and none that was tried is enough
    text = " ".join(ended(part.sentence) for part in (made, *gains, *level))
    return replace(made, verdict=verdict, sentence=f"{title_of(report)}, rank 8: {text}")


def _more_targets(report: Report) -> Said | None:
    """QLoRA on attention alone against QLoRA on all linears, of the same report."""
    everything = report.variant("qlora") or report.variant("qlora", target_modules="all-linear")
    few = [v for v in report.variants("qlora") if own_fields(v).keys() == {"target_modules"} and _attention_only(v)]
    if everything is None or not few:
        return None
    made = better(report, everything, few[0], report.quality["key"])
    return replace(made, sentence=f"{title_of(report)}, targets: {made.sentence}")


def _attention_only(variant: Mapping[str, Any]) -> bool:
    targets = own_fields(variant)["target_modules"]
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
            if mine is None or theirs is None or None in (mine["low"], theirs["low"]):
                continue
            verdict = CONFIRMED if mine["low"] > theirs["high"] else REFUTED if mine["high"] < theirs["low"] else OPEN
            text = (
                f"{title_of(big)} with QLoRA {mine['mean']:.3f}, {title_of(small)} in full "
                f"{theirs['mean']:.3f} ({big.quality['label']}); two model families, so one example"
            )
            often = Said(OPEN, "How often: not measured")
            found.append(all_of([Said(verdict, text, mine["mean"] - theirs["mean"], None, None, "share"), often]))
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
            what = f"{title_of(report)}: held-out loss once merged to 16 bits, over the unmerged model's"
            found.append(within(figure, 0.99, 1.01, what, "taken for the same:"))
    return found


def dora_galore_loftq(reports: Sequence[Report]) -> list[Said]:
    """Three claims in one: DoRA better than LoRA, GaLore better than LoRA, LoftQ faster to a loss than QLoRA."""
    parts: list[list[Said]] = []
    for pairs in ((("dora", "lora"), ("qdora", "qlora")), (("galore", "lora"),)):
        parts.append(
            [
                titled(report, better(report, one, other, report.quality["key"]))
                for first, second in pairs
                for report, one, other in learning_pairs_of(reports, first, second)
            ]
        )
    what = "supervised tokens to the same held-out loss, LoftQ's over QLoRA's"
    parts.append(
        [
            within(figure, 0.0, 1.0, f"{title_of(report)}: {what}", "taken for faster:")
            for report, loftq, qlora in learning_pairs_of(reports, "loftq", "qlora")
            if (figure := _tokens_to_loss(report, loftq, qlora)) is not None
        ]
    )
    if not any(parts):
        return []
    names = ("DoRA", "GaLore", "LoftQ")
    asked = [
        asked_each(said) if said else Said(OPEN, f"{name}: not measured")
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
    10: "memory-claims.json of benchmarks/claims_memory.py: a run under a memory limit, its optimizer paged and not",
    12: "a comparison of lora and qlora",
    15: "a comparison of lora and qlora on rows of SST-2",
    18: "a comparison of lora and qlora whose runs are evaluated several times (eval_steps)",
    19: "a comparison of lora and qlora whose runs are evaluated several times (eval_steps)",
    21: "a comparison of lora, qlora and a variant that continues a QLoRA adapter with lora (continue_from)",
    26: "a comparison of lora and qlora",
    34: "a comparison of full and qlora with a task metric",
    35: "a comparison of qlora with quant_type nf4 and int4",
    38: "memory-claims.json of benchmarks/claims_memory.py: what a quantized model's pass takes beyond a 16-bit one's",
    40: "a comparison of lora and qlora",
    42: "comparisons of lora and qlora with --vary lora_r=8,16,32, and of qlora on all linears and on attention alone",
    43: "two comparisons on the same rows with a task metric: a larger model with qlora, a smaller one in full",
    44: "a comparison with qlora and --merge-loss",
    45: "a comparison of lora, qlora, dora, galore and loftq",
}
"""What a claim needs to be decided, for those who have no such report."""
