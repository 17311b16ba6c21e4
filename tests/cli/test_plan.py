"""`halfbyte plan`: what it prints, its JSON, its exit codes, and one line for whatever is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run

GPUS = "rtx-3060,rtx-4090,a100-80g"


@pytest.fixture(autouse=True)
def machines_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "halfbyte" / "machines.yaml"


def test_the_table_reads_well_in_80_columns(halfbyte: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = halfbyte("plan", "-m", "llama-3.1-8b", "--device", "rtx-4090", "--price", "0.34 EUR/h",
                    "--methods", "full,lora,qlora,dora,qdora,loftq,galore")  # fmt: skip
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    table = lines[1:9]
    assert all(len(line.rstrip()) <= 80 for line in table), table
    assert table[0].split() == ["method", "memory", "P95", "time", "P95", "EUR", "P95"]
    marked = [line for line in table if line.startswith("* ")]
    assert len(marked) == 1
    assert marked[0].startswith("* lora")
    assert "does not fit" in next(line for line in table if line.strip().startswith("full"))
    text = " ".join(done.out.split())
    for said in (
        "rtx-4090: 2",
        "lora: its 16-bit base, which loses nothing, fits with room",
        "full would fit with: --method qlora",
        "merge, afterwards",
        "at its peak, in phase 'train': base weights",
        "activations kept; rows packed; computed in bfloat16",
        "no data was given: 1,000 rows of 512 tokens, half of them supervised, are assumed",
        "constants on GPUs are unmeasured",
    ):
        assert said in text, said


def test_where_should_this_run(halfbyte: Run, machines_file: Path) -> None:
    machines_file.parent.mkdir(parents=True)
    machines_file.write_text("".join(f"{name}: {{price: {price} EUR/h}}\n" for name, price in
                                   zip(GPUS.split(","), (0.1, 0.34, 1.5), strict=True)))  # fmt: skip
    done = halfbyte("plan", "-m", "llama-3.1-8b", "--device", GPUS, "--pick", "cheapest", "--deadline", "2d")
    assert done.code == 0, done.err
    assert sum(line.startswith("* ") for line in done.out.splitlines()) == 1
    made = halfbyte("plan", "-m", "llama-3.1-8b", "--device", GPUS, "--pick", "cheapest", "--json").json
    assert [one["device"] for one in made["devices"]] == GPUS.split(",")
    costs = {one["device"]: one["cost"]["p50"] for one in made["devices"]}
    assert made["device"] == min(costs, key=lambda name: costs[name])
    undecided = halfbyte("plan", "-m", "llama-3.1-8b", "--device", GPUS)
    assert "--pick cheapest or --pick fastest names one of them" in undecided.out
    late = halfbyte("plan", "-m", "llama-3.1-8b", "--device", GPUS, "--pick", "fastest", "--deadline", "5s")
    assert (late.code, late.err.count("\n")) == (3, 1)
    assert "cannot be done within 5 s" in late.err
    assert "rtx-3060" in late.out, "the figures are shown all the same"


def test_json_holds_everything(halfbyte: Run, model_folder: Path, data_file: Path) -> None:
    made = halfbyte("plan", "-m", model_folder, "-d", data_file, "--memory", "4GB", "--price", "1 USD", "--json").json
    assert made["verdict"] == "fits"
    assert made["cost"]["currency"] == "USD"
    assert {"load", "train", "evaluate", "save", "merge"} == set(made["memory_by_phase"])
    assert made["clause"] == "room"
    assert made["budget_bytes"] == 4_000_000_000
    assert made["machine"] is None


def test_with_less_than_the_minimum_it_refuses_and_names_it(halfbyte: Run, model_folder: Path, data_file: Path) -> None:
    """The table and what would help on stdout, one line on stderr, exit 3; and the named minimum is enough."""
    words = ("-m", model_folder, "-d", data_file, "--method", "qlora")
    refused = halfbyte("plan", *words, "--memory", "300MB")
    assert refused.code == 3
    assert refused.err.count("\n") == 1
    assert "qlora needs at least " in refused.err
    assert "does not fit" in refused.out
    made = halfbyte("plan", *words, "--memory", "300MB", "--json")
    assert (made.code, made.json["verdict"]) == (3, "does not fit")
    least = made.json["peak_memory_bytes"]["p95"]
    assert halfbyte("plan", *words, "--memory", least + 1, "--json").json["verdict"] == "fits"
    started = halfbyte("train", *words, "--memory", least - 1_000_000, "-o", "r")
    assert (started.code, started.err.splitlines()[-1].startswith("halfbyte: qlora needs at least")) == (3, True)
    assert not Path("r").exists()


def test_what_would_fit_can_be_typed(halfbyte: Run) -> None:
    """A change's words, typed behind the command as they stand, fit."""
    words = ("plan", "-m", "gemma-3-270m", "--method", "lora", "--no-gradient-checkpointing",
             "--per-device-train-batch-size", "16")  # fmt: skip
    layouts = ((), ("--gradient-checkpointing",))
    kept, lean = (halfbyte(*words, *more, "--memory", "1", "--json").json for more in layouts)
    budget = (kept["peak_memory_bytes"]["p95"] + lean["peak_memory_bytes"]["p95"]) // 2
    said = halfbyte(*words, "--memory", budget).out.split("lora would fit with: ")[1].split(" (")[0]
    assert said == "--gradient-checkpointing"
    assert halfbyte(*words, "--memory", budget, *said.split(), "--json").json["verdict"] == "fits"


