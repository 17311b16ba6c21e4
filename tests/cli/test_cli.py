import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from halfbyte.cli import VERBS, load
from halfbyte.run.config import RunConfig
from tests.cli.conftest import Run

SMALL = (
    "--method",
    "qlora",
    "--dtype",
    "float32",
    "--lora-r",
    "4",
    "--max-steps",
    "3",
    "--lr",
    "1e-2",
    "--eval-split",
    "0.1",
)


def verbs() -> list[tuple[str, ...]]:
    return [(verb, "check") if verb == "data" else (verb,) for verb in VERBS]


def test_the_first_help_is_instant_and_loads_nothing() -> None:
    code = (
        "import sys\nfrom halfbyte.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5, "well under a second on a machine that does nothing else"
    assert done.stderr.strip() == "[]"
    for verb, text in VERBS.items():
        assert verb in done.stdout
        assert text.split(",")[0][:30] in done.stdout


@pytest.mark.parametrize("words", verbs(), ids=" ".join)
def test_every_verb_has_help_with_an_example_and_json(halfbyte: Run, words: tuple[str, ...]) -> None:
    done = halfbyte(*words, "--help")
    assert done.code == 0
    assert f"Example: halfbyte {' '.join(words)}" in done.out
    assert "--json" in done.out


def test_what_is_planned_for_later_is_not_listed(halfbyte: Run) -> None:
    listed = halfbyte("--help").out
    assert not {"quantize", "studio", "pool"} & set(listed.split())


def test_every_option_of_the_config_is_a_flag_of_train() -> None:
    flags = {name for parameter in load("train").params for name in parameter.opts}
    assert {"--" + name.replace("_", "-") for name in RunConfig.model_fields} <= flags


def test_version_and_unknown_verbs(halfbyte: Run) -> None:
    assert halfbyte("--version").out.startswith("halfbyte 0.")
    wrong = halfbyte("trian")
    assert wrong.code == 2
    assert "Did you mean 'train'?" in wrong.err
    assert halfbyte().code in (0, 2)


def test_the_way_through(halfbyte: Run, model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = halfbyte("train", "--model", model_folder, "--data", data_file, "--output_dir", "r", *SMALL)
    assert trained.code == 0, trained.err
    assert trained.out == ""
    for setting in ("lora_r 4", "lora_alpha 32", "learning_rate 0.01", "max_seq_length 2048", "seed 42", "nf4"):
        assert setting in trained.err, "the settings are printed at the start, defaults included"
    for line in ("method qlora: ", "backend: ", "parameters are trained", "held-out loss: ", "try: halfbyte chat r"):
        assert trained.err.count(line) == 1, line

    again = halfbyte("train", "--model", model_folder, "--data", data_file, "--output-dir", "r", *SMALL)
    assert again.code == 2
    assert "halfbyte resume r" in again.err
    assert "--overwrite" in again.err
    over = halfbyte("train", "--model", model_folder, "--data", data_file, "-o", "r", *SMALL, "--overwrite", "--json")
    assert over.json["step"] == 3

    more = halfbyte("resume", "r", "--max-steps", "4", "--json")
    assert more.json["step"] == 4
    assert "complete already" in halfbyte("resume", "r").out

    scores = halfbyte("evaluate", "r", "--metrics", "exact_match", "--max-new-tokens", "4", "--json").json
    assert scores["loss"] < scores["base"]["loss"]
    assert {"supervised_tokens", "exact_match", "perplexity"} <= scores.keys()
    assert "gain (95 %)" in halfbyte("evaluate", "r").out
    assert "value (95 %)" in halfbyte("evaluate", model_folder, "--data", data_file, "--dtype", "float32").out

    answers = halfbyte("generate", "r", "say 1:", "say 2:", "--max-new-tokens", "3", "--json").json
    assert [answer["prompt"] for answer in answers] == ["say 1:", "say 2:"]
    assert halfbyte("generate", "r", "say 1:", "--max-new-tokens", "3").out.strip()

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\n/base\n/nonsense\n"))
    talk = halfbyte("chat", "r", "--max-new-tokens", "3")
    assert talk.code == 0
    assert "The base model answers" in talk.out
    assert "there is no command '/nonsense'" in talk.err
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert halfbyte("chat", "r", "--max-new-tokens", "3", "--json").json["question"] == "hello"

    merged = halfbyte("merge", "r", "m", "--merge-dtype", "float32")
    assert merged.code == 0, merged.err
    assert "the base that the adapter was trained on" in merged.out
    assert halfbyte("merge", "r", "m").code == 2
    assert halfbyte("merge", "r", "m", "--overwrite", "--json").json["merged_linears"] == 14

    assert [run["status"] for run in halfbyte("runs", ".", "--json").json] == ["completed"]
    assert "completed" in halfbyte("runs", ".").out
    events = [json.loads(line) for line in halfbyte("watch", "r", "--json").out.splitlines()]
    assert events[0]["event"] == "start"
    assert events[-1]["event"] == "end"
    assert "completed after step 4" in halfbyte("watch", "r").out


def test_plan_and_doctor(halfbyte: Run, model_folder: Path, data_file: Path) -> None:
    text = halfbyte("plan", "--model", model_folder, "--data", data_file)
    assert text.code == 0
    assert "* lora" in text.out
    made = halfbyte("plan", "--model", model_folder, "--json").json
    assert made["data"]["assumed"]
    assert "are assumed" in halfbyte("plan", "--model", model_folder).out
    tight = halfbyte("plan", "--model", model_folder, "--memory", "10MB")
    assert (tight.code, tight.err.count("\n")) == (3, 1)
    facts = halfbyte("doctor", "--json").json
    assert facts["backend"]["reason"]
    assert facts["dtype"]["name"] in ("float32", "bfloat16", "float16")
    assert "NF4 decoding" in halfbyte("doctor").out


def test_init_then_train(halfbyte: Run, model_folder: Path, data_file: Path) -> None:
    made = halfbyte("init", "c.yaml", "--model", model_folder, "--data", data_file, "--lora_rank", "4")
    assert made.code == 0, made.err
    assert halfbyte("init", "c.yaml").code == 2
    assert halfbyte("init", "-").out.startswith("# halfbyte train")
    assert "#: method: auto" in halfbyte("init", "-", "--json").json["text"]
    done = halfbyte("train", "c.yaml", "--max-steps", "1", "-o", "r", "--json")
    assert done.json["step"] == 1


def test_data_check(halfbyte: Run, model_folder: Path, data_file: Path) -> None:
    shown = halfbyte("data", "check", data_file, "--model", model_folder, "--show", "1")
    assert shown.code == 0, shown.err
    assert "⟦" in shown.out
    audit = halfbyte("data", "check", data_file, "--model", model_folder, "--json").json
    assert audit["rows_train"] == 57
    assert halfbyte("data", "check", "--model", model_folder).code == 2


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("train",), 2, "model is needed"),
        (("train", "--model", "./nowhere", "--data", "x"), 2, "nowhere does not exist"),
        (("train", "--model", "{model}"), 2, "no data: give --data"),
        (("train", "--model", "{model}", "--data", "nowhere.jsonl"), 2, "nowhere.jsonl"),
        (("train", "--model", "{model}", "--data", "{data}", "--method", "vera"), 2, "vera is not built"),
        (("train", "--model", "{model}", "--data", "{data}", "--lora-r", "x"), 2, "--lora-r"),
        (("train", "--model", "{model}", "--data", "{data}", "--load-in-4bit", "--full-finetuning"), 2, "disagree"),
        (("train", "--model", "{model}", "--data", "{data}", "--memory", "1MB"), 3, "the budget is"),
        (("train", "--model", "{model}", "--data", "{data}", "--quant-pattern", "x"), 2, "write it as KEY=VALUE"),
        (("train", "absent.yaml"), 2, "absent.yaml: no such config file"),
        (("train", "--no-such-flag"), 2, "No such option"),
        (("resume", "nowhere"), 2, "nowhere is not a folder"),
        (("evaluate", "{model}"), 2, "no rows to evaluate on"),
        (("evaluate", "{model}", "--data", "{data}", "--metrics", "beauty"), 2, "beauty"),
        (("generate", "{model}"), 2, "nothing to answer"),
        (("generate", "{model}", "x", "--temperature", "-1"), 2, "--temperature"),
        (("merge", "{model}", "out"), 2, "nothing to merge"),
        (("watch", "nowhere"), 2, "nowhere holds no run"),
        (("data", "check", "{data}"), 2, "model is needed"),
    ],
)
def test_mistakes_are_one_line_without_a_traceback(
    halfbyte: Run, model_folder: Path, data_file: Path, tmp_path: Path, words: Any, code: int, message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = halfbyte(*(word.format(model=model_folder, data=data_file) for word in words))
    assert done.code == code, done.err
    assert message in done.err
    assert "Traceback" not in done.err
    if done.err.startswith("halfbyte: "):
        assert done.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before, "nothing was written"


def test_a_signal_saves_and_leaves_with_4(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    import signal

    words = ["train", "--model", str(model_folder), "--data", str(data_file), "-o", str(tmp_path / "r"),
             "--max-steps", "100000", "--dtype", "float32"]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "halfbyte", *words], stderr=subprocess.PIPE, text=True)
    try:
        events = tmp_path / "r" / "events.jsonl"
        deadline = time.monotonic() + 120
        while not (events.exists() and '"step", ' in events.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 4, err
    assert "halfbyte resume" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert list((tmp_path / "r").glob("checkpoint-*/manifest.json"))


def test_merge_prints_its_scores_and_refuses_past_the_threshold(
    halfbyte: Run, model_folder: Path, data_file: Path
) -> None:
    trained = halfbyte("train", "-m", model_folder, "-d", data_file, "-o", "r", *SMALL, "--quant-type", "int4")
    assert trained.code == 0, trained.err
    quick = ("--rows", "4", "--answer-tokens", "4")
    merged = halfbyte("merge", "r", "-o", "m", *quick)
    assert merged.code == 0, merged.err
    assert "scored against the unmerged model on 4 of 6 held-out rows (seed 42)" in merged.out
    lines = [line.split() for line in merged.out.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("unmerged", "16bit", "dequantized")] == [
        "unmerged", "16bit", "dequantized"
    ]  # fmt: skip
    assert any(line[:2] == ["dequantized", "*"] for line in lines), "the chosen one is marked"
    assert "scoring 16bit" in merged.err
    refused = halfbyte("merge", "r", "-o", "no", *quick, "--requantized", "--max-kl", "1e-9", "--json")
    assert refused.code == 1
    assert "1e-09 is the limit; nothing was written" in refused.err
    assert [one["name"] for one in refused.json["candidates"]][2:] == ["16bit, requantized", "dequantized, requantized"]
    assert not Path("no").exists()
    for words, message in (
        (("merge", "r"), "one folder to write is needed: halfbyte merge r -o FOLDER"),
        (("merge", "r", "a", "-o", "b"), "(a and --output b were both given)"),
        (("merge", "r", "-o", "b", "--base", "8bit"), "--base"),
        (("merge", "r", "-o", "b", "--adapter", "r:0"), "the weight is a number other than 0"),
        (("merge", "r", "-o", "b", "--adapter", "r"), "is given twice"),
        (("merge", "r", "-o", "b", "--adapter", "nowhere"), "has no adapter yet"),
        (("merge", "r", "-o", "b", "--base", "auto", "--rows", "0"), "--rows"),
        (("merge", "r", "-o", "b", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
    ):
        done = halfbyte(*words)
        assert done.code == 2, (words, done.out)
        assert message in done.err, words
