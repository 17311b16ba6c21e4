"""A finished run leaves a row of figures, the next plan is made with it, and nothing of the user's is in it."""

import contextlib
import getpass
import json
import os
import platform
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.errors import Interrupted
from halfbyte.plan import calibration, history
from halfbyte.run import learning
from halfbyte.run.config import RunConfig
from halfbyte.run.run import resume, run
from halfbyte.train.events import read_events

from .conftest import write_rows


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_HISTORY", "1")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "halfbyte" / "history.sqlite"


def test_a_run_leaves_a_row(tiny_config: RunConfig, file: Path) -> None:
    finished = run(tiny_config)
    plan = json.loads((finished.path / "plan.json").read_text())
    result = finished.result
    (row,) = history.runs()
    assert row.method_name == "qlora"
    assert (row.quant, row.rank, row.dtype, row.optim) == ("nf4", 4, "float32", "adamw")
    assert row.steps == 6
    assert row.tokens == result["tokens"]
    assert (row.status, row.resumed) == ("completed", False)
    assert row.family == "llama"
    assert row.parameters > row.trainable_parameters == plan["trainable_parameters"] > 0
    assert row.said_bytes_p50 == plan["peak_memory_bytes"]["p50"]
    assert row.measured_bytes == result["peak_memory_bytes"]
    assert row.said_seconds_p95 == plan["seconds"]["p95"]
    assert row.measured_seconds == result["seconds"]
    measured = row.phases["measured"]["seconds"]
    assert sum(measured.values()) == pytest.approx(result["seconds"], rel=0.02, abs=0.02)
    assert measured["train"] == pytest.approx(result["update_seconds"], abs=1e-3)
    assert min(measured[phase] for phase in ("load", "train", "evaluate", "save")) > 0
    assert set(row.phases["predicted"]["bytes"]) >= {"load", "train", "evaluate"}


def test_the_start_says_what_is_to_come_and_the_last_second_is_counted(tiny_config: RunConfig, file: Path) -> None:
    path = run(tiny_config.replace(eval_steps=2, save_steps=3, save_minutes=None)).path
    plan = json.loads((path / "plan.json").read_text())
    start = read_events(path / "events.jsonl")[0]
    assert start["predicted"] == {"seconds": history.middles(plan["seconds_by_phase"]), "probed": plan["probed"]}
    assert (start["eval_every"], start["save_steps"], start["save_minutes"]) == (2, 3, None)
    assert start["final_evaluations"] == 1  # the base's
    whole = tiny_config.replace(method="full", output_dir=tiny_config.output_dir.with_name("full"), eval_split=0.0)
    assert read_events(run(whole).path / "events.jsonl")[0]["eval_every"] == 0


def test_a_rehearsal_corrects_the_time_left_and_its_prediction_is_what_is_kept(
    tiny_config: RunConfig, file: Path
) -> None:
    path = run(tiny_config.replace(rehearsal=True)).path
    plan = json.loads((path / "plan.json").read_text())
    (told,) = [event for event in read_events(path / "events.jsonl") if event["event"] == "rehearsal"]
    assert told["predicted"] == {"seconds": history.middles(plan["seconds_by_phase"]), "probed": True}
    (row,) = history.runs()
    assert row.probed_seconds == row.said_seconds_p50 == plan["seconds"]["p50"]
    scale = plan["calibration"]["time_scale"]
    assert row.predicted_seconds == pytest.approx(plan["before_probe"]["seconds"]["p50"] / scale)
    assert row.phases["probed"]["seconds"] == told["predicted"]["seconds"]
    assert row.phases["measured"]["seconds"]["rehearsal"] > 0


def test_the_next_plan_is_made_with_what_this_machine_showed(
    tiny_config: RunConfig, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "SHORTEST", 0.0)

    def planned(name: str) -> dict[str, Any]:
        made = run(tiny_config.replace(output_dir=tiny_config.output_dir.with_name(name), rehearsal=False))  # type: ignore[union-attr]
        plan: dict[str, Any] = json.loads((made.path / "plan.json").read_text())
        return plan

    first, second = planned("first"), planned("second")
    assert first["calibration"]["runs"] == calibration.of("cpu").runs
    assert second["calibration"]["runs"] == 1
    assert second["calibration"]["source"] == "refitted on 1 run of this machine"
    later, earlier = history.runs()
    assert later.predicted_bytes == pytest.approx(earlier.predicted_bytes, rel=1e-6)
    rounding = 0.05 * (1 + 1 / second["calibration"]["time_scale"])  # plan.json has tenths of seconds, scaled
    assert later.predicted_seconds == pytest.approx(earlier.predicted_seconds, abs=rounding)
    fitted = history.calibration(earlier.machine, "cpu")
    assert fitted is not None
    before = abs(earlier.said_seconds_p50 / earlier.measured_seconds - 1)
    assert abs(fitted.seconds(earlier.predicted_seconds).p50 / earlier.measured_seconds - 1) < before


