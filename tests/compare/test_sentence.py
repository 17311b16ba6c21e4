"""The manager's sentence, on a table of what was found: it never claims a difference that was not."""

from typing import Any

import pytest

from halfbyte.compare.sentence import sentence

LOSS = {"key": "eval_loss", "label": "held-out loss", "better": "lower", "unit": "loss", "quality": True}
ACCURACY = {"key": "accuracy", "label": "accuracy", "better": "higher", "unit": "share", "quality": True}
METRICS = {m["key"]: m for m in (LOSS, ACCURACY)} | {
    "cost": {"key": "cost", "label": "cost", "better": "lower", "unit": "money", "currency": "EUR", "quality": False}
}


def variant(key: str, quality: float, seconds: float, memory: float, n: int = 3, **more: float) -> dict[str, Any]:
    def figure(value: float) -> dict[str, Any]:
        return {"mean": value, "low": None, "high": None, "n": n, "values": [value] * n}

    figures = {"eval_loss": quality, "accuracy": quality, "seconds": seconds, "peak_memory_bytes": memory, **more}
    return {"key": key, "label": key, "figures": {name: figure(value) for name, value in figures.items()}}


def found(
    a: str, b: str, metric: str, verdict: str, mean: float = 0.1, detectable: float | None = 0.02
) -> dict[str, Any]:
    return {"a": a, "b": b, "metric": metric, "verdict": verdict, "detectable": detectable,
            "difference": {"mean": mean, "low": None, "high": None}}  # fmt: skip


A, B, NONE = "a better", "b better", "no difference found"
LORA, QLORA = variant("lora", 1.0, 100, 3e9), variant("qlora", 1.01, 120, 1e9)


def test_nothing_finished_or_one() -> None:
    assert sentence(LOSS, METRICS, [], []) == "No run has finished, so nothing can be said yet."
    assert "Only lora has finished runs" in sentence(LOSS, METRICS, [LORA], [])


def test_one_seed_says_nothing_of_quality() -> None:
    alone = [variant("lora", 1.0, 100, 3e9, n=1), variant("qlora", 2.0, 50, 1e9, n=1)]
    said = sentence(LOSS, METRICS, alone, [found("lora", "qlora", "eval_loss", NONE)])
    assert said == (
        "With one seed a difference in held-out loss cannot be told from chance, so no method is advised for its "
        "quality; qlora took the least time in its run: 50.0 s and 1.00 GB of memory."
    )


def test_no_difference_takes_the_faster_one() -> None:
    comparisons = [found("lora", "qlora", "eval_loss", NONE), found("lora", "qlora", "seconds", A),
                   found("lora", "qlora", "peak_memory_bytes", B)]  # fmt: skip
    said = sentence(LOSS, METRICS, [LORA, QLORA], comparisons)
    assert said == (
        "Use lora here: no difference in held-out loss was found between it (1.0000) and qlora (one of 0.0200 would "
        "have been), and it takes the least time of them; one run costs 1.7 min and 3.00 GB of memory. Where memory is "
        "short, qlora needs less (1.00 GB), and no difference in held-out loss to lora was found."
    )


def test_no_difference_in_time_either_takes_the_smaller_one() -> None:
    comparisons = [found("lora", "qlora", m, NONE) for m in ("eval_loss", "seconds")]
    said = sentence(LOSS, METRICS, [LORA, QLORA], [*comparisons, found("lora", "qlora", "peak_memory_bytes", B)])
    assert said.startswith("Use qlora here: no difference in held-out loss was found between it (1.0100) and lora")
    assert "), nor one in time between it and lora, and it takes the least memory of these; one run costs" in said
    assert "Where memory is short" not in said


def test_without_any_difference_only_averages_are_told_as_averages() -> None:
    comparisons = [found("lora", "qlora", m, NONE) for m in ("eval_loss", "seconds", "peak_memory_bytes")]
    said = sentence(LOSS, METRICS, [LORA, QLORA], comparisons)
    assert said.startswith("Use lora here: ")
    assert "nor one in time between it and qlora; on average it took the least time of these; one run costs" in said
    assert "Where memory is short" not in said


def test_less_memory_decides_where_it_was_found() -> None:
    comparisons = [found("lora", "qlora", m, NONE) for m in ("eval_loss", "seconds")]
    comparisons += [found("lora", "qlora", "peak_memory_bytes", B)]
    said = sentence(LOSS, METRICS, [LORA, QLORA], comparisons)
    assert said.startswith("Use qlora here: ")
    assert "nor one in time between it and lora, and it takes the least memory of these; one run costs" in said


