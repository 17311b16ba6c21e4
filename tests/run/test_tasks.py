"""Classifiers from rows to a folder that transformers loads: train, resume, evaluate, ask, merge."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import halfbyte as hb
from halfbyte.errors import Interrupted, UsageError
from halfbyte.evaluate.evaluate import BaseAndTuned, EvaluateOptions
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.export.export import ExportOptions
from halfbyte.export.merge import MergeOptions
from halfbyte.models.classifier import Classifier
from halfbyte.run import target
from halfbyte.run.config import RunConfig
from halfbyte.run.exporting import export_target
from halfbyte.run.folder import read_config
from halfbyte.run.run import resume, run
from tests.evaluate.conftest import VOCAB, byte_tokenizer
from tests.models import families
from tests.models.test_seq2seq import t5_tokenizer
from tests.run.conftest import write_rows
from tests.run.test_run import Events

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call

ANIMALS = {"cat": "purr", "dog": "woof", "cow": "moo"}


def animals(count: int, first: int = 0) -> list[dict[str, Any]]:
    """A text of which one word tells the class."""
    names = list(ANIMALS)
    return [
        {"text": f"{i} it said {ANIMALS[names[i % 3]]} {'!' * (i % 4)}", "label": names[i % 3]}
        for i in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def config(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("classes")
    return hb.load_config(
        model=str(model_folder), data=str(write_rows(folder / "train.jsonl", animals(90))),
        eval_data=str(write_rows(folder / "dev.jsonl", animals(24, 1000))), output_dir=folder / "run",
        task="classification", method="lora", dtype="float32", lora_r=4, max_steps=30, learning_rate=1e-2,
        max_seq_length=48,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(config: RunConfig) -> Path:
    return run(config).path


def their_probabilities(model: Any, folder: Path, texts: list[str]) -> torch.Tensor:
    """transformers' answer to the texts as one padded batch, by its own tokenizer and config."""
    inputs = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        probabilities: torch.Tensor = model(**inputs).logits.softmax(-1)
    return probabilities


TEXTS = ["it said purr", "1200 it said moo !!", "woof"]


def ours_on(path: Path, **changes: Any) -> torch.Tensor:
    found = hb.classify(path, TEXTS, **changes)
    assert all(one.label == max(one.probabilities, key=one.probabilities.__getitem__) for one in found)
    assert list(found[0].probabilities) == sorted(ANIMALS)
    return torch.tensor([list(one.probabilities.values()) for one in found])


def test_it_learns_and_says_how_well(done: Path) -> None:
    result = json.loads((done / "result.json").read_text())
    metrics = result["metrics"]
    assert metrics["accuracy"] > 0.9
    assert metrics["macro_f1"] > 0.9
    assert metrics["supervised_tokens"] == 24  # rows
    assert result["supervised_tokens"] == 5 * 90  # 30 updates are five epochs, and each counts its rows
    assert metrics["base"]["accuracy"] == pytest.approx(1 / 3)
    assert metrics["base"]["loss"] == pytest.approx(torch.tensor(3.0).log().item())
    assert metrics["base"]["macro_f1"] == pytest.approx(0.5 / 3)  # F1 of the one class that is always said: 1/2
    low, high = metrics["intervals"]["macro_f1"]
    assert low <= metrics["macro_f1"] <= high
    assert metrics["gains"]["accuracy"] > 0.5
    assert result["eval_loss"] == metrics["loss"] < metrics["base"]["loss"] / 2
    resolved, record = read_config(done)
    assert resolved.task == "classification"
    assert record["data"]["labels"] == ["cat", "cow", "dog"]
    assert json.loads((done / "labels.json").read_text())["id2label"] == {"0": "cat", "1": "cow", "2": "dog"}
    card = (done / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "pipeline_tag: text-classification" in card


def test_what_is_said_is_what_transformers_and_peft_say(done: Path, config: RunConfig) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=3, dtype=torch.float32)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(done).pad_token_id
    theirs = peft.PeftModel.from_pretrained(base, done).eval()
    assert torch.allclose(ours_on(done).float(), their_probabilities(theirs, done, TEXTS), atol=1e-5)