def test_nothing_of_the_user_is_in_it(tiny_config: RunConfig, file: Path, tmp_path: Path) -> None:
    """Neither words of the rows nor names of data, models, folders, the user or the machine."""
    private = tmp_path / "Confidential Customer"
    private.mkdir()
    rows = [{"prompt": f"Zanzibar question {i}", "completion": f" Timbuktu answer {i}"} for i in range(30)]
    data = write_rows(private / "letters.jsonl", rows)
    model = private / "my-secret-model"
    model.symlink_to(Path(tiny_config.model), target_is_directory=True)
    config = tiny_config.replace(
        data=str(data), model=str(model), output_dir=private / "run", system_prompt=None, seed=4242
    )
    events: list[dict[str, Any]] = []
    path = run(config, events.append).path
    assert (path / "result.json").exists()
    assert not [event for event in events if event["event"] == "warning" and "history" in event["message"]]
    content = b"".join(part.read_bytes() for part in file.parent.iterdir()).lower()
    assert len(history.runs()) == 1
    words = ["zanzibar", "timbuktu", "confidential", "customer", "letters", "secret", Path(tiny_config.model).name]
    assert [word for word in words if word.lower().encode() in content] == []
    with contextlib.closing(sqlite3.connect(file)) as database:
        texts = [str(value) for row in database.execute("SELECT * FROM runs") for value in row]
    about = [str(tmp_path), str(Path.home()), platform.node(), getpass.getuser(), "/", "\\", "@", "jsonl", "4242"]
    assert [(text, word) for text in texts for word in about if word in text] == []


def test_a_history_that_cannot_be_written_is_one_warning(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in the way").write_text("")
    monkeypatch.setenv("HALFBYTE_HISTORY", "1")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "in the way"))
    events: list[dict[str, Any]] = []
    assert run(tiny_config, events.append).result["status"] == "completed"
    (told,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "not in the history" in told


def test_switched_off_it_leaves_nothing(tiny_config: RunConfig, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_HISTORY", "0")
    run(tiny_config)
    assert not file.parent.exists()


def test_interrupted_and_resumed_runs_are_not_learnt_from(tiny_config: RunConfig, file: Path) -> None:
    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run(tiny_config, interrupt)
    assert history.runs() == []
    assert tiny_config.output_dir is not None
    resume(tiny_config.output_dir)
    (row,) = history.runs()
    assert row.resumed
    assert not row.tells_memory
    assert not row.tells_time
    assert history.calibration(row.machine, row.device) is None


def test_a_plan_that_was_changed_by_hand_is_one_warning(tiny_config: RunConfig, file: Path) -> None:
    def spoil(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "step" and event["step"] == 2:
            (tiny_config.output_dir / "plan.json").write_text('{"peak_memory_bytes": 1, "seconds": 2}')  # type: ignore[operator]

    events: list[dict[str, Any]] = []
    run(tiny_config, spoil)
    (told,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "plan.json" in told
    assert history.runs() == []


def _older(plan: dict[str, Any]) -> str:
    """As version 1 of plan.json was: phases with one figure each."""
    phases = {name: {k: v["p50"] for k, v in plan[name].items()} for name in ("seconds_by_phase", "memory_by_phase")}
    return json.dumps({k: v for k, v in plan.items() if k not in ("calibration", "probed")} | phases)


@pytest.mark.parametrize("spoil", [_older, lambda plan: "{", lambda plan: '{"seconds_by_phase": []}', lambda plan: "7"])
def test_a_run_is_resumed_whatever_its_plan_says(
    tiny_config: RunConfig, file: Path, spoil: Callable[[dict[str, Any]], str]
) -> None:
    """Nothing but what is shown and learnt depends on plan.json."""

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    assert tiny_config.output_dir is not None
    with pytest.raises(Interrupted):
        run(tiny_config, interrupt)
    plan = tiny_config.output_dir / "plan.json"
    made = json.loads(plan.read_text())
    plan.write_text(spoil(made))
    result = resume(tiny_config.output_dir).result
    assert (result["status"], result["step"]) == ("completed", 6)
    expected = {name: made[name] for name in ("peak_memory_bytes", "seconds")}
    assert result["predicted"] == (expected if spoil is _older else {})
    assert history.runs() == []


def test_accuracy_on_the_command_line(
    tiny_config: RunConfig, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfbyte.cli import main

    codes: list[Any] = []

    def said(*words: str) -> str:
        try:
            main(["plan", "--accuracy", *words])
        except SystemExit as leaving:
            codes.append(leaving.code)
        return capsys.readouterr().out

    assert said() == "no finished run on this machine yet: nothing to compare\n"
    assert json.loads(said("--json"))["runs"] == 0
    run(tiny_config)
    capsys.readouterr()
    monkeypatch.setattr(history, "SHORTEST", 0.0)
    found = json.loads(said("--json"))
    assert found["runs"] == 1
    assert found["all"]["runs"] == 1
    lines = said().splitlines()
    assert lines[0].split()[0] == "method"
    assert lines[1].split()[:2] == ["qlora", "1"]
    assert any(line.startswith("furthest off in time: qlora on llama") for line in lines)
    monkeypatch.setenv("HALFBYTE_HISTORY", "0")
    assert said().startswith("the history is switched off")
    monkeypatch.setenv("HALFBYTE_HISTORY", "1")
    file.write_bytes(b"no database at all, sorry " * 100)
    assert said().startswith("the history cannot be used")
    assert not any(codes)


def test_the_row_of_a_foreign_architecture_names_no_more_than_it(tiny_config: RunConfig) -> None:
    found = SimpleNamespace(source=SimpleNamespace(config={"model_type": "My Company/secret arch"}))
    assert learning._family(found) == "other"  # type: ignore[arg-type]


def test_a_peak_of_something_else_is_not_the_runs(
    tiny_config: RunConfig, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a notebook held before: the process's peak says nothing of this run, the time still does."""
    monkeypatch.setattr(history, "first_of_process", lambda: True)
    for before, tells in ((learning.FRESH - 1, True), (learning.FRESH, False)):
        monkeypatch.setattr(learning, "process_memory", lambda peak=before: (0, peak))
        run(tiny_config, overwrite=True)
        assert history.runs()[0].tells_memory is tells
    words = ("from halfbyte.run.learning import untouched", "import halfbyte.run.run", "print(untouched())")
    code = "; ".join((*words, "held = b'1' * 10**9", words[-1]))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["True", "False"]
