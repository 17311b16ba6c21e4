"""Scores against figures that transformers' own logits give, and against hand-made answers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.batch import IGNORE
from halfbyte.data import DataOptions, Prepared, collate, prepare
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.evaluate import EvaluateOptions, evaluate
from halfbyte.evaluate.generate import Generation
from halfbyte.export.score import HeldOut, Said, choose_rows, compare, listen
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from tests.evaluate.conftest import Tiny, byte_tokenizer, make_tiny

PAIRS = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(1, 5) for b in (3, 40)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny("llama3-gqa", tmp_path_factory.mktemp("model"))


def prepared(folder: Path, values: list[dict[str, Any]]) -> Prepared:
    """The values as a data set of their own, all of them held out."""
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    files = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "eval.jsonl")}
    return prepare(DataOptions(**files), byte_tokenizer(), seed=0)


def held_out(folder: Path, values: list[dict[str, Any]], rows: int = 64) -> HeldOut:
    made = prepared(folder, values)
    return choose_rows(made.eval, rows, 0, made.labels)


def nudged(tiny: Tiny, folder: Path, size: float = 0.1) -> Tiny:
    """The model with every weight a little different: another one on the same vocabulary."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in tiny.reference.parameters():
            parameter += size * parameter.std() * torch.randn(parameter.shape, generator=generator)
    tiny.reference.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    loaded = load_model(ModelOptions(model=str(folder)), None, torch.float32, "cpu")
    return Tiny(loaded.model.eval(), tiny.reference, tiny.tokenizer)  # type: ignore[arg-type]


def transformers_logprobs(model: PreTrainedModel, rows: HeldOut) -> Tensor:
    """Log-probabilities [N, V] at the supervised positions, float64."""
    batch = collate(rows.examples)
    with torch.no_grad():
        parts = [model(ids[None], use_cache=False).logits[0] for ids in batch.input_ids.split(batch.lengths)]
    return torch.cat(parts)[batch.targets != IGNORE].double().log_softmax(-1)


@pytest.mark.parametrize("name", ["llama3-gqa", "gemma2", "gpt2"])
def test_divergence_and_perplexity_are_what_transformers_logits_give(name: str, tmp_path: Path) -> None:
    one = make_tiny(name, tmp_path / "one")
    rows = held_out(tmp_path, PAIRS)
    p = transformers_logprobs(one.reference, rows)
    reference = listen(one.model, one.tokenizer, rows, 4)
    two = nudged(one, tmp_path / "two")
    q = transformers_logprobs(two.reference, rows)
    score = compare("nudged", listen(two.model, two.tokenizer, rows, 4), reference, rows)
    kl = (p.exp() * (p - q)).sum(-1)
    assert score.kl == pytest.approx(float(kl.mean()), rel=1e-3)
    assert score.kl > 1e-3
    assert score.kl_interval is not None
    assert score.kl_interval[0] < score.kl < score.kl_interval[1]
    assert score.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    targets = torch.cat([t[t != IGNORE] for t in [collate(rows.examples).targets]])
    nll = -q.gather(1, targets[:, None]).mean()
    assert score.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-4)
    assert score.model_bytes > 4 * 50_000


def test_a_model_against_itself(llama: Tiny, tmp_path: Path) -> None:
    rows = held_out(tmp_path, PAIRS)
    said = listen(llama.model, llama.tokenizer, rows, 6)
    score = compare("itself", said, listen(llama.model, llama.tokenizer, rows, 6), rows)
    assert (score.kl, score.same_top, score.same_answers, score.same_tokens) == (0.0, 1.0, 1.0, 1.0)


def test_metrics_are_those_of_evaluate(llama: Tiny, tmp_path: Path) -> None:
    made = prepared(tmp_path, PAIRS)
    names = ("exact_match", "token_f1")
    said = listen(llama.model, llama.tokenizer, choose_rows(made.eval, 64, 0), 6, names)
    options = EvaluateOptions(metrics=names, max_new_tokens=6)
    result = evaluate(llama.model, llama.tokenizer, made.eval, options)
    assert said.metrics == pytest.approx(result.metrics)
    assert float(said.nll.mean()) == pytest.approx(result.loss, rel=1e-4)