def test_evaluate_measures_it_again(done: Path, tmp_path: Path) -> None:
    again = target.evaluate_target(target.rows_from(target.find(str(done)), None))
    assert isinstance(again, BaseAndTuned)
    on_disk = json.loads((done / "result.json").read_text())["metrics"]
    assert again.tuned.metrics == {name: on_disk[name] for name in ("accuracy", "macro_f1")}
    assert again.tuned.loss == pytest.approx(on_disk["loss"], rel=1e-6)
    row = again.to_json(rows=True)["rows"][0]
    assert (row["prediction"], row["reference"], row["scores"]) == ("dog", "dog", {"accuracy": 1.0})
    # Other rows, only two of its classes among them: the order of the classes is the head's.
    few = write_rows(tmp_path / "few.jsonl", [row for row in animals(12) if row["label"] != "cat"])
    other = target.evaluate_target(target.rows_from(target.find(str(done)), str(few)))
    assert isinstance(other, BaseAndTuned)
    assert other.tuned.metrics["accuracy"] > 0.9
    assert other.base.metrics["accuracy"] == 0.5
    with pytest.raises(UsageError, match="rouge_l compares texts, and a classifier says none"):
        target.evaluate_target(
            target.rows_from(target.find(str(done)), None), EvaluateOptions(metrics=("accuracy", "rouge_l"))
        )
    strange = write_rows(tmp_path / "strange.jsonl", [*animals(5), {"text": "meh", "label": "sheep"}])
    with pytest.raises(UsageError, match=r"strange.jsonl:6: the label 'sheep' is not one that the head is trained on"):
        target.evaluate_target(target.rows_from(target.find(str(done)), str(strange)))


def test_an_interrupted_run_resumes_bit_for_bit(config: RunConfig, tmp_path: Path) -> None:
    short = config.replace(max_steps=6, lora_dropout=0.1)
    straight = run(short.replace(output_dir=tmp_path / "straight"))
    with pytest.raises(Interrupted):
        run(short.replace(output_dir=tmp_path / "stopped", save_steps=3), Events(interrupt_at=3))
    checkpoint = tmp_path / "stopped" / "checkpoint-3"
    assert (checkpoint / "labels.json").is_file()
    assert len(hb.classify(tmp_path / "stopped", ["half way"])) == 1
    resumed = resume(tmp_path / "stopped")
    mine, theirs = (load_file(p / "adapter_model.safetensors") for p in (straight.path, resumed.path))
    assert "base_model.model.score.weight" in mine
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_packing_changes_nothing(config: RunConfig, tmp_path: Path) -> None:
    """One row a micro-batch, or all of an update end to end: the same losses."""
    losses = []
    for packing, rows in ((True, 16), (False, 1)):
        one = config.replace(
            max_steps=3, packing=packing, output_dir=tmp_path / f"{rows}", per_device_train_batch_size=rows,
            gradient_accumulation_steps=16 // rows,
        )  # fmt: skip
        losses.append(run(one).train_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_merged_folders_are_classifiers_of_transformers(
    method: str, done: Path, config: RunConfig, tmp_path: Path
) -> None:
    path = done if method == "lora" else run(config.replace(method=method, output_dir=tmp_path / "run")).path
    report = target.merge_target(target.find(str(path)), tmp_path / "merged", MergeOptions(merge_dtype="float32"))
    assert report.comparison is not None
    assert report.comparison.mean_kl < 1e-6
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.id2label == {0: "cat", 1: "cow", 2: "dog"}
    assert model.config.num_labels == 3
    assert model.config.problem_type == "single_label_classification"
    theirs = their_probabilities(model, tmp_path / "merged", TEXTS)
    assert torch.allclose(ours_on(path).float(), theirs, atol=1e-4)
    # The merged folder is a classifier for us too, and says what it is by itself.
    assert torch.allclose(ours_on(tmp_path / "merged", dtype="float32").float(), theirs, atol=1e-4)
    found = target.rows_from(target.find(str(tmp_path / "merged"), dtype="float32"), str(config.eval_data))
    again = target.evaluate_target(found)
    assert isinstance(again, BaseAndTuned)
    on_disk = json.loads((path / "result.json").read_text())["metrics"]
    assert again.tuned.metrics["accuracy"] == on_disk["accuracy"]
    assert again.tuned.loss == pytest.approx(on_disk["loss"], rel=1e-3)
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "merged"), device="cpu")
    assert [one["label"] for one in pipe(TEXTS, batch_size=3)] == [one.label for one in hb.classify(path, TEXTS)]


