"""A run with `task: dpo`, from the file to the card; interrupted, resumed, evaluated, refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.errors import UsageError
from halfbyte.evaluate.evaluate import BaseAndTuned, EvaluateOptions, EvaluateResult
from halfbyte.run import planning
from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.folder import read_config
from halfbyte.run.run import resume, run
from halfbyte.run.target import evaluate_target, find, rows_from
from halfbyte.train.dpo import REFERENCE
from halfbyte.train.events import read_events
from tests.run.conftest import write_rows
from tests.run.test_run import Events, adapter


def preferred(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"say {i}", "chosen": f"yes {i % 5}", "rejected": f"no, not {i % 7}"} for i in range(count)]


@pytest.fixture
def pair_config(model_folder: Path, tmp_path: Path) -> RunConfig:
    return load_config(
        model=str(model_folder), data=str(write_rows(tmp_path / "pairs.jsonl", preferred(40))), dtype="float32",
        output_dir=tmp_path / "run", lora_r=4, max_steps=6, eval_split=8, learning_rate=1e-2, max_seq_length=96,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, lora_dropout=0.1, save_steps=3, dpo_beta=0.3,
    )  # fmt: skip


def test_from_pairs_to_a_result(pair_config: RunConfig) -> None:
    events = Events()
    result = run(pair_config, events)
    path = result.path
    assert events.kinds[:5] == ["prepared", "planned", "loaded", "reference", "reference"]
    asked = [event for event in events if event["event"] == "reference"]
    assert (asked[0]["pairs"], asked[0]["pairs_done"], asked[-1]["pairs_done"]) == (24 + 8, 0, 24 + 8)
    config, _ = read_config(path)
    assert (config.task, config.dpo_beta) == ("dpo", 0.3)
    steps = [event for event in events if event["event"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= steps[0].keys()
    assert steps[-1]["rewards/margins"] > 1
    kept = json.loads((path / "result.json").read_text())
    assert kept == result.result
    assert kept["base_eval_loss"] == pytest.approx(math.log(2))
    assert kept["eval_loss"] < 0.3
    assert kept["metrics"]["rewards/accuracies"] > 0.9
    assert kept["metrics"]["base"]["rewards/accuracies"] == 0.5
    assert "perplexity" not in kept["metrics"]
    (evaluated,) = [event for event in events if event["event"] == "eval"]
    assert evaluated["loss"] == pytest.approx(kept["eval_loss"], rel=1e-4)
    card = (path / "README.md").read_text()
    assert "rewards/accuracies" in card
    assert "task: dpo" in card

    again = evaluate_target(find(str(path)))
    assert isinstance(again, BaseAndTuned)
    assert again.tuned.loss == pytest.approx(kept["eval_loss"], rel=1e-4)
    assert again.tuned.metrics == pytest.approx(
        {name: kept["metrics"][name] for name in again.tuned.metrics}, rel=1e-3, abs=1e-4
    )
    assert again.base.loss == pytest.approx(math.log(2))
    assert again.base.intervals["rewards/margins"] == (0, 0)
    low, high = again.tuned.intervals["rewards/margins"]
    assert low < again.tuned.metrics["rewards/margins"] < high
    answers = evaluate_target(find(str(path)), EvaluateOptions(metrics=("exact_match",), max_new_tokens=4))
    assert answers.to_json()["evaluated_rows"] == 8
    assert "exact_match" in answers.to_json()


def test_other_rows_measure_a_tuned_model_and_pairs_any_model(pair_config: RunConfig, data_file: Path) -> None:
    path = run(pair_config).path
    found = evaluate_target(rows_from(find(str(path)), str(data_file)), EvaluateOptions(max_rows=5))
    assert "perplexity" in found.to_json()
    alone = evaluate_target(rows_from(find(pair_config.model), str(pair_config.data)), EvaluateOptions(max_rows=5))
    assert isinstance(alone, EvaluateResult)
    assert alone.to_json()["perplexity"] == pytest.approx(math.exp(alone.loss))


def test_an_interrupted_run_resumes_bit_for_bit(pair_config: RunConfig, tmp_path: Path) -> None:
    """With dropout, and the reference read from the run's folder."""
    straight = run(pair_config)
    other = pair_config.replace(output_dir=tmp_path / "other")
    with pytest.raises(BaseException, match=r"halfbyte resume|^$"):
        run(other, Events(interrupt_at=3))
    kept = (tmp_path / "other" / REFERENCE).read_bytes()
    events = Events()
    resumed = resume(tmp_path / "other", events)
    assert "reference" not in events.kinds
    assert (tmp_path / "other" / REFERENCE).read_bytes() == kept
    mine, theirs = adapter(straight.path), adapter(resumed.path)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)

    def told(path: Path) -> list[dict[str, Any]]:
        events = [event for event in read_events(path / "events.jsonl") if event["event"] in ("step", "eval")]
        return [{k: v for k, v in e.items() if k not in ("time", "seconds") and "memory" not in k} for e in events]

    assert told(straight.path) == told(resumed.path)
    # Without the file the reference is asked again: the model is as it was before the first step.
    (tmp_path / "other" / REFERENCE).unlink()
    extended = resume(tmp_path / "other", events, max_steps=8)
    assert "reference" in events.kinds
    assert extended.result["step"] == 8


