"""Kills whatever writes a final file at each of its file operations, and looks at what is left.

    python tests/kill.py [CASE ...] [--every N]     a line a case: at how many places it was killed, what was wrong

A case is a function that writes files into a folder. It runs in forked processes under `kill.c`, which sees every call
that changes a file (Python's, Rust's, C++'s) and, at the k-th:

    kill     SIGKILL; a write has put half of its bytes down before
    full     no space on the disk, from this call on
    denied   no right to create, rename or open for writing, from this call on

Afterwards a unit (a file, or a folder that is one thing) must be absent, as it was before, or as it is when all goes
well; what else lies there must have a temporary name. After a kill the same work must succeed; a full disk and a
missing right must be one line of a HalfbyteError and leave nothing. The trace of an undisturbed run is checked for what
a kill cannot show: that files are synced before they are renamed, and folders after.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
COUNT, KILL, FULL, DENIED = range(4)
MODES = {"kill": KILL, "full": FULL, "denied": DENIED}
TEMPORARY = (".partial", ".old", ".discarded")


@dataclass(frozen=True)
class Case:
    """Something that writes final files.

    prepare   fills the folder with what is there before (once)
    operate   writes
    units     folders that are one thing; every other file is a unit by itself
    whole     says what a unit that is neither as before nor as after is worth: None if it is whole (a new time stamp
              makes it differ), else what is wrong; without it, it is damaged
    """

    name: str
    prepare: Callable[[Path], None]
    operate: Callable[[Path], None]
    units: tuple[str, ...] = ()
    whole: Callable[[Path], str | None] | None = None


@dataclass
class Report:
    """What was found about a case: `points` of each mode, and what was wrong."""

    name: str
    operations: int = 0
    points: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        tried = ", ".join(f"{count} x {mode}" for mode, count in self.points.items())
        return f"{self.name}: {self.operations} file operations; {tried}; {len(self.problems)} problems"


# -- running under kill.c ---------------------------------------------------------------------------------------------


def build(folder: Path) -> Path | None:
    """The library to preload, or None without a C compiler (or on another system than Linux)."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "kill.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "kill.c", "-ldl"], check=True)
    return library


def examine(case: Case, library: Any, every: int = 1) -> Report:
    """Try a case at every `every`-th of its file operations (renames, removals and syncs at all of them)."""
    report = Report(case.name)
    memory = Path("/dev/shm")  # a thousand syncs
    with tempfile.TemporaryDirectory(prefix="kill-", dir=memory if memory.is_dir() else None) as name:
        base = Path(name)
        before, work, notes = base / "before", base / "work", base / "notes"
        before.mkdir()
        case.prepare(before)
        old = snapshot(case, before)
        shutil.copytree(before, work, symlinks=True)
        case.operate(work)  # in this process, so that what it imports and caches is there after each fork
        shutil.rmtree(work)
        shutil.copytree(before, work, symlinks=True)
        code, trace = _attempt(case, library, work, notes, COUNT, 0)
        if code != 0:
            raise RuntimeError(f"{case.name} fails by itself: {notes.read_text()}")
        new = snapshot(case, work)
        report.operations = len(trace)
        report.problems += unsynced(trace, work)
        chosen = [k for k, line in enumerate(trace, 1) if k % every == 0 or line[0] in ("rename", "remove", "fsync")]
        for mode in MODES:
            places = chosen if mode == "kill" else [k for k in chosen if trace[k - 1][0] != "remove"]
            for k in places:
                shutil.rmtree(work)
                shutil.copytree(before, work, symlinks=True)
                code, _ = _attempt(case, library, work, notes, MODES[mode], k)
                said = notes.read_text() if notes.exists() else ""
                place = f"{mode} at {k} ({' '.join(trace[k - 1]).replace(str(work), '')})"
                wrong = [*_judge(case, mode, code, said), *_left(case, mode, work, old, new, code == 0)]
                if mode == "kill" and not wrong:
                    again, _ = _attempt(case, library, work, notes, COUNT, 0)
                    wrong += [f"the rerun failed: {notes.read_text()}"] if again else []
                    wrong += _left(case, "again", work, old, new, True)
                report.problems += [f"{place}: {problem}" for problem in wrong]
            report.points[mode] = len(places)
    return report


def _attempt(case: Case, library: Any, work: Path, notes: Path, mode: int, at: int) -> tuple[int, list[list[str]]]:
    """Run the case in a forked process; (exit code, negative for a signal; the trace)."""
    notes.unlink(missing_ok=True)
    with tempfile.TemporaryFile() as trace:
        child = os.fork()
        if child == 0:
            _child(case, library, work, notes, mode, at, trace.fileno())
        _, status = os.waitpid(child, 0)
        trace.seek(0)
        lines = [line.split("\t") for line in trace.read().decode().splitlines()]
    return os.waitstatus_to_exitcode(status), lines


