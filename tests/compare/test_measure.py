"""A cell's figures from files with known numbers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from halfbyte.compare.measure import Point, Reaching, after, first_loss, measure, reached
from halfbyte.errors import UsageError


def write_cell(path: Path, steps: list[dict[str, Any]], **result: Any) -> Path:
    """A cell with these events between start and end."""
    path.mkdir(parents=True, exist_ok=True)
    events = [{"event": "start", "step": 0, "trainable_parameters": 7}, *steps, {"event": "end", "step": 8}]
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    whole = {"eval_loss": 1.0, "base_eval_loss": 3.0, "peak_memory_bytes": 100, "seconds": 36.0, "metrics": {}} | result
    (path / "result.json").write_text(json.dumps(whole))
    return path


def step(number: int, seconds: float, loss: float = 2.0, peak: int = 50) -> dict[str, Any]:
    return {"event": "step", "step": number, "seconds": seconds, "tokens": 10, "supervised_tokens": 4, "loss": loss,
            "peak_memory_bytes": peak}  # fmt: skip


def evaluation(number: int, loss: float) -> dict[str, Any]:
    return {"event": "eval", "step": number, "loss": loss}


def test_warm_up_is_apart_and_curves_add_up(tmp_path: Path) -> None:
    steps = [step(1, 9.0), step(2, 5.0), *(step(n, 1.0) for n in range(3, 9))]
    made = measure(write_cell(tmp_path / "c", [*steps[:4], evaluation(4, 2.0), *steps[4:], evaluation(8, 1.0)]), 2.0)
    assert made.figures["warmup_seconds"] == 14.0  # a quarter of eight updates
    assert made.figures["step_seconds"] == 1.0
    assert made.figures["tokens_per_second"] == 10.0
    assert made.figures["trainable_parameters"] == 7
    assert made.figures["cost"] == pytest.approx(36 / 3600 * 2)
    assert made.held_out == (Point(0, 0, 0.0, 3.0), Point(4, 16, 16.0, 2.0), Point(8, 32, 20.0, 1.0))
    assert "energy_joules" not in made.figures
    assert made.rows == {}


def test_the_updates_after_a_resume_are_warm_up_too_and_an_earlier_peak_counts(tmp_path: Path) -> None:
    events = [step(1, 9.0, peak=400), *(step(n, 1.0) for n in range(2, 5)), {"event": "resume", "step": 4},
              step(5, 9.0), *(step(n, 1.0) for n in range(6, 9))]  # fmt: skip
    made = measure(write_cell(tmp_path / "c", events))
    assert made.figures["step_seconds"] == 1.0
    assert made.figures["warmup_seconds"] == 20.0
    assert made.figures["peak_memory_bytes"] == 400


def test_several_updates_in_one_event(tmp_path: Path) -> None:
    made = measure(write_cell(tmp_path / "c", [step(4, 9.0), step(8, 4.0)]))
    assert made.figures["step_seconds"] == 1.0


def test_metrics_of_the_run_and_what_was_measured_afterwards(tmp_path: Path) -> None:
    asked = {"metrics": ["exact_match"], "metric_rows": 4, "max_new_tokens": 8}
    metrics = {"loss": 1.0, "perplexity": 2.7, "accuracy": 0.75, "intervals": {}, "base": {"accuracy": 0.5, "loss": 3}}
    path = write_cell(tmp_path / "c", [step(1, 1.0)], metrics=metrics)
    rows = [{"schema_version": 1, "rows": 4}]
    rows += [{"row": f"f:{n}", "tokens": 2, "nll": n, "base_nll": 9, "scores": {"accuracy": float(n > 0)},
              "base_scores": {}, "label": "ab"[n > 0]} for n in range(4)]  # fmt: skip
    (path / "eval_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "evaluation.json").write_text(json.dumps({"loss": 9.0, "exact_match": 0.25, "asked": asked}))
    made = measure(path, asked=asked)
    assert made.task_metrics == ("accuracy", "exact_match")
    assert (made.figures["accuracy"], made.figures["exact_match"]) == (0.75, 0.25)
    assert made.base == {"accuracy": 0.5, "eval_loss": 3.0}
    assert made.majority == 0.75
    assert made.rows["eval_loss"].figure == 6 / 8
    assert made.rows["accuracy"].figure == 0.75
    for other in (None, asked | {"metric_rows": None}, asked | {"max_new_tokens": 9}, asked | {"metrics": ["rouge_l"]}):
        assert measure(path, asked=other).task_metrics == ("accuracy",)  # figures of other rows are others
    (path / "eval_rows.jsonl").write_text("{}\n")
    with pytest.raises(UsageError, match=r"eval_rows\.jsonl is damaged"):
        measure(path)


def test_a_chain_is_both_runs(tmp_path: Path) -> None:
    first = measure(write_cell(tmp_path / "a", [step(1, 2.0), evaluation(1, 2.0)], peak_memory_bytes=300), 1.0)
    second = measure(write_cell(tmp_path / "b", [step(1, 3.0), evaluation(1, 0.5)], eval_loss=0.5), 1.0)
    both = after(first, second)
    assert both.figures["seconds"] == 72.0
    assert both.figures["peak_memory_bytes"] == 300
    assert both.figures["eval_loss"] == 0.5
    assert [point.supervised_tokens for point in both.held_out] == [0, 4, 8]
    assert [point.seconds for point in both.train] == [2.0, 5.0]
    assert both.base == {"eval_loss": 3.0}


def test_components_of_two_runs_are_those_of_the_higher_peak(tmp_path: Path) -> None:
    parts = {"base weights": 60, "activations and the rest": 40}
    small = measure(write_cell(tmp_path / "small", [step(1, 1.0)]))
    large = measure(write_cell(tmp_path / "large", [step(1, 1.0)], peak_memory_bytes=200, memory_by_component=parts))
    assert small.components == {}
    assert after(small, large).components == after(large, small).components == parts
    assert after(large, small).figures["peak_memory_bytes"] == 200


def test_reaching_a_loss_is_read_off_straight_lines() -> None:
    points = [Point(0, 0, 0.0, 3.0), Point(5, 100, 10.0, 2.0), Point(10, 200, 20.0, 2.5), Point(15, 300, 30.0, 1.0)]
    assert reached(points, 1.75) == Reaching(250.0, 25.0)
    assert reached(points, 1.0) == Reaching(300.0, 30.0)
    assert reached(points, 3.5) == Reaching(0.0, 0.0)
    assert reached(points, 0.9) is None
    assert reached([], 1.0) is None


def test_how_often_a_run_is_evaluated_makes_it_no_faster() -> None:
    """A curve that falls quickly and then slowly, seen often and seldom."""
    seen = [Point(step, 10 * step, float(step), 1 + math.exp(-step / 2)) for step in range(41)]
    seldom = [point for point in seen if point.step % 10 == 0]
    assert first_loss(seldom) == seen[10].loss
    assert first_loss(seen[:1]) is None
    early = reached(seldom, 1.5)
    assert early == Reaching(100.0, 10.0, at_first=True)
    loss = 1 + math.exp(-6)
    often, rarely = reached(seen, loss), reached(seldom, loss)
    assert often is not None
    assert rarely is not None
    assert not rarely.at_first
    assert abs(rarely.supervised_tokens - often.supervised_tokens) < 50
