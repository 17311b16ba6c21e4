"""The merge study on a tiny run, and the small model that it is made for."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import halfbyte as hb
from tests.run.conftest import _no_measuring, _own_cache, rows, write_rows

__all__ = ["_no_measuring", "_own_cache"]


@pytest.fixture
def script(scripts: dict[str, ModuleType]) -> Any:
    return scripts["merge_study"]


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> Path:
    data = write_rows(tmp_path / "rows.jsonl", rows(30))
    hb.train(
        model=str(model_folder), data=str(data), output_dir=tmp_path / "tuned", lora_r=4, dtype="float32",
        method="qlora", max_steps=4, eval_split=0.2, learning_rate=2e-2, max_seq_length=64, quant_type="int4",
    )  # fmt: skip
    return tmp_path / "tuned"


def test_a_table_of_every_way_to_merge(
    script: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "x",
        str(run),
        "--rows",
        "4",
        "--answer-tokens",
        "4",
        "--metrics",
        "token_f1",
        "--out",
        str(tmp_path / "o"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    (found,) = json.loads((tmp_path / "o").read_text())
    by_name = {score["name"]: score for score in found["scores"]}
    assert list(by_name) == ["unmerged", script.UNTUNED, *(c.name for c in script.CANDIDATES)]
    assert by_name["dequantized"]["kl"] < 0.2 * by_name["16bit"]["kl"]
    assert by_name[script.UNTUNED]["kl"] > by_name["16bit"]["kl"]
    assert 0 < found["error"] < 0.5
    assert found["update"] > 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(by_name)
    assert len({line.count("|") for line in table}) == 1
    assert "token_f1" in table[0]


def test_a_small_model_from_nothing(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    small: Any = scripts["small_model"]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"a": f"line {i} of {i * 7}", "n": i}) + "\n" for i in range(200)))
    (tmp_path / "wiki.txt").write_text("A page.\nAnother one.\n")
    done = small.train_small(tmp_path, [text, tmp_path / "wiki.txt"], 1, 16)
    model: Any = hb.load(str(done))
    assert model.tokenizer.decode(model.tokenizer("line 7 of 49")["input_ids"]) == "line 7 of 49"
    assert model.layers[0].qkv.parts[0].weight.source_dtype == torch.bfloat16
    rows_file = (tmp_path / "rows.jsonl").read_text()
    assert "Another one." in rows_file
    assert small.EOS in rows_file
    assert small.train_small(tmp_path, [text], 1, 16) == done  # made once
