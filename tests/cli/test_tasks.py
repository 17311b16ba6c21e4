"""Classifiers and encoder-decoders from the command line."""

import json
from pathlib import Path

from tests.cli.conftest import Run
from tests.run.conftest import write_rows
from tests.run.test_seq2seq import copies, write_base
from tests.run.test_tasks import animals


def test_a_classifier(halfbyte: Run, model_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", animals(30))
    shown = halfbyte("data", "check", rows, "--model", model_folder, "--task", "classification", "--show", 1)
    assert shown.code == 0
    assert "class cat" in shown.out
    done = halfbyte(
        "train", "--model", model_folder, "--data", rows, "--task", "classification", "--method", "lora", "--max-steps",
        2, "--output-dir", "run", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    measured = halfbyte("evaluate", "run", "--data", rows, "--json", "--rows").json
    assert {"loss", "accuracy", "macro_f1", "base", "rows"} <= measured.keys()
    assert len(measured["rows"]) == 30
    assert measured["rows"][0]["reference"] == "cat"
    assert "macro_f1" in halfbyte("evaluate", "run").out.replace("macro f1", "macro_f1").lower()
    for words in (("generate", "run", "hello"), ("chat", "run"), ("export", "run", "--to", "gguf")):
        refused = halfbyte(*words)
        assert refused.code == 2
        assert refused.out == ""
        assert refused.err.count("\n") == 1
        assert "this is a classifier: use `halfbyte evaluate --data ROWS --json --rows`" in refused.err
    merged = halfbyte("merge", "run", "-o", "merged", "--json")
    assert merged.code == 0, merged.err
    config = json.loads(Path("merged/config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "cat", "1": "cow", "2": "dog"}


def test_an_encoder_decoder(halfbyte: Run, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", copies()[:20])
    model = write_base("t5", tmp_path / "base")
    done = halfbyte(
        "train",
        "--model",
        model,
        "--data",
        rows,
        "--max-steps",
        2,
        "--output-dir",
        "run",
        "--dtype",
        "float32",
        "--json",
    )
    assert done.code == 0, done.err
    assert halfbyte("generate", "run", "abc", "--max-new-tokens", 3, "--json").json[0]["prompt"] == "abc"
    measured = halfbyte("evaluate", "run", "--metrics", "exact_match", "--max-new-tokens", 3, "--json")
    assert {"loss", "exact_match", "base"} <= measured.json.keys()
    planned = halfbyte("plan", "--model", model, "--json")
    assert planned.code == 0, planned.err
    assert any("transformers' own code" in line for line in planned.json["assumptions"])
    assert halfbyte("merge", "run", "-o", "merged").code == 0
    assert json.loads(Path("merged/config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]
