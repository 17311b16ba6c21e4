"""What is compared with what, on cells whose figures are known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from halfbyte.compare.cells import is_measured
from halfbyte.compare.measure import Measured, Point
from halfbyte.compare.pack import pack
from halfbyte.compare.report_data import (
    Cells,
    _against_full,
    _as_long,
    _bounded,
    _components,
    _convergence,
    _curves,
    _levels,
    _quiet,
    _said,
    difference,
)
from halfbyte.compare.statistics import Difference, Rows, mean_interval
from halfbyte.errors import UsageError


def cells(key: str, losses: list[float], weights: float = 1.0, machine: str = "one", tokens: int = 9) -> Cells:
    """Two held-out rows a seed, each with the seed's loss; a run took as many seconds as its loss is."""
    made = {}
    for seed, loss in enumerate(losses):
        rows = Rows(("a", "b"), np.array([loss, loss]) * weights, np.full(2, weights))
        made[seed] = Measured(
            {"eval_loss": loss, "seconds": loss}, {"eval_loss": rows}, {}, None, (Point(3, tokens, 1.0, loss),), (),
            "this comparison", machine, (),
        )  # fmt: skip
    return Cells(key, made)


def test_rows_that_weigh_otherwise_are_not_paired() -> None:
    """With --unequal a variant may cut its rows shorter: the same rows have other supervised tokens then."""
    one, other = cells("a", [1.0, 1.1]), cells("b", [2.0, 2.2])
    found = difference(one, other, "eval_loss")
    assert found is not None
    assert found[1]
    longer = difference(one, cells("b", [2.0, 2.2], weights=2.0), "eval_loss")
    assert longer is not None
    assert not longer[1]
    assert longer[0].mean == pytest.approx(found[0].mean)


def test_time_is_compared_on_one_machine_only() -> None:
    one, other = cells("a", [1.0, 1.1, 1.2]), cells("b", [2.0, 2.2, 2.1], machine="another")
    assert difference(one, other, "seconds") is None
    assert difference(one, other, "eval_loss") is not None
    mixed = Cells("b", {**other.by_seed, 2: cells("b", [0.0, 0.0, 2.1]).by_seed[2]})
    found = difference(one, mixed, "seconds")
    assert found is not None
    assert found[0].seeds == 1


def test_components_are_counted_where_every_run_did() -> None:
    plan = {"peak_phase": "train", "memory_by_component": {"train": {"base": {"p50": 7}, "adapters": {"p50": 0}}}}
    found = cells("a", [1.0, 1.1])
    assert _components(found, plan) == ({"base": 7}, False)
    assert _components(found, None) == ({}, False)
    one, other = found.by_seed.values()
    half = Cells("a", {0: replace(one, components={"base": 4, "rest": 2, "gradients": 0}), 1: other})
    assert _components(half, plan) == ({"base": 7}, False)
    both = Cells("a", {**half.by_seed, 1: replace(other, components={"base": 6, "gradients": 0})})
    assert _components(both, plan) == ({"base": 5, "rest": 1}, True)


@pytest.mark.parametrize(
    ("better", "full", "share"),
    [
        ("higher", [2.0, 4.0], 0.5),
        ("higher", [2.0, 0.0], None),  # the other seed's share alone would say more than there is
        ("lower", [1.0, 2.0], (3.5 / 4 + 2.5 / 3) / 2),
        ("lower", [1.0, 5.0], None),  # full fine-tuning took nothing off the base's loss
    ],
)
def test_a_share_of_what_full_fine_tuning_gained(better: str, full: list[float], share: float | None) -> None:
    """A score's of full's score, a loss's of what full took off the base's (5.0)."""
    own = cells("lora", [1.0, 2.0] if better == "higher" else [1.5, 2.5])
    other = cells("full", full)
    other = Cells("full", {s: replace(m, base={"eval_loss": 5.0}) for s, m in other.by_seed.items()})
    compared = [{"key": key, "method_name": key, "continue_from": None} for key in ("lora", "full")]
    quality = {"key": "eval_loss", "better": better}
    assert _against_full(other, [own, other], compared, quality) is None
    found = _against_full(own, [own, other], compared, quality)
    assert (found and found["share"]["mean"]) == (share if share is None else pytest.approx(share))