def _child(case: Case, library: Any, work: Path, notes: Path, mode: int, at: int, trace: int) -> None:
    """Never returns. Exit codes: 0 done, 10 a HalfbyteError (its line is in `notes`), 11 anything else."""
    from halfbyte.errors import HalfbyteError

    code = 0
    try:
        library.hb_arm(os.fsencode(work), mode, at, trace)
        try:
            case.operate(work)
        finally:
            library.hb_disarm()
    except HalfbyteError as error:
        notes.write_text(str(error))
        code = 10
    except BaseException as error:
        notes.write_text(f"{type(error).__name__}: {error}")
        code = 11
    finally:
        os._exit(code)


# -- what is right ----------------------------------------------------------------------------------------------------


def snapshot(case: Case, folder: Path) -> dict[str, str]:
    """Every unit of a folder by name, with a digest of what is in it; temporary files are left out."""
    found: dict[str, str] = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if not _is_temporary(name):
            unit = next((u for u in case.units if name == u or name.startswith(u + "/")), name)
            digest = hashlib.sha256(f"{found.get(unit, '')}|{name}|".encode() + path.read_bytes()).hexdigest()
            found[unit] = digest
    return found


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())


def _is_temporary(name: str) -> bool:
    return any(part.startswith(".") and any(mark in part for mark in TEMPORARY) for part in name.split("/"))


def _judge(case: Case, mode: str, code: int, said: str) -> list[str]:
    if code == 11:
        return [f"not one line for the user: {said}"]
    if code == 10 and "\n" in said:
        return [f"more than a line: {said}"]
    if mode == "kill" and code not in (0, -signal.SIGKILL):
        return [f"ended with {code}: {said}"]
    if mode == "full" and code == 10 and "full" not in said and "No space" not in said:
        return [f"does not say that the disk is full: {said}"]
    return []


def _left(case: Case, mode: str, work: Path, old: dict[str, str], new: dict[str, str], done: bool) -> list[str]:
    """What is wrong with what lies in the folder."""
    problems = []
    now = snapshot(case, work)
    for unit in sorted(old.keys() | new.keys() | now.keys()):
        digest = now.get(unit)
        if digest in (old.get(unit), new.get(unit)) and not (done and digest != new.get(unit) and case.whole is None):
            continue
        if digest is None:
            # A folder's old content steps aside for the new one: for a moment there is neither.
            if done or unit not in case.units:
                problems.append(f"{unit} is gone")
            continue
        wrong = case.whole(work / unit) if case.whole is not None else "is neither the old one nor the new one"
        if wrong is not None:
            problems.append(f"{unit}: {wrong}")
    if mode in ("full", "denied"):
        problems += [f"{path.name} is left" for path in work.rglob("*") if _is_temporary(path.name) and mode == "full"]
    return problems


def unsynced(trace: list[list[str]], work: Path) -> list[str]:
    """Renames to a final name of files that were not synced since they were written, final names that were written in
    place, and folders that were not synced after the last such rename."""
    problems, dirty, renamed = [], set[str](), set[str]()
    for what, path, other in trace:
        if what in ("write", "create", "truncate"):
            dirty.add(path)
            if not _is_temporary(os.path.relpath(path, work)):
                problems.append(f"{os.path.relpath(path, work)} is written under its final name")
        elif what == "fsync":
            dirty.discard(path)
            renamed.discard(path)
        elif what == "rename":
            # The Rust library of safetensors renames by a system call of its own: what is not there is not meant.
            moved = {name for name in dirty if name == path or name.startswith(path + "/")}
            there = {other + name.removeprefix(path) for name in moved}
            dirty = (dirty - moved) | there
            if not _is_temporary(os.path.relpath(other, work)):
                renamed.add(str(Path(other).parent))
                late = [os.path.relpath(name, work) for name in there if Path(name).exists()]
                problems += [f"{name} is renamed to its place before it is synced" for name in late]
    problems += [f"folder {os.path.relpath(name, work)} is not synced after a rename in it" for name in renamed]
    return sorted(set(problems))


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--every", type=int, default=1, help="writes and creations: only each N-th")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    if "HALFBYTE_KILL" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            library = build(Path(folder))
            if library is None:
                print("no C compiler, or not Linux", file=sys.stderr)
                return 77
            paths = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
            preloaded = {"LD_PRELOAD": str(library), "HALFBYTE_KILL": str(library), "PYTHONPATH": paths}
            return subprocess.run(
                [sys.executable, __file__, *words], env=os.environ | preloaded, check=False
            ).returncode
    from tests.kill_cases import cases, naive

    known = {case.name: case for case in cases()}
    wrong = 0
    for name in given.cases or known:
        with contextlib.redirect_stdout(sys.stderr):
            report = examine((known | {"naive": naive()})[name], ctypes.CDLL(os.environ["HALFBYTE_KILL"]), given.every)
        wrong += len(report.problems)
        print(json.dumps(report.__dict__) if given.json else "\n  ".join([str(report), *report.problems]), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
