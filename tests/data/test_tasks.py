"""Rows for a trained head and for encoder-decoders: what their tokens and targets are."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from halfbyte.batch import IGNORE
from halfbyte.data import DataOptions, Prepared, collate, prepare, render_check
from halfbyte.data.encoding import Encoder
from halfbyte.errors import UsageError
from halfbyte.train.update import split
from tests.evaluate.conftest import byte_tokenizer


def wrapped_tokenizer() -> Any:
    """Bytes between a beginning and an end, as BERT's children have it."""
    made = byte_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_end|> $A <eos>", special_tokens=[("<|im_end|>", 257), ("<eos>", 256)]
    )
    return made


def made(tmp_path: Path, rows: list[dict[str, Any]], tokenizer: Any = None, **options: Any) -> Prepared:
    labels = options.pop("labels", None)
    held_out = options.pop("held_out", None)
    for name, values in (("rows", rows), ("held_out", held_out)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values or []))
    files = {"data": str(tmp_path / "rows.jsonl")}
    files |= {} if held_out is None else {"eval_data": str(tmp_path / "held_out.jsonl")}
    chosen = DataOptions(**{"task": "classification", "eval_split": 0, **files, **options})
    return prepare(chosen, tokenizer or byte_tokenizer(), seed=0, labels=labels)


ROWS = [{"text": "so fine", "label": "good"}, {"text": "so bad", "label": "bad"}]


def test_a_text_is_as_the_tokenizer_gives_it(tmp_path: Path) -> None:
    for tokenizer in (byte_tokenizer(), wrapped_tokenizer()):
        found = made(tmp_path, ROWS, tokenizer)
        for example, row in zip(found.train, ROWS, strict=True):
            assert example.input_ids.tolist() == tokenizer(row["text"])["input_ids"]
            assert example.supervised_tokens == 1
            assert found.labels[example.target or 0].word == row["label"] == example.completion
        assert [choice.word for choice in found.labels] == ["bad", "good"]
        assert found.audit.supervised_train == 2
        assert found.audit.labels == {"bad": 1, "good": 1}


def test_the_ends_that_a_tokenizer_puts_around_a_text() -> None:
    encoder = Encoder(wrapped_tokenizer())
    assert (encoder.prefix, encoder.suffix) == ((257,), (256,))
    assert encoder.encode_whole("abc") == [257, *encoder.encode("abc"), 256]
    assert encoder.wrap(encoder.encode("abcdef"), room=5) == [257, *encoder.encode("abc"), 256]
    assert encoder.wrap([257, 5]) == [257, 5, 256]  # the text spells the beginning out: not twice
    assert (Encoder(byte_tokenizer()).prefix, Encoder(byte_tokenizer()).suffix) == ((), ())


def test_longer_texts_are_cut_in_front_of_the_end(tmp_path: Path) -> None:
    found = made(tmp_path, ROWS, wrapped_tokenizer(), max_seq_length=6)
    assert [example.input_ids[-1] for example in found.train] == [256, 256]
    assert [len(example) for example in found.train] == [6, 6]
    assert [example.truncated for example in found.train] == [3, 2]
    assert found.audit.truncated == 2


def test_classes_are_targets_of_last_positions(tmp_path: Path) -> None:
    batch = collate(made(tmp_path, ROWS).train)
    assert batch.lengths == (7, 6)
    assert batch.targets[[6, 12]].tolist() == [1, 0]
    assert batch.supervised_tokens == batch.loss_terms == 2
    assert (batch.targets != IGNORE).nonzero()[:, 0].tolist() == [6, 12]
    assert batch.sources == ()
    one, two = split(batch)
    assert (one.targets[-1].item(), two.targets[-1].item()) == (1, 0)


def test_pairs_and_instructions(tmp_path: Path) -> None:
    rows = [{"premise": "It rains.", "hypothesis": "It is wet.", "label": i} for i in (0, 1)]
    found = made(tmp_path, rows, system_prompt="Does it follow?")
    text = "Does it follow?\n\npremise: It rains.\nhypothesis: It is wet."
    assert found.train[0].input_ids.tolist() == byte_tokenizer()(text)["input_ids"]
    assert found.train[0].prompt == text


def words(found: Prepared) -> list[tuple[int | str, str]]:
    return [(choice.value, choice.word) for choice in found.labels]


