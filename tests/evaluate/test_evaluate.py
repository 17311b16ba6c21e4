"""Evaluation on rows that went through `data.prepare`, against transformers' loss and hand-made scores."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.adapters import LoraOptions, attach, detach
from halfbyte.data import DataOptions, Prepared, collate, prepare
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.evaluate import (
    EvaluateOptions,
    EvaluateResult,
    RowResult,
    against,
    evaluate,
    evaluate_base_and_tuned,
)
from halfbyte.evaluate.generate import generate
from halfbyte.linear import segments
from tests.evaluate.conftest import Tiny, make_tiny


def rows(folder: Path, values: list[dict[str, Any]], tiny: Tiny, **options: Any) -> Prepared:
    """The values as a data set of their own, all of them held out."""
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return prepare(
        DataOptions(data=str(folder / "train.jsonl"), eval_data=str(folder / "eval.jsonl"), **options),
        tiny.tokenizer,
        seed=0,
    )


PAIRS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(1, 5) for b in (3, 40)]
SENTIMENT = [{"text": f"film number {i}", "label": i % 2} for i in range(12)]


@pytest.fixture
def pairs(tmp_path: Path, llama: Tiny) -> Prepared:
    return rows(tmp_path, PAIRS, llama)


def test_loss_is_transformers(tmp_path: Path, tiny: Tiny) -> None:
    prepared = rows(tmp_path, PAIRS, tiny)
    result = evaluate(tiny.model, tiny.tokenizer, prepared.eval, EvaluateOptions(eval_batch_tokens=30))
    batch = collate(prepared.eval)
    total = 0.0
    for ids, targets in zip(batch.input_ids.split(batch.lengths), batch.targets.split(batch.lengths), strict=True):
        with torch.no_grad():
            logits = tiny.reference(ids[None], use_cache=False).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    assert result.supervised_tokens == batch.supervised_tokens
    assert result.loss == pytest.approx(total / batch.supervised_tokens, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert [row.row for row in result.rows] == [str(example.origin) for example in prepared.eval]
    low, high = result.intervals["loss"]
    assert low < result.loss < high


def test_rows_sum_to_the_loss_whatever_the_batches(llama: Tiny, pairs: Prepared) -> None:
    one = evaluate(llama.model, llama.tokenizer, pairs.eval, EvaluateOptions(eval_batch_tokens=1))
    many = evaluate(llama.model, llama.tokenizer, pairs.eval, EvaluateOptions(eval_batch_tokens=10_000))
    for a, b in zip(one.rows, many.rows, strict=True):
        assert a.nll == pytest.approx(b.nll, rel=1e-5)
    assert sum(row.nll for row in one.rows) / sum(row.tokens for row in one.rows) == pytest.approx(one.loss)


def test_answers_are_generated_scored_and_kept(llama: Tiny, pairs: Prepared, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "def length(prediction, reference):\n    return len(prediction)\n"
        "def share(predictions, references):\n    return sum(map(bool, predictions)) / len(predictions)\n"
    )
    names = ("exact_match", "token_f1", "rouge_l", f"{tmp_path / 'own.py'}:length", f"{tmp_path / 'own.py'}:share")
    options = EvaluateOptions(metrics=names, max_new_tokens=6, eval_batch_size=3)
    seen: list[tuple[str, int, int]] = []
    result = evaluate(
        llama.model,
        llama.tokenizer,
        pairs.eval,
        options,
        stop_ids=pairs.stop_ids,
        on_progress=lambda *call: seen.append(call),
    )
    alone = [generate(llama.model, llama.tokenizer, e.prompt_ids.tolist(), options, pairs.stop_ids) for e in pairs.eval]
    assert [row.prediction for row in result.rows] == [answer.text.strip() for answer in alone]
    assert list(result.metrics) == ["exact_match", "token_f1", "rouge_l", "length", "share"]
    assert result.metrics["length"] == pytest.approx(sum(len(row.prediction or "") for row in result.rows) / 8)
    assert set(result.intervals) == {"loss", "perplexity", *result.metrics}
    assert ("loss", 8, 8) in seen
    assert ("answers", 8, 8) in seen
    assert result.rows[0].prompt == "1 + 3 ="
    assert result.rows[0].scores.keys() == {"exact_match", "token_f1", "rouge_l", "length"}


def test_accuracy_by_likelihood(llama: Tiny, tmp_path: Path) -> None:
    prepared = rows(tmp_path, SENTIMENT, llama, label_names=("negative", "positive"))
    options = EvaluateOptions(metrics=("accuracy",), eval_batch_size=5)
    result = evaluate(llama.model, llama.tokenizer, prepared.eval, options, labels=prepared.labels)
    for row, example in zip(result.rows, prepared.eval, strict=True):
        assert row.prediction in ("negative", "positive")
        assert row.scores["accuracy"] == float(row.prediction == prepared.labels[example.label or 0].word)
        assert row.reference == prepared.labels[example.label or 0].word
    assert result.metrics["accuracy"] == sum(row.scores["accuracy"] for row in result.rows) / 12
    low, high = result.intervals["accuracy"]
    assert 0 <= low < result.metrics["accuracy"] < high <= 1 or result.metrics["accuracy"] in (0, 1)


def test_conversations_are_asked_for_their_last_answer(llama: Tiny, tmp_path: Path) -> None:
    talk = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": "one"},
                {"role": "user", "content": "again"},
                {"role": "assistant", "content": "two"},
            ]
        }
        for i in range(3)
    ]
    prepared = rows(tmp_path, talk, llama)
    options = EvaluateOptions(metrics=("exact_match",), max_new_tokens=2)
    result = evaluate(llama.model, llama.tokenizer, prepared.eval, options, stop_ids=prepared.stop_ids)
    assert {(row.prompt, row.reference) for row in result.rows} == {("again", "two")}


@pytest.fixture
def tuned(tmp_path: Path) -> Iterator[Tiny]:
    """A model with an adapter that changes what it says."""
    made = make_tiny("llama3-gqa", tmp_path / "model")
    attach(made.model, LoraOptions(lora_r=4), seed=0)
    for segment in segments(made.model).values():
        assert segment.adapter is not None
        segment.adapter.lora_B.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(3))
    yield made
    detach(made.model)


def test_base_against_tuned(tuned: Tiny, tmp_path: Path) -> None:
    prepared = rows(tmp_path, PAIRS, tuned)
    options = EvaluateOptions(metrics=("exact_match", "rouge_l"), max_new_tokens=3)
    stages: set[str] = set()
    both = evaluate_base_and_tuned(
        tuned.model, tuned.tokenizer, prepared.eval, options, on_progress=lambda what, *_: stages.add(what)
    )
    assert stages == {"base: loss", "base: answers", "tuned: loss", "tuned: answers"}
    alone = evaluate(tuned.model, tuned.tokenizer, prepared.eval, options)
    assert both.tuned.loss == alone.loss
    detach(tuned.model)
    base = evaluate(tuned.model, tuned.tokenizer, prepared.eval, options)
    assert both.base.loss == base.loss != alone.loss
    assert both.gains["loss"] == pytest.approx(alone.loss - base.loss)
    low, high = both.gain_intervals["loss"]
    assert low <= both.gains["loss"] <= high
    document = json.loads(json.dumps(both.to_json(rows=True), allow_nan=False))
    assert document["loss"] == alone.loss
    assert document["base"]["loss"] == base.loss
    assert document["gains"].keys() == {"loss", "exact_match", "rouge_l"}
    assert document["rows"][0].keys() == {"row", "prompt", "reference", "nll", "tokens", "prediction", "scores"}


def result_of(scores: list[float]) -> EvaluateResult:
    made = [RowResult(f"f:{i}", None, None, 1.0 + s, 2, None, {"m": s}) for i, s in enumerate(scores)]
    return EvaluateResult(1.0, 2 * len(made), {"m": sum(scores) / len(scores)}, {}, made)


def test_gains_are_paired() -> None:
    spread = [i / 20 for i in range(20)]
    both = against(result_of(spread), result_of([s + 0.1 for s in spread]))
    assert both.gain_intervals["m"] == pytest.approx((0.1, 0.1))  # every row gained the same, so nothing is uncertain
    assert both.gain_intervals["loss"] == pytest.approx((0.05, 0.05))
    with pytest.raises(ValueError, match="different rows"):
        against(result_of([1.0]), result_of([1.0, 2.0]))


def test_json_has_the_figures_on_top(llama: Tiny, pairs: Prepared) -> None:
    document = evaluate(llama.model, llama.tokenizer, pairs.eval, EvaluateOptions(max_rows=3)).to_json()
    assert document.keys() == {
        "schema_version", "loss", "perplexity", "supervised_tokens", "evaluated_rows", "intervals",
    }  # fmt: skip
    assert document["evaluated_rows"] == 3
    json.dumps(document, allow_nan=False)


def test_what_cannot_be_measured_is_said(llama: Tiny, tmp_path: Path, pairs: Prepared) -> None:
    with pytest.raises(UsageError, match="no rows to evaluate on"):
        evaluate(llama.model, llama.tokenizer, [])
    with pytest.raises(UsageError, match=r"accuracy is for classification rows .*eval\.jsonl:1 is not one"):
        evaluate(llama.model, llama.tokenizer, pairs.eval, EvaluateOptions(metrics=("accuracy",)))
    with pytest.raises(UsageError, match="unknown metric 'bleu'"):
        evaluate(llama.model, llama.tokenizer, pairs.eval, EvaluateOptions(metrics=("bleu",)))
    text = rows(tmp_path, [{"text": f"some words {i}"} for i in range(4)], llama)
    with pytest.raises(UsageError, match=r"exact_match compares answers, and these rows have none \(plain text"):
        evaluate(llama.model, llama.tokenizer, text.eval, EvaluateOptions(metrics=("exact_match",)))
    assert evaluate(llama.model, llama.tokenizer, text.eval).loss > 0


def test_a_damaged_model_names_the_row(tuned: Tiny, tmp_path: Path) -> None:
    prepared = rows(tmp_path, PAIRS, tuned)
    for segment in segments(tuned.model).values():
        assert segment.adapter is not None
        segment.adapter.lora_B.data.fill_(float("nan"))
    with pytest.raises(HalfbyteError, match=r"eval\.jsonl:\d+: the loss of this row is nan"):
        evaluate(tuned.model, tuned.tokenizer, prepared.eval)