def test_full_training(config: RunConfig, tmp_path: Path) -> None:
    result = run(config.replace(method="full", learning_rate=3e-3, output_dir=tmp_path / "full"))
    assert result.result["metrics"]["accuracy"] > 0.9
    model = AutoModelForSequenceClassification.from_pretrained(result.path, dtype=torch.float32).eval()
    assert torch.allclose(ours_on(result.path).float(), their_probabilities(model, result.path, TEXTS), atol=1e-4)
    again = target.evaluate_target(target.rows_from(target.find(str(result.path)), None))
    assert isinstance(again, BaseAndTuned)
    assert again.tuned.metrics["accuracy"] == result.result["metrics"]["accuracy"]


def test_an_adapters_folder_names_its_classes(done: Path, config: RunConfig, tmp_path: Path) -> None:
    """Alone, with the base given, and without our labels as PEFT writes it."""
    names = ("adapter_config.json", "adapter_model.safetensors", "labels.json")
    for name in names:
        shutil.copy(done / name, tmp_path)
    expected = ours_on(done)
    assert torch.allclose(ours_on(tmp_path, dtype="float32"), expected, atol=1e-6)
    opened = target.open_target(target.find(config.model, str(tmp_path), dtype="float32"))
    assert isinstance(opened.model, Classifier)
    (tmp_path / "labels.json").unlink()
    bare = hb.classify(tmp_path, TEXTS, dtype="float32")
    assert list(bare[0].probabilities) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    named = hb.classify(tmp_path, TEXTS, dtype="float32", label_names=("cat", "cow", "dog"))
    assert [one.label for one in named] == [one.label for one in hb.classify(done, TEXTS)]


def test_an_adapter_is_continued_with_its_own_classes(done: Path, config: RunConfig, tmp_path: Path) -> None:
    """Rows of two of the classes: the head keeps three, in their order, and begins where it was."""
    few = write_rows(tmp_path / "few.jsonl", [row for row in animals(60) if row["label"] != "cat"])
    more = run(
        config.without(["lora_r"], data=str(few), adapter_path=str(done), output_dir=tmp_path / "more", max_steps=2)
    )
    assert more.train_loss is not None
    assert more.train_loss < 0.2
    assert json.loads((more.path / "labels.json").read_text())["label2id"] == {"cat": 0, "cow": 1, "dog": 2}


@pytest.mark.parametrize(
    ("labels", "label_names"),
    [([36, 38, "M"], None), (["2", "no", "yes"], None), ([0, 1], ["1", "0"])],
)
def test_a_loaded_head_reads_the_rows_as_the_run_did(
    labels: list[int | str], label_names: list[str] | None, model_folder: Path, tmp_path: Path
) -> None:
    """Words and integers mixed, and names that are integers themselves."""
    data = [{"text": f"text {i}", "label": labels[i % len(labels)]} for i in range(30)]
    config = hb.load_config(
        model=str(model_folder), data=str(write_rows(tmp_path / "rows.jsonl", data)), task="classification",
        method="lora", dtype="float32", lora_r=2, max_steps=1, eval_split=9, max_seq_length=32,
        label_names=label_names, output_dir=tmp_path / "run",
    )  # fmt: skip
    result = run(config)
    found = target.evaluate_target(target.find(str(result.path)))
    assert isinstance(found, BaseAndTuned)
    assert found.tuned.loss == pytest.approx(result.eval_loss, rel=1e-5)


def test_label_names_of_a_head_that_has_its_own(done: Path, config: RunConfig, tmp_path: Path) -> None:
    """Other words would be ignored; classes without names can be given some."""
    more = config.replace(adapter_path=str(done), output_dir=tmp_path / "more", max_steps=1)
    for names in (("dog", "cow", "cat"), ("a", "b", "c"), ("cat", "dog")):
        with pytest.raises(UsageError, match=r"and the head in .* has the classes cat, cow, dog: leave it out"):
            run(more.replace(label_names=names))
        assert not (tmp_path / "more").exists()
    target.merge_target(target.find(str(done)), tmp_path / "merged", MergeOptions())
    with pytest.raises(UsageError, match="has the classes cat, cow, dog: leave it out"):
        run(more.replace(adapter_path=None, model=str(tmp_path / "merged"), label_names=("a", "b", "c")))
    run(more.replace(label_names=("cat", "cow", "dog")))
    (tmp_path / "more" / "labels.json").unlink()
    with pytest.raises(UsageError, match="has the classes LABEL_0, LABEL_1, LABEL_2: leave it out, or give each"):
        hb.classify(tmp_path / "more", ["x"], label_names=("cat", "dog"))