@pytest.mark.parametrize("kind", ["continued", "pissa", "loftq"])
def test_more_steps_ask_the_model_as_the_run_began(
    kind: str, pair_config: RunConfig, data_file: Path, tmp_path: Path
) -> None:
    """Neither the pairs of added steps nor a lost file's are asked of the trained adapter."""
    changes: dict[str, Any] = {"init_lora_weights": "pissa"}
    if kind == "loftq":
        changes = {"init_lora_weights": "loftq", "loftq_iter": 2, "method": "qlora"}
    if kind == "continued":
        first = pair_config.replace(
            data=str(data_file), dpo_beta=0.1, eval_split=0, output_dir=tmp_path / "first", max_steps=3
        )
        changes = {"adapter_path": str(run(first).path)}
    straight = run(pair_config.replace(**changes, output_dir=tmp_path / "straight")).path
    run(pair_config.replace(**changes, max_steps=3))
    extended = resume(tmp_path / "run", max_steps=5).path
    (extended / REFERENCE).unlink()
    resume(extended, max_steps=6)
    expected, found = load_file(straight / REFERENCE), load_file(extended / REFERENCE)
    assert not found["eval"].isnan().any()
    for part, values in expected.items():
        torch.testing.assert_close(found[part], values, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("method", ["qlora", "dora", "pissa", "loftq", "rslora"])
def test_every_adapter_begins_at_its_own_reference(pair_config: RunConfig, method: str) -> None:
    """Also those whose adapter adds something from the start; what is saved is then compared with the bare base."""
    given = pair_config.model_dump(exclude_unset=True)
    config = load_config(**{**given, "method": method, "max_steps": 3, "lora_dropout": 0.0})
    events = Events()
    result = run(config, events)
    steps = [event for event in events if event["event"] == "step"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["loss"] < 0.65
    assert result.result["metrics"]["rewards/margins"] > 0


def test_evaluate_compares_a_continued_adapter_with_what_it_was(
    pair_config: RunConfig, data_file: Path, tmp_path: Path
) -> None:
    """From what the run kept, and without that from the adapter that it continued."""
    first = pair_config.replace(data=str(data_file), dpo_beta=0.1, eval_split=0, output_dir=tmp_path / "first")
    path = run(pair_config.replace(adapter_path=str(run(first).path), max_steps=3)).path
    kept = json.loads((path / "result.json").read_text())

    def same(found: object) -> None:
        assert isinstance(found, BaseAndTuned)
        assert found.tuned.loss == pytest.approx(kept["eval_loss"], rel=1e-4)
        assert found.tuned.metrics["rewards/margins"] == pytest.approx(kept["metrics"]["rewards/margins"], rel=1e-3)

    same(evaluate_target(find(str(path))))
    (path / REFERENCE).unlink()
    same(evaluate_target(find(str(path))))


def test_a_trained_output_head_is_refused(pair_config: RunConfig) -> None:
    with pytest.raises(UsageError, match="do not train lm_head"):
        run(pair_config.replace(modules_to_save=["lm_head"]))


def test_the_plan_counts_what_the_reference_reads(pair_config: RunConfig, data_file: Path) -> None:
    found = planning.survey(pair_config)
    assert planning.request(pair_config, found).forward_tokens == pytest.approx(24 * found.data.mean, abs=1)
    other = planning.survey(pair_config.replace(data=str(data_file)))
    assert planning.request(pair_config, other).forward_tokens == 0


def test_the_default_learning_rate_is_lower(pair_config: RunConfig, tmp_path: Path) -> None:
    config = pair_config.replace(learning_rate=None, max_steps=1, output_dir=tmp_path / "other")
    assert run(config).config.learning_rate == 2e-5


def test_what_does_not_go_with_pairs(pair_config: RunConfig, data_file: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"method": "full"}, "method full changes the base itself: use lora or qlora"),
        ({"eval_data": str(data_file)}, r"rows.jsonl:1: held-out rows must be of the kind that is trained on, pairs"),
        ({"data": str(data_file), "eval_data": pair_config.data}, "of the kind that is trained on, not pairs"),
        ({"task": "causal"}, "preference rows .chosen, rejected. are for task dpo, not causal"),
        ({"task": "dpo", "data": str(data_file)}, "task dpo needs pairs of answers"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            run(pair_config.replace(**changes))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="dpo_label_smoothing is for dpo_loss sigmoid, and ipo has none"):
        load_config(model="m", dpo_label_smoothing=0.1, dpo_loss="ipo")
    for name, value in (("dpo_beta", 0), ("dpo_label_smoothing", 0.5), ("dpo_loss", "kto"), ("dpo_nll_weight", -1)):
        with pytest.raises(UsageError, match=name):
            load_config(model="m", **{name: value})