def test_auto_says_why_and_trains_what_it_said(halfbyte: Run, model_folder: Path, data_file: Path) -> None:
    done = halfbyte("train", "-m", model_folder, "-d", data_file, "-o", "r", "--max-steps", "1", "--dtype", "float32")
    assert done.code == 0, done.err
    assert "method lora: its 16-bit base, which loses nothing, fits with room" in done.err
    made = json.loads(Path("r/plan.json").read_text())
    assert (made["method"], made["clause"], made["schema_version"]) == ("lora", "room", 2)


def write(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "transfoobar"}, "transfoobar"),
        ({}, "has no model_type"),
        ({**LLAMA, "hidden_size": -64}, "hidden_size is -64"),
        ({**LLAMA, "hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({**LLAMA, "num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({**LLAMA, "num_attention_heads": 3, "num_key_value_heads": 2}, "cannot share 2 key-value heads"),
        ({**LLAMA, "vocab_size": "many"}, "vocab_size is 'many'"),
        ({"model_type": "gpt2", "n_embd": 10**9, "n_layer": 12, "n_head": 1}, "n_embd"),
    ],
)
def test_absurd_models_are_one_line(halfbyte: Run, tmp_path: Path, config: dict[str, Any], message: str) -> None:
    done = halfbyte("plan", "-m", write(tmp_path / "model", **config))
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert message in done.err
    assert done.out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory", "0"), "greater than 0"),
        (("--memory", "-1GB"), "a size is a number and a unit"),
        (("--memory", "much"), "a size is a number and a unit"),
        (("--price", "0.34"), "price '0.34' has no currency: write an amount and its currency by the hour"),
        (("--price", "-1 EUR"), "negative"),
        (("--price", "5 EUR/day"), "not by the hour"),
        (("--deadline", "soon"), "--deadline 'soon' is not a duration: write a number and a unit, as in 30m, 6h or 2d"),
        (("--deadline", "0h"), "'0h' is not a duration"),
        (("--methods", "lora,vera"), "--methods: 'vera' is not a method"),
        (("--device", "rtx-9999"), "'rtx-9999' is not a machine of the catalogue: did you mean"),
        (("--device", "rtx-4090", "--pick", "best"), "--pick best: it is cheapest or fastest"),
        (("--device", GPUS, "--pick", "cheapest"), "there is none for rtx-3060, rtx-4090, a100-80g (none ships): put"),
        (("--machines", "nowhere.yaml", "--device", "rtx-4090"), "nowhere.yaml: no such file of machines"),
        (("--data", "{empty}"), "empty.jsonl"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--method", "full", "--use-dora"), "use_dora is for adapters"),
    ],
)
def test_bad_questions_are_one_line(
    halfbyte: Run, model_folder: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    done = halfbyte("plan", "-m", model_folder, *(word.format(empty=tmp_path / "empty.jsonl") for word in words))
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
