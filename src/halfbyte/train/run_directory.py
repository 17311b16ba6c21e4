"""The folder of one run: its names, its lock, and the rules for starting in it."""

import contextlib
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Self

from halfbyte.errors import UsageError
from halfbyte.train.checkpoint import list_checkpoints, remove_leftovers
from halfbyte.train.lock import Lock, Owner, alive

EVENTS = "events.jsonl"
CONFIG = "run.yaml"
PLAN = "plan.json"
RESULT = "result.json"
LOCK = "run.lock"


class RunDirectory:
    """A run's folder, held by this process.

    with RunDirectory.create(path) as run: ...      a new run; an existing one is refused (or removed: overwrite)
    with RunDirectory.resume(path) as run: ...      an existing run that nobody is writing
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = Lock(path / LOCK)
        self.was_there = path.is_dir()

    @classmethod
    def create(cls, path: Path, overwrite: bool = False) -> Self:
        """A folder for a new run, locked. An existing run is a UsageError that names the ways on, or with `overwrite`
        is removed; a folder with other things in it is never touched."""
        run = cls(path)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file: choose another output_dir")
        if path.is_dir() and not _holds_nothing(path):
            if not is_run(path):
                raise UsageError(f"{path} is not empty and holds no run of halfbyte: choose another output_dir")
            if not overwrite:
                raise UsageError(
                    f"{path} already holds a run: continue it with `halfbyte resume {path}`, replace it with "
                    "--overwrite, or choose another output_dir"
                )
            if Path.cwd().resolve().is_relative_to(path.resolve()):
                raise UsageError(f"--overwrite would delete {path}, in which this command runs: choose another folder")
        run.lock.acquire()
        _clear(path)
        return run

    @classmethod
    def resume(cls, path: Path) -> Self:
        """An existing run, locked, leftovers of a killed process removed."""
        if not is_run(path):
            raise UsageError(f"{path} holds no run to resume: it has neither {CONFIG} nor {EVENTS}")
        run = cls(path)
        run.lock.acquire()
        remove_leftovers(path)
        return run

    @property
    def events(self) -> Path:
        return self.path / EVENTS

    def discard(self) -> None:
        """Remove a new run that never began: the folder is as empty as it was found, or not there."""
        _clear(self.path)
        self.close()
        if not self.was_there:
            with contextlib.suppress(OSError):  # another process began here in between
                self.path.rmdir()

    def close(self) -> None:
        self.lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def is_run(path: Path) -> bool:
    """Is this the folder of a run (also one that stopped before its first event)?"""
    return any((path / name).is_file() for name in (CONFIG, EVENTS)) or bool(list_checkpoints(path))


def _holds_nothing(path: Path) -> bool:
    """Empty, but for what a process leaves that was killed before it had begun."""
    return all(entry.name == LOCK or fnmatch(entry.name, f".{LOCK}.*.partial") for entry in path.iterdir())


def running(path: Path) -> Owner | None:
    """The living process that is writing this run, or None."""
    return alive(path / LOCK)


def _clear(path: Path) -> None:
    """Remove everything but the lock, which this process holds. What makes the folder a run goes last, so that after a
    crash in between it still is one."""
    order = {EVENTS: 1, CONFIG: 2}
    for entry in sorted(path.iterdir(), key=lambda entry: order.get(entry.name, 0)):
        if entry.name == LOCK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