def test_a_continued_run_resumes_without_the_first_ones_folder(done: Path, config: RunConfig, tmp_path: Path) -> None:
    """What it needs of that, the classes too, is in its own checkpoints."""
    first = shutil.copytree(done, tmp_path / "first")
    more = run(config.replace(adapter_path=str(first), output_dir=tmp_path / "more", max_steps=1)).path
    shutil.rmtree(first)
    assert resume(more, max_steps=2).result["step"] == 2
    assert json.loads((more / "labels.json").read_text())["label2id"] == {"cat": 0, "cow": 1, "dog": 2}


def test_a_head_that_nobody_trained_is_not_measured(model_folder: Path, config: RunConfig) -> None:
    given = {"task": "classification", "dtype": "float32", "label_names": ("cat", "cow", "dog")}
    found = target.rows_from(target.find(str(model_folder), **given), str(config.data))
    with pytest.raises(UsageError, match="has no trained head to classify with: train one"):
        target.evaluate_target(found)
    with pytest.raises(UsageError, match="has no trained head to classify with: train one"):
        hb.classify(model_folder, ["x"], **given)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("abc", "takes a list of texts, and this is one text: put it in a list"),
        (["fine", ("ab", "cd")], r"text 2 is \('ab', 'cd'\): give a text, or for several in one row a \(name, text\)"),
        ([3], "text 1 is 3: give a text"),
        ([None], "text 1 is None: give a text"),
        ([(("name", 3),)], "text 1 is .*: give a text"),
    ],
)
def test_what_is_no_text_is_named(texts: Any, message: str, done: Path) -> None:
    with pytest.raises(UsageError, match=message):
        hb.classify(done, texts)


def test_what_a_classifier_cannot_do(done: Path, tmp_path: Path) -> None:
    found = target.find(str(done))
    opened = target.open_target(found)
    for ask in (
        lambda: target.generate_texts(opened, ["x"], GenerateOptions()),
        lambda: target.chat_session(opened, GenerateOptions()),
        lambda: export_target(found, tmp_path / "out", ExportOptions(to="gguf")),
    ):
        with pytest.raises(UsageError, match="is for language models, and this is a classifier: use"):
            ask()
    with pytest.raises(UsageError, match="only decoders of text are scored"):
        target.merge_target(found, tmp_path / "out", MergeOptions(base="auto"))
    with pytest.raises(UsageError, match="text 2 is empty"):
        hb.classify(done, ["fine", " "])
    assert not (tmp_path / "out").exists()


def test_a_language_model_is_no_classifier(model_folder: Path) -> None:
    with pytest.raises(UsageError, match="is no classifier: train one with task: classification"):
        hb.classify(model_folder, ["x"])
    with pytest.raises(UsageError, match="nothing says what its classes are: give label_names"):
        hb.classify(model_folder, ["x"], task="classification")
    with pytest.raises(UsageError, match="seq2seq is for encoder-decoders such as T5"):
        hb.train(model=str(model_folder), data="none.jsonl", task="seq2seq")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"prompt": "a", "completion": "b"}] * 4,
            {},
            "its rows are prompt_completion, and task: classification needs",
        ),
        ([{"text": f"t{i}", "label": "same"} for i in range(8)], {}, "needs at least two classes"),
        (animals(20), {"train_on_inputs": True}, "train_on_inputs is for causal language models"),
    ],
)
def test_rows_that_no_head_can_learn_from(
    rows: list[dict[str, Any]], options: dict[str, Any], message: str, model_folder: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError, match=message):
        hb.train(model=str(model_folder), data=str(file), task="classification", **options)


