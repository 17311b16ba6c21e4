"""Checkpoint folders: whole or not there, rotated, checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.errors import DoesNotFit, HalfbyteError
from halfbyte.files import sha256_file
from halfbyte.tensorfile import Planned
from halfbyte.train import checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
STATE: dict[str, Any] = {"train": {"x": 1}}


def save(run: Path, step: int, **changes: Any) -> Path:
    return checkpoint.save(run, step, TENSORS, [Planned.of("step", torch.tensor(step))], STATE, **changes)


def test_round_trip_and_manifest(tmp_path: Path) -> None:
    def extras(folder: Path) -> None:
        (folder / "nested").mkdir()
        (folder / "nested" / "adapter_config.json").write_text("{}")

    folder = save(tmp_path, 7, save_extras=extras)
    loaded = checkpoint.load(folder)
    assert all(torch.equal(loaded.trainable[name], tensor) for name, tensor in TENSORS.items())
    assert int(loaded.optimizer["step"]) == 7
    assert loaded.state == {"schema_version": 1, "step": 7, **STATE}
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert set(manifest["files"]) == {
        "trainable.safetensors",
        "optimizer.safetensors",
        "state.json",
        "nested/adapter_config.json",
    }
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_views_of_one_storage_are_saved_apart(tmp_path: Path) -> None:
    whole = torch.arange(8.0)
    folder = checkpoint.save(tmp_path, 1, {"a": whole[:4], "b": whole[4:], "t": whole.view(2, 4).t()}, [], STATE)
    loaded = checkpoint.load(folder).trainable
    assert torch.equal(loaded["t"], whole.view(2, 4).t())
    assert torch.equal(loaded["b"], whole[4:])


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DoesNotFit, match=r"the disk became full while .*checkpoint-1 was written"):
        save(tmp_path, 1, save_extras=fail)
    assert list(tmp_path.iterdir()) == []


def test_too_small_a_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))  # type: ignore[attr-defined]
    with pytest.raises(DoesNotFit, match=r"the checkpoint of step 3 needs 0\.00 GB"):
        save(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_the_same_step_again_replaces(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    (folder / "state.json").write_text("damaged")
    save(tmp_path, 2)
    checkpoint.verify(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_rotation_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 20):
        save(tmp_path, step)
    removed = checkpoint.rotate(tmp_path, keep=2, best_step=2)
    assert [checkpoint.step_of(folder) for folder in removed] == [1, 3]
    assert [checkpoint.step_of(folder) for folder in checkpoint.list_checkpoints(tmp_path)] == [2, 10, 20]
    checkpoint.rotate(tmp_path, keep=1, best_step=20)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]


def test_damage_does_not_count_among_those_to_keep(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoint-2" / "optimizer.safetensors").write_bytes(b"")
    told: list[str] = []
    found = checkpoint.load_latest(tmp_path, told.append)
    assert found is not None
    assert found.path.name == "checkpoint-1"
    assert "optimizer.safetensors has 0 bytes" in told[0]
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-1"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path, print) is None


def test_a_newer_format_is_not_called_damaged(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(HalfbyteError, match="schema_version 99") as caught:
        checkpoint.load_latest(tmp_path, print)
    assert not isinstance(caught.value, checkpoint.Damaged)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    """A pickle in a safetensors file's place, with a manifest that vouches for it."""
    folder = save(tmp_path, 1)
    torch.save(TENSORS, folder / "trainable.safetensors")
    manifest = json.loads((folder / "manifest.json").read_bytes())
    path = folder / "trainable.safetensors"
    manifest["files"]["trainable.safetensors"] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.Damaged, match="is not a checkpoint of training"):
        checkpoint.load(folder)


def test_names_that_are_not_checkpoints_are_ignored(tmp_path: Path) -> None:
    for name in ("checkpoint-", "checkpoint-x", "checkpoint-1-backup", "damaged-checkpoint-2"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    assert checkpoint.list_checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match="not named like"):
        checkpoint.step_of(tmp_path / "checkpoint-x")
