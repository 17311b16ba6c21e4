"""Starting in a folder: new, existing, overwritten, none of ours."""

import json
from pathlib import Path

import pytest

from halfbyte.errors import UsageError
from halfbyte.train.run_directory import RunDirectory, is_run, running


def make_run(path: Path) -> Path:
    (path / "checkpoint-5").mkdir(parents=True)
    (path / "events.jsonl").write_text("")
    (path / "run.yaml").write_text("model: x\n")
    return path


def test_new_folders_are_made_and_locked(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "a" / "b") as run:
        assert running(run.path) is not None
        assert not is_run(run.path)
        with pytest.raises(UsageError, match="being written by"):
            RunDirectory.create(run.path)
    assert running(tmp_path / "a" / "b") is None


def test_an_existing_run_is_kept_and_the_ways_on_are_named(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with pytest.raises(UsageError, match=rf"halfbyte resume {path}.*--overwrite") as caught:
        RunDirectory.create(path)
    assert caught.value.exit_code == 2
    assert (path / "checkpoint-5").is_dir()
    with RunDirectory.create(path, overwrite=True):
        assert [entry.name for entry in path.iterdir()] == ["run.lock"]


def test_foreign_folders_and_files_are_never_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds no run of halfbyte"):
            RunDirectory.create(tmp_path / "notes", overwrite)
        with pytest.raises(UsageError, match="is a file"):
            RunDirectory.create(tmp_path / "notes" / "thesis.tex", overwrite)
    path = make_run(tmp_path / "run")
    monkeypatch.chdir(path)
    with pytest.raises(UsageError, match="in which this command runs"):
        RunDirectory.create(path, overwrite=True)
    assert is_run(path)


def test_overwriting_a_living_run_is_refused(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with RunDirectory.resume(path), pytest.raises(UsageError, match="being written by"):
        RunDirectory.create(path, overwrite=True)
    assert (path / "checkpoint-5").is_dir()


def test_resume_needs_a_run_and_cleans_up_after_a_kill(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run to resume"):
        RunDirectory.resume(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    path = make_run(tmp_path / "run")
    (path / ".checkpoint-6.partial-77").mkdir()
    (path / ".checkpoint-4.discarded-77").mkdir()
    (path / ".result.json.abc.partial").write_text("{")
    (path / "run.lock").write_text(json.dumps({"pid": 2**22 - 1, "started": 1.0, "host": "x"}))
    import os

    os.utime(path / "run.lock", (0, 0))
    with RunDirectory.resume(path) as run:
        names = sorted(entry.name for entry in run.path.iterdir())
    assert names == ["checkpoint-5", "events.jsonl", "run.lock", "run.yaml"]


def test_what_died_before_it_began_is_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("{}")
    (tmp_path / ".run.lock.xyz.partial").write_text("")
    with RunDirectory.create(tmp_path):
        assert [entry.name for entry in tmp_path.iterdir()] == ["run.lock"]