def test_the_fastest_of_three_are_named() -> None:
    three = [LORA, variant("dora", 1.0, 101, 2e9), variant("full", 1.0, 500, 9e9)]
    pairs = (("lora", "dora"), ("lora", "full"), ("dora", "full"))
    comparisons = [found(a, b, "eval_loss", NONE) for a, b in pairs]
    comparisons += [found("lora", "dora", "seconds", NONE), found("lora", "full", "seconds", A)]
    comparisons += [found("lora", "dora", "peak_memory_bytes", B), found("lora", "full", "peak_memory_bytes", A)]
    said = sentence(LOSS, METRICS, three, comparisons)
    assert said.startswith("Use dora here: ")
    assert ", nor one in time between it and lora, and it takes the least memory of these; one" in said


def test_a_better_mean_over_other_seeds_is_not_the_best() -> None:
    """One of lora's seeds is missing: over the seeds that both have, qlora was found to be better."""
    comparisons = [found("lora", "qlora", "eval_loss", B, 0.05)]
    assert sentence(LOSS, METRICS, [LORA, QLORA], comparisons).startswith("Use qlora here: its held-out loss (1.0100)")


def test_a_found_difference_is_said() -> None:
    comparisons = [found("lora", "qlora", "eval_loss", A, -0.01), found("lora", "qlora", "peak_memory_bytes", B)]
    said = sentence(LOSS, METRICS, [LORA, QLORA], comparisons)
    assert said == (
        "Use lora here: its held-out loss (1.0000) is the best, and a difference to every other variant was found; "
        "one run costs 1.7 min and 3.00 GB of memory. Where memory is short, qlora needs less (1.00 GB); its "
        "held-out loss is worse by 0.0100."
    )


def test_higher_is_better_where_it_is_and_money_is_named() -> None:
    pair = [variant("lora", 0.9, 100, 3e9, cost=0.25), variant("qlora", 0.95, 300, 1e9, cost=0.5)]
    comparisons = [found("lora", "qlora", "accuracy", B, -0.05), found("lora", "qlora", "peak_memory_bytes", B)]
    said = sentence(ACCURACY, METRICS, pair, comparisons)
    assert said == (
        "Use qlora here: its accuracy (95.0%) is the best, and a difference to every other variant was found; one run "
        "costs 5.0 min, 1.00 GB of memory and 0.5000 EUR."
    )


@pytest.mark.parametrize("verdict", [NONE, None])
def test_a_comparison_without_a_verdict_is_no_difference(verdict: str | None) -> None:
    comparisons = [] if verdict is None else [found("lora", "qlora", "eval_loss", verdict, detectable=None)]
    said = sentence(LOSS, METRICS, [LORA, QLORA], comparisons)
    assert "no difference in held-out loss was found" in said
    assert "would have been" not in said
    assert "is the best" not in said


def test_of_three_the_one_between_is_held_against_the_best() -> None:
    three = [variant("full", 0.9, 500, 9e9), LORA, QLORA]
    comparisons = [found("full", "lora", "eval_loss", NONE, detectable=0.04),
                   found("full", "qlora", "eval_loss", A), found("lora", "qlora", "eval_loss", NONE),
                   found("full", "lora", "seconds", B), found("lora", "qlora", "peak_memory_bytes", B),
                   found("full", "lora", "peak_memory_bytes", B)]  # fmt: skip
    said = sentence(LOSS, METRICS, three, comparisons)
    assert said.startswith(
        "Use lora here: no difference in held-out loss was found between it (1.0000) and full (one of 0.0400 would "
        "have been)"
    )


def test_what_does_not_fit_here_is_not_advised() -> None:
    """It takes part by runs from another machine, whose times are compared with nothing."""
    comparisons = [found("lora", "qlora", "eval_loss", NONE)]
    said = sentence(LOSS, METRICS, [LORA, QLORA], comparisons, {"lora"})
    assert said.startswith("Use qlora here: no difference in held-out loss was found between it (1.0100) and lora (")
    assert "and it alone of these fits this machine; one run costs 2.0 min and 1.00 GB of memory." in said
    better = [found("lora", "qlora", "eval_loss", A, -0.01)]
    assert sentence(LOSS, METRICS, [LORA, QLORA], better, {"lora"}) == (
        "lora has the best held-out loss (1.0000), and does not fit this machine: one run costs 1.7 min and 3.00 GB of "
        "memory elsewhere. Of those that fit, qlora comes nearest, worse by 0.0100: 2.0 min and 1.00 GB of memory a "
        "run."
    )