def test_classes_are_those_of_the_training_rows(tmp_path: Path) -> None:
    numbers = [{"text": f"t{i}", "label": i} for i in (10, 2, 5)]
    assert words(made(tmp_path, numbers)) == [(2, "2"), (5, "5"), (10, "10")]
    named = [{"text": f"t{i}", "label": i} for i in (1, 0)]
    assert words(made(tmp_path, named, label_names=["no", "yes"])) == [(0, "no"), (1, "yes")]
    # A held-out class that was never trained is an error with the row's place, not a row set aside.
    unknown = [*ROWS, {"text": "so so", "label": "fair"}]
    with pytest.raises(UsageError, match=r"held_out.jsonl:3: the label 'fair' is not one .* \(bad, good\)"):
        made(tmp_path, ROWS, held_out=unknown)
    assert len(made(tmp_path, ROWS, held_out=ROWS[:1]).eval) == 1


def test_classes_of_a_head_that_is_trained_already(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "good"}, {"text": "b", "label": "good"}]
    found = made(tmp_path, rows, labels=("fair", "good", "bad"))
    assert [example.target for example in found.train] == [1, 1]  # one class is enough to go on with
    numbers = [{"text": "a", "label": 2}, {"text": "b", "label": 0}]
    assert [e.target for e in made(tmp_path, numbers, labels=("fair", "good", "bad")).train] == [2, 0]
    stars = [{"text": "a", "label": 2}, {"text": "b", "label": 5}]
    assert [e.target for e in made(tmp_path, stars, labels=("2", "5", "10")).train] == [0, 1]


def test_the_same_text_with_another_class_is_another_row(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "a", "label": "y"}, {"text": "a", "label": "y"}]
    assert made(tmp_path, rows).audit.duplicates == 1


def test_the_task_is_part_of_the_datas_fingerprint(tmp_path: Path) -> None:
    found = {task: made(tmp_path, ROWS, task=task) for task in ("auto", "causal", "classification", "seq2seq")}
    prints = {task: one.fingerprint for task, one in found.items()}
    assert prints["auto"] == prints["causal"]
    assert len(set(prints.values())) == 3
    assert found["causal"].train[0].target is None  # labels as words are what rows with labels are by default


def test_sources_of_encoder_decoders(tmp_path: Path) -> None:
    rows = [{"prompt": "ask", "completion": "say"}, {"prompt": "question", "completion": "no"}]
    found = made(tmp_path, rows, wrapped_tokenizer(), task="seq2seq")
    batch = collate(found.train)
    assert batch.sources == (5, 10)
    assert batch.lengths == (10, 14)
    # The source's last position predicts the answer's first token, and the answer's last one nothing.
    ids = batch.input_ids
    assert batch.targets[4:10].tolist() == [*ids[5:10].tolist(), IGNORE]
    assert bool((batch.targets[:4] == IGNORE).all())
    assert batch.targets[19:24].tolist() == [*ids[20:24].tolist(), IGNORE]
    one, two = split(batch)
    assert (one.sources, two.sources) == ((5,), (10,))
    assert torch.equal(two.input_ids, ids[10:])
    assert found.train[0].prompt_ids.tolist() == wrapped_tokenizer()("ask")["input_ids"]


def test_an_end_is_put_behind_answers_that_lack_one(tmp_path: Path) -> None:
    (example,) = made(tmp_path, [{"prompt": "ask", "completion": "say"}], task="seq2seq").train
    assert example.input_ids.tolist()[-1] == 256
    assert example.source_length == 3


def test_labels_of_encoder_decoders_are_texts_of_their_own(tmp_path: Path) -> None:
    found = made(tmp_path, ROWS, wrapped_tokenizer(), task="seq2seq")
    assert found.labels[1].input_ids == tuple(wrapped_tokenizer()("good")["input_ids"])
    answer = found.train[0].input_ids[found.train[0].source_length :]
    assert tuple(answer.tolist()) == found.labels[1].input_ids


def test_a_row_is_shown_with_its_class(tmp_path: Path) -> None:
    console = Console(width=100, file=io.StringIO(), force_terminal=False)
    render_check(made(tmp_path, ROWS), byte_tokenizer(), console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "rows.jsonl:1 · 7 tokens, class good" in printed
    assert "bad: 1, good: 1" in printed
