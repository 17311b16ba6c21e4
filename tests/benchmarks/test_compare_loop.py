"""benchmarks/compare_loop.py: what it keeps of its rounds. Every figure in here is invented."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def study(scripts: dict[str, ModuleType]) -> Any:
    return scripts["compare_loop"]


def figures(seconds: float) -> dict[str, float]:
    return {"step_seconds": seconds, "tokens_per_second": 100 / seconds, "peak_memory_bytes": 1e9}


def test_what_is_kept_has_every_round_and_what_follows_from_them(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reported, by_hand = iter((9.0, 0.5, 0.6, 0.9)), iter((0.5, 0.5, 0.6))  # the first report is not counted
    monkeypatch.setattr(study, "compared", lambda arguments, out: {"lora": figures(next(reported))})
    monkeypatch.setattr(study, "by_hand", lambda run: figures(next(by_hand)))
    monkeypatch.setattr(study, "runs_of", lambda out: {"lora": out / "cells" / "x"})
    out = tmp_path / "kept" / "loop.json"
    words = ["-m", "/models/tiny.gguf", "-d", "/data/rows.jsonl", "--methods", "lora", "--rounds", "3", "--steps", "8"]
    words += ["-o", str(out), "--eval-data", "/data/held-out.jsonl", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["compare_loop.py", *words])
    study.main()
    kept = json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["loop.json"]
    assert {"schema_version", "created", "machine", "versions"} <= kept.keys()
    assert kept["machine"]["processor"]
    assert (kept["model"], kept["data"]) == ("tiny.gguf", "rows.jsonl")
    settings = kept["settings"]
    assert (settings["methods"], settings["steps"]) == (["lora"], 8)
    assert settings["flags"] == ["--eval-data", "held-out.jsonl", "--dtype", "float32"]
    seconds = [[one["lora"][side]["step_seconds"] for side in ("report", "loop")] for one in kept["rounds"]]
    assert seconds == [[0.5, 0.5], [0.6, 0.5], [0.9, 0.6]]
    found = kept["summary"]["lora"]["step_seconds"]
    assert found["unit"] == "s"
    assert found["report"] == {"median": 0.6, "least": 0.5, "largest": 0.9}
    assert found["loop"] == {"median": 0.5, "least": 0.5, "largest": 0.6}
    assert found["report_over_loop"] == pytest.approx({"median": 1.2, "least": 1.0, "largest": 1.5})
    assert (
        "| lora | step_seconds, s | 0.6 (0.5 to 0.9) | 0.5 (0.5 to 0.6) | 1.2 (1 to 1.5) |" in capsys.readouterr().out
    )