def test_times_of_two_machines_are_not_told_as_compared() -> None:
    said = sentence(LOSS, METRICS, [LORA, QLORA], [found("lora", "qlora", "eval_loss", NONE)])
    assert "; its time was not compared with that of qlora; one run costs" in said
    assert "least time" not in said


def test_a_variant_whose_quality_is_unknown_is_not_called_unfinished() -> None:
    blind = variant("full", 0.5, 500, 9e9)
    del blind["figures"]["eval_loss"]
    said = sentence(LOSS, METRICS, [blind, LORA], [])
    assert said == (
        "The held-out loss is known of lora alone, so nothing can be said of it: --quality names another metric to "
        "judge by."
    )
    three = sentence(LOSS, METRICS, [blind, LORA, QLORA], [found("lora", "qlora", "eval_loss", A, -0.01)])
    assert "a difference to every other variant of which it is known was found" in three


def test_one_variant_with_one_seed_silences_only_itself() -> None:
    single = variant("dora", 0.9, 100, 3e9, n=1)
    said = sentence(LOSS, METRICS, [single, LORA, QLORA], [found("lora", "qlora", "eval_loss", A, -0.01)])
    assert said.startswith("Use lora here: ")


def test_what_another_was_found_to_beat_is_not_advised() -> None:
    """The best one's runs vary so much that nothing differs from it; of the two others one beats the other."""
    three = [variant("a", 0.90, 50, 1e9), variant("b", 0.92, 100, 3e9), variant("c", 0.93, 200, 5e9)]
    comparisons = [found("a", "b", "accuracy", B, -0.02), found("a", "c", "accuracy", NONE, 0.03),
                   found("b", "c", "accuracy", NONE), found("b", "c", "seconds", A)]  # fmt: skip
    assert sentence(ACCURACY, METRICS, three, comparisons).startswith("Use b here: ")


@pytest.mark.parametrize(
    ("quiet", "why"),
    [(False, "other work took part of the processor"), (None, "it is not known what else the processor did")],
)
def test_times_beside_other_work_decide_nothing(quiet: bool | None, why: str) -> None:
    comparisons = [found("lora", "qlora", "eval_loss", NONE), found("lora", "qlora", "seconds", A)]
    assert sentence(LOSS, METRICS, [LORA, QLORA], comparisons).startswith("Use lora here")
    said = sentence(LOSS, METRICS, [LORA, QLORA], comparisons, quiet=quiet)
    assert said.startswith("Use qlora here")
    assert f"; on average it took the least memory of them (times are not compared: {why}); one run costs" in said
    smaller = [*comparisons, found("lora", "qlora", "peak_memory_bytes", B)]
    said = sentence(LOSS, METRICS, [LORA, QLORA], smaller, quiet=quiet)
    assert f", and it takes the least memory of them (times are not compared: {why}); one run costs" in said
    single = [variant("lora", 1.0, 100, 3e9, n=1), variant("qlora", 1.0, 120, 1e9, n=1)]
    assert "lora took the least time in its run" in sentence(LOSS, METRICS, single, [])
    assert "qlora took the least memory in its run" in sentence(LOSS, METRICS, single, [], quiet=quiet)


def test_runs_that_could_not_find_what_matters_decide_nothing() -> None:
    comparisons = [found("lora", "qlora", "eval_loss", NONE, detectable=0.3), found("lora", "qlora", "seconds", A),
                   found("lora", "qlora", "peak_memory_bytes", B)]  # fmt: skip
    assert sentence(LOSS, METRICS, [QLORA, LORA], comparisons) == (
        "Too little was run to choose by held-out loss: no difference was found between lora (1.0000) and qlora "
        "(1.0100), and only one of 0.3000 would have been. By cost alone it is lora, and it takes the least time of "
        "them; one run costs 1.7 min and 3.00 GB of memory."
    )
    as_fast = [comparisons[0], found("lora", "qlora", "seconds", NONE), comparisons[2]]
    assert sentence(LOSS, METRICS, [QLORA, LORA], as_fast).endswith(
        "By cost alone it is qlora; no difference in time between it and lora, and it takes the least memory of these; "
        "one run costs 2.0 min and 1.00 GB of memory."
    )


def test_few_rows_are_told() -> None:
    comparisons = [found("lora", "qlora", "eval_loss", A, -0.01)]
    assert sentence(LOSS, METRICS, [LORA, QLORA], comparisons, rows=16).endswith(" This rests on 16 held-out rows.")
    assert "held-out rows" not in sentence(LOSS, METRICS, [LORA, QLORA], comparisons, rows=200)
