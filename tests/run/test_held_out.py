"""What the loop's last evaluation found is what a run ends with, where it was of the same weights."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from halfbyte.data import prepare
from halfbyte.data.options import DataOptions
from halfbyte.evaluate import evaluate as evaluating
from halfbyte.evaluate.evaluate import BaseAndTuned, EvaluateOptions
from halfbyte.evaluate.rows_file import NAME, read_rows
from halfbyte.run.config import RunConfig
from halfbyte.run.held_out import HeldOut
from halfbyte.run.run import load, resume, run
from halfbyte.run.target import evaluate_target, evaluate_tuned, find
from halfbyte.train.events import read_events


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every pass over held-out rows that follows the loop (or, of the base, goes before it)."""
    counted: list[int] = []
    real = evaluating.row_losses

    def row_losses(*arguments: Any, **more: Any) -> Any:
        counted.append(1)
        return real(*arguments, **more)

    monkeypatch.setattr(evaluating, "row_losses", row_losses)
    return counted


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_base_alone_is_measured_beside_the_loop(tiny_config: RunConfig, passes: list[int], method: str) -> None:
    done = run(tiny_config.replace(method=method, eval_steps=3, learning_rate=5e-3))
    assert len(passes) == 1
    told = [event["loss"] for event in read_events(done.path / "events.jsonl") if event["event"] == "eval"]
    assert len(told) == 2
    assert done.result["eval_loss"] == told[-1] == done.result["metrics"]["loss"]
    rows = read_rows(done.path / NAME)
    assert sum(row.nll for row in rows) / sum(row.tokens for row in rows) == pytest.approx(told[-1], rel=1e-12)


def test_it_is_what_the_saved_adapter_reaches(tiny_config: RunConfig) -> None:
    """The same rows, the adapter read from its file, other batches."""
    done = run(tiny_config.replace(method="lora"))
    continued = done.config.replace(
        adapter_path=str(done.path), output_dir=done.path.with_name("more"), learning_rate=1e-12
    )
    again = run(continued.replace(max_steps=1))
    assert again.result["eval_loss"] == pytest.approx(done.result["eval_loss"], rel=1e-4)


def test_other_weights_at_the_end_are_measured(tiny_config: RunConfig, passes: list[int]) -> None:
    config = tiny_config.replace(
        method="lora",
        learning_rate=0.3,
        max_steps=2,
        eval_steps=1,
        load_best_model_at_end=True,
        lr_scheduler_type="constant",
    )
    done = run(config)
    assert done.result["best_step"] < done.result["step"]
    assert len(passes) == 2
    assert done.result["eval_loss"] == pytest.approx(done.result["best_eval_loss"], rel=1e-5)


def test_a_run_that_was_killed_after_its_last_evaluation(tiny_config: RunConfig, passes: list[int]) -> None:
    done = run(tiny_config)
    (done.path / "result.json").unlink()
    before = len(passes)
    again = resume(done.path)
    assert len(passes) - before == 2
    assert again.result["eval_loss"] == pytest.approx(done.result["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_what_a_run_found_of_its_rows_is_not_computed_again(
    tiny_config: RunConfig, passes: list[int], method: str
) -> None:
    """The tuned model's loss, of all its held-out rows or of the first."""
    done = run(tiny_config.replace(method=method))
    target, found = find(str(done.path)), read_rows(done.path / NAME)
    for options in (EvaluateOptions(), EvaluateOptions(max_rows=2)):
        passes.clear()
        measured = evaluate_tuned(target, options)
        assert len(passes) == 1
        known = evaluate_tuned(target, options, found)
        assert len(passes) == 1
        assert known.loss == pytest.approx(measured.loss, rel=1e-5)
        assert [(row.row, row.tokens, row.prompt) for row in known.rows] == [
            (row.row, row.tokens, row.prompt) for row in measured.rows
        ]
        for other in (found[1:], found[:1], [replace(found[0], tokens=found[0].tokens + 1), *found[1:]]):
            passes.clear()
            assert evaluate_tuned(target, options, other).loss == pytest.approx(measured.loss, rel=1e-9)
            assert len(passes) == 1
    passes.clear()
    both = evaluate_target(target, known=found)
    assert isinstance(both, BaseAndTuned)
    assert len(passes) == 1
    assert both.tuned.loss == pytest.approx(done.result["eval_loss"], rel=1e-9)
    assert both.base.loss == pytest.approx(done.result["base_eval_loss"], rel=1e-5)


def test_losses_that_are_not_finite_are_told_and_not_kept(tiny_config: RunConfig) -> None:
    loaded = load(tiny_config.replace(method="lora"))
    rows = prepare(tiny_config.pick(DataOptions), loaded.tokenizer, 0).eval
    held_out = HeldOut(loaded.model, rows, torch.device("cpu"))
    found = held_out.measure(4096, lambda: False)
    assert found is not None
    assert held_out._found is not None
    assert found["supervised_tokens"] == sum(row.supervised_tokens for row in rows)
    assert held_out.measure(64, lambda: True) is None
    assert held_out._found is None
    with torch.no_grad():
        next(p for p in loaded.model.parameters()).fill_(math.nan)
    found = held_out.measure(4096, lambda: False)
    assert found is not None
    assert math.isnan(found["loss"])
    assert held_out._found is None
