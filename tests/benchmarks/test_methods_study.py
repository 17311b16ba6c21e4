"""The pieces of benchmarks/methods_study.py: rows split once, cells read, differences paired by seed."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def study(scripts: dict[str, ModuleType]) -> Any:
    return scripts["methods_study"]


def test_rows_are_split_once_and_not_mixed(study: Any, tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}", "output": str(i)} for i in range(10)]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    train, held_out = study.split_rows(data, 3, tmp_path)
    assert json.loads(train.read_text()) == rows[:-3]
    assert json.loads(held_out.read_text()) == rows[-3:]
    assert study.split_rows(data, 3, tmp_path) == (train, held_out)
    with pytest.raises(SystemExit, match="another study"):
        study.split_rows(data, 4, tmp_path)
    with pytest.raises(SystemExit, match="more than 10 rows"):
        study.split_rows(data, 10, tmp_path / "x")


def cell(loss: float, seconds: float = 1.0) -> dict[str, object]:
    return {
        "eval_loss": loss,
        "base_eval_loss": 2.0,
        "seconds_per_update": seconds,
        "peak_memory_bytes": 1_500_000_000,
        "trainable_parameters": 1000,
    }


def test_differences_are_paired_by_seed(study: Any) -> None:
    plain = {1: cell(1.0), 2: cell(1.2)}
    line = study.summary("qdora", {1: cell(0.9, 1.5), 2: cell(1.15), 3: cell(5.0)}, plain)
    assert line["difference_range"] == [pytest.approx(-0.1), pytest.approx(-0.05)]
    assert line["difference"] == pytest.approx(-0.075)
    assert line["loss_range"] == [0.9, 5.0]
    assert "-0.0750 (-0.1000 to -0.0500)" in study.table([line])
    assert "| - |" in study.table([study.summary("galore", {1: cell(1.0)}, {})])


def test_settings(study: Any) -> None:
    assert study.settings_of(["galore:learning_rate=8e-5", "galore:galore_rank=64"]) == {
        "galore": {"learning_rate": "8e-5", "galore_rank": "64"}
    }
    with pytest.raises(SystemExit, match="METHOD:FIELD=VALUE"):
        study.settings_of(["galore"])