def test_training_curves_of_runs_of_unlike_lengths() -> None:
    """Of early stopping: the points are the means of the same updates in every seed, as far as the shortest goes."""
    found = cells("a", [1.0, 1.0])
    runs = []
    for measured, length in zip(found.by_seed.values(), (110, 160), strict=True):
        points = tuple(Point(n, 10 * n, float(n), float(n)) for n in range(1, length + 1))
        runs.append(replace(measured, train=points))
    curve = _curves(Cells("a", dict(enumerate(runs))))["train"]
    size = 7  # 160 updates in at most 24 points
    assert [point["supervised_tokens"] for point in curve] == [10 * size * n for n in range(1, 110 // size + 1)]
    assert [point["mean"] for point in curve] == [size * n - (size - 1) / 2 for n in range(1, 110 // size + 1)]


def test_runs_that_ended_early_are_seen() -> None:
    assert _as_long([cells("a", [1.0]), cells("b", [1.0, 1.0])])
    assert not _as_long([cells("a", [1.0]), cells("b", [1.0], tokens=8)])


def test_an_evaluation_counts_where_it_was_of_the_same_rows(tmp_path: Path) -> None:
    asked = {"metrics": ["rouge_l"], "metric_rows": 9, "max_new_tokens": 64}
    file = tmp_path / "evaluation.json"
    assert not is_measured(file, asked)
    file.write_text(json.dumps({"rouge_l": 0.5, "exact_match": 0.1, "evaluated_rows": 9}))
    assert not is_measured(file, asked)
    file.write_text(json.dumps({"asked": asked | {"metrics": ["exact_match", "rouge_l"]}}))
    assert is_measured(file, asked)
    for change in ({"metrics": ["token_f1"]}, {"metric_rows": 8}, {"metric_rows": None}, {"of": "another model"}):
        assert not is_measured(file, asked | change)


def test_what_stopped_before_its_first_run_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "comparison.json").write_text("{}")
    with pytest.raises(UsageError, match="stopped before its first run"):
        pack(tmp_path / "c", tmp_path / "out")


def curve(key: str, *losses: float) -> Cells:
    """One run that was evaluated every 10 updates, after an untrained model's loss of 3."""
    points = (Point(0, 0, 0.0, 3.0), *(Point(10 * i, 100 * i, float(i), loss) for i, loss in enumerate(losses, 1)))
    (one,) = cells(key, [losses[-1]]).by_seed.values()
    return Cells(key, {0: replace(one, held_out=points)})


def test_losses_whose_reaching_is_told() -> None:
    slow, fast, middle = curve("slow", 2.0, 1.5), curve("fast", 1.9, 1.0), curve("middle", 1.8, 1.2)
    assert _levels([slow, fast, middle]) == [1.65, 1.5, 1.2]
    (half, worst, best) = _convergence([slow, fast, middle])
    assert [row["reached"] for row in half["rows"]] == [1, 1, 1]
    assert [row["at_first"] for row in half["rows"]] == [0, 0, 0]
    assert [row["supervised_tokens"]["mean"] for row in worst["rows"]] == pytest.approx([200, 100 + 400 / 9, 150])
    assert [row["reached"] for row in best["rows"]] == [0, 1, 1]


def test_who_is_there_at_the_first_evaluation_may_have_been_sooner() -> None:
    """No level lies above all first evaluations: only a straight line from the untrained model is known there."""
    slow, fast = curve("slow", 2.0, 1.5), curve("fast", 1.4, 1.0)
    assert _levels([slow, fast]) == [1.5, 1.0]
    worst, _ = _convergence([slow, fast])
    assert [row["at_first"] for row in worst["rows"]] == [0, 1]
    assert worst["rows"][1]["supervised_tokens"]["mean"] == 100
    assert _levels([cells("a", [1.0])]) == []


def test_runs_beside_other_work_are_not_quiet() -> None:
    def of(*shares: float | None) -> Cells:
        runs = cells("a", [1.0] * len(shares)).by_seed.values()
        return Cells(
            "a", {n: replace(run, others=share) for n, (run, share) in enumerate(zip(runs, shares, strict=True))}
        )

    assert _quiet([of(0.01, 0.02), of(0.0, None)]) is True
    assert _quiet([of(0.01, 0.02), of(None, None)]) is None  # resumed, or of elsewhere
    assert _quiet([of(0.01, 0.2), of(None, None)]) is False


def test_intervals_end_where_the_figure_does() -> None:
    """Of three seeds Student's interval may reach where no time can be."""
    figure = mean_interval([1.0, 2.0, 9.0])
    assert figure.low is not None
    assert figure.low < 0
    seconds = {"key": "seconds", "unit": "seconds", "quality": False}
    assert _bounded(figure, seconds) == replace(figure, low=0.0)
    assert _bounded(figure, {"key": "mine", "unit": "loss", "quality": True}) == figure
    share = mean_interval([0.9, 0.95, 0.99])
    bounded = _bounded(share, {"key": "accuracy", "unit": "share", "quality": True})
    assert bounded is not None
    assert (bounded.low, bounded.high) == (share.low, 1.0)
    assert _bounded(mean_interval([1.0]), seconds) == mean_interval([1.0])


def test_one_seed_says_which_is_ahead() -> None:
    metric = {"label": "held-out loss", "unit": "loss"}
    for mean, said in ((0.5, "a is higher than b by 0.5000 with"), (-0.5, "a is lower than b by"), (0.0, "are equal")):
        assert said in _said("a", "b", metric, Difference(mean, None, None, None, 1))
