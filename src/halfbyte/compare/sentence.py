"""The sentence for whoever decides: which variant to use here, and what it costs. Plain rules on the statistics.

1. With one seed, nothing is said of quality: what a seed changes is not known.
2. The best is the variant with the best mean of the quality metric among those that no other was found to beat. Beside
   it stand those from which no difference was found, with the difference that would have been.
3. Of these, those that none of them was found to beat may be advised, and of them those that run here: the one that
   takes the least time; or one from which no difference in time to it was found and that was found to take less memory.
   It is said to take the least only where a difference to every other of them was found, and named as the best only
   where it is the best and a difference to every other variant was found.
   Where only a difference of more than TOO_MUCH of the best's figure would have been found, none is advised: it is
   said that too little was run, and which is the cheapest.
4. What it costs: time and memory of one run, money where a price is known; and the variant with the least memory, where
   that is another.

`comparisons` are those of report.json; a difference that has no verdict there is none here. Times of two machines are
not compared, nor those of runs beside which other work had a part of the processor, or may have had: then memory alone
decides.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from halfbyte.compare import wording
from halfbyte.compare.statistics import ENOUGH_ROWS

NOTHING = "no difference found"
TOO_MUCH = 0.05
"""Of the best figure: a difference that somebody cares for, and that runs have to be able to find if they decide."""


def sentence(
    quality: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    variants: Sequence[Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    elsewhere: Collection[str] = (),
    quiet: bool | None = True,
    rows: int | None = None,
) -> str:
    """A few sentences.

    quality     the metric that decides
    metrics     by key
    variants    with their figures
    elsewhere   keys of variants that do not fit this machine: their runs are another's
    quiet       whether the runs had the processor for themselves; None: it is not known
    rows        how many were held out; None: it is not known
    """
    finished = [v for v in variants if v["figures"].get("seconds")]
    key, label = quality["key"], quality["label"]
    known = [v for v in finished if v["figures"].get(key)]
    if not finished:
        return "No run has finished, so nothing can be said yet."
    if len(finished) == 1:
        return f"Only {finished[0]['label']} has finished runs, so there is nothing to compare it with yet."
    if len(known) < 2:
        whose = f"is known of {known[0]['label']} alone" if known else "was not measured"
        return f"The {label} {whose}, so nothing can be said of it: --quality names another metric to judge by."
    several = [v for v in known if v["figures"][key]["n"] > 1]
    if len(several) < 2:
        spent, name = ("seconds", "time") if quiet else ("peak_memory_bytes", "memory")
        cheap = min(known, key=lambda v: v["figures"][spent]["mean"])
        return (
            f"With one seed a difference in {label} cannot be told from chance, so no method is advised for "
            f"its quality; {cheap['label']} took the least {name} in its run: {_cost(cheap, metrics)}."
        )
    known = several
    sign = 1 if quality["better"] == "lower" else -1
    unbeaten = [v for v in known if not any(_better(comparisons, other, v, key) for other in known)] or known
    best = min(unbeaten, key=lambda v: sign * v["figures"][key]["mean"])
    equal = [v for v in known if v is best or _verdict(comparisons, v, best, key) == NOTHING]
    choice = [v for v in equal if not any(_better(comparisons, other, v, key) for other in equal)]
    here = [v for v in choice if v["key"] not in elsewhere]
    if not here:
        value = wording.amount(best["figures"][key]["mean"], dict(quality))
        return (
            f"{best['label']} has the best {label} ({value}), and does not fit this machine: one run costs "
            f"{_cost(best, metrics)} elsewhere." + _best_here(known, best, quality, metrics, comparisons, elsewhere)
        )
    advised, reason = _fastest(here, comparisons) if quiet else _smallest(here, comparisons, quiet)
    least = _least_found(best, equal, comparisons, key)
    if len(here) > 1 and least is not None and least > TOO_MUCH * abs(best["figures"][key]["mean"]):
        said = f"{_undecided(equal, quality, least)} By cost alone it is {advised['label']}"
        return f"{said}{reason.replace(', nor one', '; no difference', 1)}; one run costs {_cost(advised, metrics)}."
    said = (
        f"Use {advised['label']} here: {_why(advised, best, equal, quality, comparisons, len(known) < len(finished))}"
    )
    if len(here) > 1:
        said += reason
    elif len(equal) > 1:
        said += _alone(equal, choice)
    said += "; "
    said += f"one run costs {_cost(advised, metrics)}."
    few = f" This rests on {rows} held-out rows." if rows is not None and rows < ENOUGH_ROWS else ""
    return said + _least_memory(advised, known, quality, comparisons) + few


def _least_found(
    best: Mapping[str, Any], equal: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]], key: str
) -> float | None:
    """The difference to the best that would have been found of each of the others."""
    found = [_comparison(comparisons, best, other, key) for other in equal if other is not best]
    return max((c["detectable"] for c in found if c is not None and c["detectable"] is not None), default=None)


def _undecided(equal: Sequence[Mapping[str, Any]], quality: Mapping[str, Any], least: float) -> str:
    sign = 1 if quality["better"] == "lower" else -1
    ordered = sorted(equal, key=lambda v: sign * v["figures"][quality["key"]]["mean"])
    values = [f"{v['label']} ({wording.amount(v['figures'][quality['key']]['mean'], dict(quality))})" for v in ordered]
    size = wording.difference(least, dict(quality))
    return (
        f"Too little was run to choose by {quality['label']}: no difference was found between {wording.names(values)}, "
        f"and only one of {size} would have been."
    )


def _alone(equal: Sequence[Mapping[str, Any]], choice: Sequence[Mapping[str, Any]]) -> str:
    """Why there is only one to choose of several from whose best no difference was found."""
    if len(choice) == 1:
        return ", and it was found to be better than the others of these" if len(equal) > 2 else ""
    return ", and it alone of these fits this machine"


def _best_here(
    known: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any],
    quality: Mapping[str, Any],
    metrics: Mapping[str, Mapping[str, Any]],
    comparisons: Sequence[Mapping[str, Any]],
    elsewhere: Collection[str],
) -> str:
    """The best of those that fit, where the best of all does not."""
    fitting = [v for v in known if v["key"] not in elsewhere]
    if not fitting:
        return ""
    key, sign = quality["key"], 1 if quality["better"] == "lower" else -1
    one = min(fitting, key=lambda v: sign * v["figures"][key]["mean"])
    found = _comparison(comparisons, one, best, key)
    size = wording.difference(found["difference"]["mean"], dict(quality)) if found is not None else "an unknown amount"
    return f" Of those that fit, {one['label']} comes nearest, worse by {size}: {_cost(one, metrics)} a run."


def _why(
    advised: Mapping[str, Any],
    best: Mapping[str, Any],
    equal: Sequence[Mapping[str, Any]],
    quality: Mapping[str, Any],
    comparisons: Sequence[Mapping[str, Any]],
    unknown: bool,
) -> str:
    value = wording.amount(advised["figures"][quality["key"]]["mean"], dict(quality))
    if len(equal) == 1:
        rest = "every other variant of which it is known" if unknown else "every other variant"
        return f"its {quality['label']} ({value}) is the best, and a difference to {rest} was found"
    others = [v for v in equal if v is not advised]
    found = [_comparison(comparisons, advised, other, quality["key"]) for other in others]
    sizes = [c["detectable"] for c in found if c is not None and c["detectable"] is not None]
    text = f"no difference in {quality['label']} was found between it ({value}) and "
    if advised is not best and len(others) > 1:
        text = f"no difference in {quality['label']} to the best was found ({value}), nor between the best and "
        others = [v for v in others if v is not best] or [best]
        best_one = _comparison(comparisons, advised, best, quality["key"])
        sizes = [best_one["detectable"]] if best_one is not None and best_one["detectable"] is not None else []
    text += wording.names([v["label"] for v in others])
    if sizes:
        text += f" (one of {wording.difference(max(sizes), dict(quality))} would have been)"
    return text


def _fastest(
    choice: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], str]:
    """(one of several equally good ones, why it): only differences that were found are told as such."""
    fastest = min(choice, key=lambda v: v["figures"]["seconds"]["mean"])
    as_fast = [v for v in choice if v is fastest or _verdict(comparisons, v, fastest, "seconds") == NOTHING]
    smaller = [v for v in as_fast if v is fastest or _better(comparisons, v, fastest, "peak_memory_bytes")]
    advised = min(smaller, key=lambda v: v["figures"]["peak_memory_bytes"]["mean"])
    untimed = [v for v in choice if v is not fastest and _comparison(comparisons, v, fastest, "seconds") is None]
    if untimed:
        return advised, f"; its time was not compared with that of {wording.names([v['label'] for v in untimed])}"
    if len(as_fast) == 1:
        return advised, ", and it takes the least time of them"
    others = [v for v in as_fast if v is not advised] if advised is fastest else [fastest]
    text = f", nor one in time between it and {wording.names([v['label'] for v in others])}"
    if advised is fastest:
        return advised, text + "; on average it took the least time of these"
    if all(_better(comparisons, advised, v, "peak_memory_bytes") for v in as_fast if v is not advised):
        return advised, text + ", and it takes the least memory of these"
    return advised, text + f", and it takes less memory than {fastest['label']}"


def _smallest(
    choice: Sequence[Mapping[str, Any]], comparisons: Sequence[Mapping[str, Any]], quiet: bool | None
) -> tuple[Mapping[str, Any], str]:
    """`_fastest` where times say nothing."""
    least = min(choice, key=lambda v: v["figures"]["peak_memory_bytes"]["mean"])
    found = all(_better(comparisons, least, v, "peak_memory_bytes") for v in choice if v is not least)
    text = ", and it takes the least memory of them" if found else "; on average it took the least memory of them"
    why = "it is not known what else the processor did" if quiet is None else "other work took part of the processor"
    return least, f"{text} (times are not compared: {why})"


def _cost(variant: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    figures = variant["figures"]
    parts = [wording.seconds(figures["seconds"]["mean"])]
    if figures.get("peak_memory_bytes"):
        parts.append(f"{wording.nbytes(figures['peak_memory_bytes']['mean'])} of memory")
    if figures.get("cost"):
        parts.append(wording.amount(figures["cost"]["mean"], dict(metrics["cost"])))
    return wording.names(parts)


def _least_memory(
    advised: Mapping[str, Any],
    known: Sequence[Mapping[str, Any]],
    quality: Mapping[str, Any],
    comparisons: Sequence[Mapping[str, Any]],
) -> str:
    least = min(known, key=lambda v: v["figures"]["peak_memory_bytes"]["mean"])
    if least is advised or not _better(comparisons, least, advised, "peak_memory_bytes"):
        return ""
    key = quality["key"]
    memory = wording.nbytes(least["figures"]["peak_memory_bytes"]["mean"])
    text = f" Where memory is short, {least['label']} needs less ({memory})"
    comparison = _comparison(comparisons, least, advised, key)
    if comparison is None or comparison["verdict"] == NOTHING:
        return text + f", and no difference in {quality['label']} to {advised['label']} was found."
    better = _better(comparisons, least, advised, key)
    size = wording.difference(comparison["difference"]["mean"], dict(quality))
    return text + f"; its {quality['label']} is {'better' if better else 'worse'} by {size}."


def _comparison(
    comparisons: Sequence[Mapping[str, Any]], one: Mapping[str, Any], other: Mapping[str, Any], metric: str
) -> Mapping[str, Any] | None:
    keys = {one["key"], other["key"]}
    return next((c for c in comparisons if c["metric"] == metric and {c["a"], c["b"]} == keys), None)


def _verdict(
    comparisons: Sequence[Mapping[str, Any]], one: Mapping[str, Any], other: Mapping[str, Any], metric: str
) -> str:
    found = _comparison(comparisons, one, other, metric)
    return NOTHING if found is None else str(found["verdict"])


def _better(
    comparisons: Sequence[Mapping[str, Any]], one: Mapping[str, Any], other: Mapping[str, Any], metric: str
) -> bool:
    """Whether the first was found to be better than the second."""
    found = _comparison(comparisons, one, other, metric)
    return found is not None and found["verdict"] == ("a better" if found["a"] == one["key"] else "b better")
