"""Checkpoints that are whole or not there.

    RUN/checkpoint-<step>/
      trainable.safetensors    the trained tensors exactly as training holds them, by parameter name
      optimizer.safetensors    the optimizer's state
      state.json               position, counters, environment: `TrainState` and what it was trained with
      ...                      what the run adds (the adapter in PEFT's format)
      manifest.json            bytes and SHA-256 of every file, written last

A checkpoint is written into a folder with a temporary name, every file synced to the disk, then the manifest, then the
folder renamed and its parent synced: after a crash or a power cut at any moment it is complete or invisible. Loading
checks every file against the manifest; a damaged checkpoint is named and the one before it is used. No pickles.

There is no random-number state here, as there is none to restore: the loop seeds torch's generators with
(seed, step, micro-batch) before each micro-batch.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.files import (
    fsync,
    fsync_folder,
    one_line,
    require_free_space,
    sha256_file,
    take_place,
    write_atomic,
)
from halfbyte.rawfile import CutOff
from halfbyte.tensorfile import Planned, TensorFile, largest_items_first, write_file

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TRAINABLE = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_REST = 1 << 20
"""Room asked for beside the tensors: JSON, and what the run adds is small or a copy of the trained tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its tensors, on the CPU, each read when it is asked for, and the content of state.json."""

    path: Path
    trainable: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any]


class Damaged(HalfbyteError):
    """A checkpoint that is not what its manifest says."""


def folder_of(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder} is not named like a checkpoint")
    return int(match[1])


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoint folders, oldest first; not checked."""
    return sorted((p for p in run.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)), key=step_of)


def bytes_needed(trainable: Mapping[str, Tensor], optimizer: Sequence[Planned]) -> int:
    """What one checkpoint takes on the disk, the run's own copy of the trained tensors included."""
    return 2 * sum(t.nbytes for t in trainable.values()) + sum(t.nbytes for t in optimizer) + _REST


def save(
    run: Path,
    step: int,
    trainable: Mapping[str, Tensor],
    optimizer: Sequence[Planned],
    state: Mapping[str, object],
    save_extras: Callable[[Path], None] | None = None,
) -> Path:
    """Write checkpoint-<step> below `run`; raises DoesNotFit before it writes if the disk is too small.

    optimizer   its state, tensor by tensor; none has to be in memory before it is written, or whole
    """
    require_free_space(run, bytes_needed(trainable, optimizer), f"the checkpoint of step {step}")
    target = folder_of(run, step)
    partial = run / f".{target.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    with one_line(target), _removed_unless_done(partial):
        partial.mkdir(parents=True)
        if save_extras is not None:
            save_extras(partial)
        weights = [Planned.of(name, tensor) for name, tensor in trainable.items()]
        write_file(partial / TRAINABLE, largest_items_first(weights))
        write_file(partial / OPTIMIZER, largest_items_first(optimizer))
        write_atomic(partial / STATE, _json({"schema_version": SCHEMA_VERSION, "step": step, **state}))
        files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
        for path in files:
            fsync(path)
        listed = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            for path in files
        }
        manifest = {"schema_version": SCHEMA_VERSION, "step": step, "time": round(time.time(), 3), "files": listed}
        for path in partial.rglob("*"):
            if path.is_dir():
                fsync_folder(path)
        write_atomic(partial / MANIFEST, _json(manifest))
        # A folder of that name can only be a damaged checkpoint or the same step again, and goes.
        take_place(partial, target, target.with_name(f".{target.name}.discarded-{os.getpid()}"))
    return target


@contextmanager
def _removed_unless_done(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def verify(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest and return the manifest; `Damaged` names the first difference."""
    manifest = _read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != expected["bytes"]:
            raise Damaged(f"{path} has {path.stat().st_size:,} bytes where the manifest says {expected['bytes']:,}")
        if sha256_file(path) != expected["sha256"]:
            raise Damaged(f"{path} was altered: its SHA-256 is not the manifest's")
    return manifest


def load(folder: Path) -> Checkpoint:
    """Verify a checkpoint and open it."""
    verify(folder)
    try:
        state = json.loads((folder / STATE).read_bytes())
        return Checkpoint(folder, TensorFile(folder / TRAINABLE), TensorFile(folder / OPTIMIZER), state)
    except (OSError, ValueError, CutOff) as error:
        raise Damaged(f"{folder} is not a checkpoint of training: {error}") from error


def load_latest(run: Path, tell: Callable[[str], None]) -> Checkpoint | None:
    """The last whole checkpoint of a run, or None where there is none at all.

    Each damaged one on the way is told (`tell`) with what is wrong with it, and renamed, so that it is not counted
    among the checkpoints to keep. If none is whole, that is an error, as training from the start again must be the
    user's decision.
    """
    problems: list[tuple[Path, str]] = []
    for folder in reversed(list_checkpoints(run)):
        try:
            checkpoint = load(folder)
        except Damaged as error:
            problems.append((folder, str(error)))
            continue
        for damaged, problem in problems:
            aside = damaged.with_name(f"damaged-{damaged.name}")
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
            tell(f"{problem}; going on from {folder.name}, the damaged one is now {aside.name}")
        return checkpoint
    if problems:
        raise Damaged(f"no checkpoint of {run} is whole ({problems[0][1]}): start again with --overwrite")
    return None


def rotate(run: Path, keep: int, best_step: int | None) -> list[Path]:
    """Remove all but the last `keep` checkpoints and the best one; returns what went.

    A folder is renamed before it is emptied, so that a crash leaves no half-deleted checkpoint under its name.
    """
    removed = []
    for folder in list_checkpoints(run)[:-keep]:
        if step_of(folder) != best_step:
            doomed = folder.with_name(f".{folder.name}.discarded-{os.getpid()}")
            with one_line(folder):
                folder.rename(doomed)
                shutil.rmtree(doomed)
            removed.append(folder)
    return removed


def remove_leftovers(run: Path) -> None:
    """Delete what a killed process left behind: partial and discarded checkpoints, partial files. The caller holds the
    run's lock, so nobody is writing them."""
    for pattern in (".checkpoint-*.partial-*", ".checkpoint-*.discarded-*"):
        for folder in run.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
    for path in run.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        files, version = manifest["files"], manifest["schema_version"]
        if not {TRAINABLE, OPTIMIZER, STATE} <= files.keys():
            raise Damaged(f"{path} does not list the files of a checkpoint")
        for entry in files.values():
            entry["bytes"], entry["sha256"]
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is not a manifest: {error}") from error
    if version != SCHEMA_VERSION:
        raise HalfbyteError(f"{path} has schema_version {version}; this halfbyte reads {SCHEMA_VERSION}")
    return dict(manifest)


def _json(value: object) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"