def test_accuracy_comes_with_labels(llama: Tiny, tmp_path: Path) -> None:
    made = prepared(tmp_path, [{"text": f"film number {i}", "label": i % 2} for i in range(12)])
    rows = choose_rows(made.eval, 64, 0, made.labels)
    said = listen(llama.model, llama.tokenizer, rows, 4)
    result = evaluate(llama.model, llama.tokenizer, made.eval, labels=made.labels)
    assert said.metrics == {"accuracy": result.metrics["accuracy"]}


def test_plain_text_is_continued_from_its_opening(llama: Tiny, tmp_path: Path) -> None:
    rows = held_out(tmp_path, [{"text": "abc " * 30}, {"text": "xy"}])
    said = listen(llama.model, llama.tokenizer, rows, 3)
    assert sorted(answer.prompt_tokens for answer in said.answers) == [2, 32]
    with pytest.raises(UsageError, match=r"exact_match compares answers, and the held-out rows have none"):
        listen(llama.model, llama.tokenizer, rows, 3, ("exact_match",))
    with pytest.raises(UsageError, match="unknown metric"):
        listen(llama.model, llama.tokenizer, rows, 3, ("blue",))


def answer(tokens: tuple[int, ...], reason: Any = "eos") -> Generation:
    return Generation(tokens, "", reason, 3)


def test_shares_of_answers(llama: Tiny, tmp_path: Path) -> None:
    rows = held_out(tmp_path, PAIRS[:3])
    said = listen(llama.model, llama.tokenizer, rows, 2)
    one = replace(said, answers=(answer((1, 2)), answer((1, 2, 3, 4), "length"), answer((7,))))
    two = replace(said, answers=(answer((1, 2)), answer((1, 9, 3, 4), "length"), answer((7, 8))))
    score = compare("x", two, one, rows)
    assert score.same_answers == pytest.approx(1 / 3)
    assert score.same_tokens == pytest.approx((3 + 1 + 1) / (3 + 4 + 3))  # an answer's end is a token
    cut = replace(said, answers=(answer((1, 2), "length"), answer((1, 2, 3, 4), "length"), answer((7,))))
    assert compare("x", cut, one, rows).same_answers == pytest.approx(2 / 3)  # one of them did not end


def test_broken_models_are_no_number(llama: Tiny, tmp_path: Path) -> None:
    rows = held_out(tmp_path, PAIRS[:2])
    said = listen(llama.model, llama.tokenizer, rows, 2)
    broken: Said = replace(said, states=torch.full_like(said.states, float("nan")))
    assert compare("x", broken, said, rows).kl == float("inf")
    damaged = make_tiny("llama3-gqa", tmp_path / "damaged")
    with torch.no_grad():
        damaged.reference.model.norm.weight[0] = float("nan")
    damaged.reference.save_pretrained(tmp_path / "damaged")
    loaded: Any = load_model(ModelOptions(model=str(tmp_path / "damaged")), None, torch.float32, "cpu")
    with pytest.raises(HalfbyteError, match="not finite"):
        listen(loaded.model, llama.tokenizer, rows, 2)


def test_rows_are_drawn_by_the_seed_and_bounded(tmp_path: Path) -> None:
    examples = prepared(tmp_path, PAIRS).eval
    some = choose_rows(examples, 3, seed=1)
    assert [e.index for e in some.examples] == [e.index for e in choose_rows(examples, 3, seed=1).examples]
    assert len(some.examples) == 3
    assert {tuple(e.index for e in choose_rows(examples, 3, seed=s).examples) for s in range(6)} != {
        tuple(e.index for e in some.examples)
    }
    assert [e.index for e in some.examples] == sorted(e.index for e in some.examples)
    assert str(some).startswith("3 of 8 held-out rows (seed 1): ")
    assert choose_rows(examples, 64, 0, max_tokens=25).tokens <= 25
    assert len(choose_rows(examples, 64, 0, max_tokens=1).examples) == 1
    assert str(choose_rows(examples, 64, 0)).startswith("all 8 held-out rows")
    silent = [replace(e, supervised=e.supervised & False) for e in examples]
    with pytest.raises(UsageError, match="no held-out row has a supervised token"):
        choose_rows(silent, 64, 0)