def test_pairs_of_texts_and_integer_labels(model_folder: Path, tmp_path: Path) -> None:
    """Whether two words are the same: neither alone tells. Labels are numbers with names."""
    words = list(ANIMALS.values())
    pairs = [
        {"sentence1": words[i % 3], "sentence2": words[(i // 3) % 3], "label": int(i % 3 == (i // 3) % 3)}
        for i in range(45)
    ]
    result = hb.train(
        model=str(model_folder), data=str(write_rows(tmp_path / "pairs.jsonl", pairs)), output_dir=tmp_path / "run",
        task="classification", method="lora", dtype="float32", lora_r=8, max_steps=60, learning_rate=1e-2,
        label_names=("different", "same"), eval_split=0,
    )  # fmt: skip
    assert result.train_loss is not None
    both = [(("sentence1", a), ("sentence2", b)) for a in words for b in words]
    said = [one.label for one in hb.classify(result.path, both)]
    assert said == ["same" if pair[0][1] == pair[1][1] else "different" for pair in both]


def test_another_architecture(tmp_path: Path) -> None:
    """GPT-2 through transformers' own model: trained in 4 bits, merged, loaded by transformers."""
    made = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    families.make_model(made).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    result = hb.train(
        model=str(tmp_path / "base"), data=str(write_rows(tmp_path / "rows.jsonl", animals(90))),
        output_dir=tmp_path / "run", task="classification", method="qlora", dtype="float32", lora_r=4, max_steps=40,
        learning_rate=1e-2, max_seq_length=48,
    )  # fmt: skip
    assert result.result["metrics"]["accuracy"] > 0.7
    report = target.merge_target(
        target.find(str(result.path)), tmp_path / "merged", MergeOptions(merge_dtype="float32")
    )
    assert report.comparison is not None
    assert report.comparison.mean_kl < 1e-6
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    theirs = their_probabilities(model, tmp_path / "merged", TEXTS)
    assert torch.allclose(ours_on(result.path).float(), theirs, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"modules_to_save": ["embed_tokens", "score"]}, {"init_lora_weights": "pissa"}],
    ids=["dora", "whole modules", "pissa"],
)
def test_every_kind_of_adapter_carries_a_head(options: dict[str, Any], config: RunConfig, tmp_path: Path) -> None:
    """Trained, resumed bit for bit, asked, merged: as for a language model, and PEFT reads the files."""
    short = config.replace(max_steps=4, **options)
    straight = run(short.replace(output_dir=tmp_path / "straight"))
    with pytest.raises(Interrupted):
        run(short.replace(output_dir=tmp_path / "stopped", save_steps=2), Events(interrupt_at=2))
    resumed = resume(tmp_path / "stopped")
    mine, theirs = (load_file(p / "adapter_model.safetensors") for p in (straight.path, resumed.path))
    assert "base_model.model.score.weight" in mine
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    target.merge_target(target.find(str(straight.path)), tmp_path / "merged", MergeOptions(merge_dtype="float32"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    expected = ours_on(straight.path).float()
    assert torch.allclose(expected, their_probabilities(model, tmp_path / "merged", TEXTS), atol=1e-4)
    base = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=3, dtype=torch.float32)
    base.config.pad_token_id = AutoTokenizer.from_pretrained(straight.path).pad_token_id
    wrapped = peft.PeftModel.from_pretrained(base, straight.path).eval()
    assert torch.allclose(expected, their_probabilities(wrapped, straight.path, TEXTS), atol=1e-4)


def test_texts_that_end_with_padding_are_refused(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    tokenizer = t5_tokenizer()  # ends every text with <eos>
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    file = write_rows(tmp_path / "rows.jsonl", animals(20))
    with pytest.raises(UsageError, match="ends every text with '<eos>', which is its padding too"):
        hb.train(model=str(tmp_path / "model"), data=str(file), task="classification")


@pytest.mark.parametrize("method", ["galore", "loraplus"])
def test_methods_that_treat_tensors_by_their_kind(method: str, config: RunConfig, tmp_path: Path) -> None:
    """A head is a matrix of few rows among large ones, and neither an A nor a B."""
    result = hb.train(
        model=config.model, data=config.data, eval_data=config.eval_data, output_dir=tmp_path / method, method=method,
        task="classification", dtype="float32", max_steps=30, learning_rate=3e-3 if method == "galore" else 1e-3,
        max_seq_length=48,
    )  # fmt: skip
    assert result.result["metrics"]["accuracy"] > 0.6
    assert result.result["metrics"]["loss"] < 0.8 * result.result["metrics"]["base"]["loss"]
