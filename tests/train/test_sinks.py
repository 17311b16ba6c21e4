"""The dashboards, offline, each read back through its own package. Those not installed are skipped by name."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import UsageError
from halfbyte.train.events import read_events
from halfbyte.train.sinks import figures, open_sinks, run_id

from . import tiny

CONFIG = {"learning_rate": 0.02, "model": "tiny", "target_modules": ["q_proj"]}


def train_with(path: Path, name: str, steps: int, resume: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sinks: list[Any] = []

    def listen(event: dict[str, Any]) -> None:
        """Sinks are opened once the folder is a run, as `halfbyte.run` does."""
        if not sinks:
            sinks.extend(open_sinks([name], path, CONFIG))
        for sink in sinks:
            sink(event)

    tiny.run(path, steps=steps, resume=resume, listeners=(listen,), eval_steps=2)
    for sink in sinks:
        sink.close()


def step_losses(path: Path) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in read_events(path / "events.jsonl") if e["event"] == "step"}


def warnings_in(path: Path) -> list[str]:
    return [e["message"] for e in read_events(path / "events.jsonl") if "no more events" in e.get("message", "")]


def test_figures_have_one_name_everywhere() -> None:
    step = {"event": "step", "time": 1.0, "step": 3, "seconds": 2.0, "tokens": 50, "loss": 1.5}
    assert figures(step) == {
        "train/seconds": 2.0,
        "train/tokens": 50.0,
        "train/loss": 1.5,
        "train/tokens_per_second": 25.0,
    }
    evaluation = {"event": "eval", "time": 1.0, "step": 3, "loss": None, "best": True, "accuracy": 0.5}
    assert figures(evaluation) == {"eval/accuracy": 0.5}
    assert figures({"event": "warning", "time": 1.0, "step": 3, "message": "x"}) == {}


def test_unknown_and_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no clearml; choose from tensorboard"):
        open_sinks(["clearml"], tmp_path, CONFIG)
    for name, module in {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow.tracking"}.items():
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UsageError, match=rf"{name} is not installed .*halfbyte\[track\]"):
            open_sinks([name], tmp_path, CONFIG)


def test_ids_are_kept(tmp_path: Path) -> None:
    assert run_id(tmp_path, "wandb") is None
    assert run_id(tmp_path, "wandb", "a1") == "a1"
    assert run_id(tmp_path, "wandb", "b2") == "a1"
    assert run_id(tmp_path, "mlflow", "c3") == "c3"
    assert json.loads((tmp_path / "sinks.json").read_bytes()) == {"schema_version": 1, "wandb": "a1", "mlflow": "c3"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "run"
    train_with(path, "tensorboard", steps=4)
    train_with(path, "tensorboard", steps=6, resume=True)
    assert warnings_in(path) == []
    accumulator = EventAccumulator(str(path / "tensorboard"))
    accumulator.Reload()
    shown = {scalar.step: scalar.value for scalar in accumulator.Scalars("train/loss")}
    assert shown == pytest.approx(step_losses(path), rel=1e-6)
    assert [scalar.step for scalar in accumulator.Scalars("eval/loss")] == [2, 4, 6]
    assert {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"} <= set(accumulator.Tags()["scalars"])


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    path = tmp_path / "run"
    train_with(path, "wandb", steps=3)
    train_with(path, "wandb", steps=4, resume=True)
    assert warnings_in(path) == []
    folders = sorted((path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    identity = json.loads((path / "sinks.json").read_bytes())["wandb"]
    # Two runs begun within one second share the time in their name; wandb then appends a number after the id.
    assert all(identity in folder.name.split("-") for folder in folders)
    assert all(list(folder.glob("*.wandb")) for folder in folders)


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("mlflow")
    uri = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return uri


@pytest.mark.filterwarnings("ignore")
def test_mlflow_in_files(tmp_path: Path, mlflow_store: str) -> None:
    from mlflow.tracking import MlflowClient

    path = tmp_path / "run"
    train_with(path, "mlflow", steps=3)
    train_with(path, "mlflow", steps=4, resume=True)
    assert warnings_in(path) == []
    client = MlflowClient(mlflow_store)
    identity = json.loads((path / "sinks.json").read_bytes())["mlflow"]
    history = client.get_metric_history(identity, "train/loss")
    assert {metric.step: metric.value for metric in history} == pytest.approx(step_losses(path))
    run = client.get_run(identity)
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.02"


@pytest.mark.filterwarnings("ignore")
def test_trackio_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trackio = pytest.importorskip("trackio")
    path = tmp_path / "run"
    train_with(path, "trackio", steps=3)
    train_with(path, "trackio", steps=5, resume=True)
    assert capsys.readouterr().out == ""
    assert warnings_in(path) == []
    identity = json.loads((path / "sinks.json").read_bytes())["trackio"]
    logs = trackio.SQLiteStorage.get_logs("halfbyte", identity)
    shown = {log["step"]: log["train/loss"] for log in logs if "train/loss" in log}
    assert shown == pytest.approx(step_losses(path))
