"""Running cells: each stage of one in a process of its own, one after another or side by side; killed ones go on.

The comparison holds the other end of a worker's stdin, so that a worker never outlives it for long. A worker that ends
by a signal (out of memory, somebody's kill) is started once more and goes on from its last checkpoint; a second time is
a failure, and the comparison goes on without the cell.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from halfbyte.compare import energy
from halfbyte.compare.design import Cell
from halfbyte.compare.others import Others
from halfbyte.compare.worker import FAILED
from halfbyte.errors import HalfbyteError
from halfbyte.files import one_line, write_atomic
from halfbyte.train.run_directory import running

POLL_SECONDS = 0.1
SAVING_SECONDS = 600.0
"""How long a run that was asked to stop may take to save."""
ORPHAN_SECONDS = 120.0
"""How long a worker of a comparison that was killed is waited for."""
ATTEMPTS = 2

Stage = tuple[str, Mapping[str, Any]]
"""A worker's stage, and what its job needs beside the cell's folder."""
Tell = Callable[[dict[str, Any]], None]


@dataclass
class Active:
    """A worker at work. `log_begins`: bytes that workers of before left in its log."""

    cell: Cell
    stage: str
    process: subprocess.Popen[bytes]
    log: Path
    log_begins: int
    meter: energy.Meter | None
    others: Others | None = None


@dataclass(frozen=True)
class Around:
    """What was measured around a run by the comparison; None where it is not known.

    joules   energy of the machine
    others   the share of the processor that other work took
    """

    joules: float | None = None
    others: float | None = None


UNKNOWN = Around()


@dataclass
class Outcome:
    """How the cells ended: messages of those that failed by id, and what was measured around those that ran here."""

    failed: dict[str, str] = field(default_factory=dict)
    around: dict[str, Around] = field(default_factory=dict)


def run_cells(
    cells: Sequence[Cell],
    root: Path,
    next_stage: Callable[[Cell], Stage | None],
    finish: Callable[[Cell, Around], None],
    jobs: int,
    memory: float,
    tell: Tell,
) -> Outcome:
    """Bring every cell to its end; `next_stage` says from the disk what is left of one, `finish` closes it.

    memory   bytes that the planned peaks (p95) of cells side by side may take together
    tell     hears of every cell that begins, ends or fails

    Raises KeyboardInterrupt when it was asked to stop, with all workers ended and saved.
    """
    waiting, active, outcome = list(cells), list[Active](), Outcome()
    attempts: dict[tuple[str, str], int] = {}
    done: set[str] = set()
    begun_from = {cell.id for cell in cells}  # what another cell goes on from and is not here was finished before
    in_all = len(cells)

    def begin(cell: Cell) -> None:
        """Start what is left of a cell, or close it."""
        stage = next_stage(cell)
        if stage is None:
            finish(cell, outcome.around.get(cell.id, UNKNOWN))
            done.add(cell.id)
            tell({"event": "cell", "status": "done", "cell": cell, "done": len(done), "in_all": in_all})
            return
        attempts[cell.id, stage[0]] = attempts.get((cell.id, stage[0]), 0) + 1
        tell({"event": "cell", "status": stage[0], "cell": cell, "done": len(done), "in_all": in_all})
        active.append(start(cell, root, stage, metered=jobs == 1))

    def fail(cell: Cell, message: str) -> None:
        outcome.failed[cell.id] = message
        tell({"event": "cell", "status": "failed", "cell": cell, "message": message})

    with _terminated_like_interrupted():
        try:
            while waiting or active:
                for cell in list(waiting):
                    if cell.source in outcome.failed.keys() - done:
                        waiting.remove(cell)
                        fail(cell, "the run that it goes on from failed")
                    elif cell.source in begun_from - done:
                        continue
                    elif len(active) < jobs and _fits(cell, active, memory):
                        waiting.remove(cell)
                        begin(cell)
                for one in list(active):
                    code = one.process.poll()
                    if one.meter is not None:
                        one.meter.tick()
                    if one.others is not None:
                        one.others.tick()
                    if code is None:
                        continue
                    active.remove(one)
                    _close(one)
                    if one.stage == "train":
                        joules = None if one.meter is None else one.meter.joules
                        outcome.around[one.cell.id] = Around(joules, None if one.others is None else one.others.share)
                    if code == 0 and not _again(one, next_stage(one.cell)):
                        begin(one.cell)
                    elif code == 0:
                        fail(one.cell, "it ended, and is not what was asked for: rows, model or run.yaml were changed")
                    elif (code < 0 or code == 4) and attempts[one.cell.id, one.stage] < ATTEMPTS:
                        tell({"event": "cell", "status": "again", "cell": one.cell, "message": _ended(code)})
                        begin(one.cell)
                    else:
                        fail(one.cell, _message(one, code))
                        if one.stage != "train":
                            done.add(one.cell.id)  # its run is finished, and another one may go on from it
                if active:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            _stop(active)
            raise
    return outcome


def _again(one: Active, left: Stage | None) -> bool:
    """Whether what a worker just did is still to be done, which doing it once more would not change."""
    return left is not None and left[0] == one.stage


def _fits(cell: Cell, active: Sequence[Active], memory: float) -> bool:
    """Whether its planned memory fits beside what runs; alone it always may."""
    return not active or sum(one.cell.peak_p95 for one in active) + cell.peak_p95 <= memory


def start(cell: Cell, root: Path, stage: Stage, metered: bool) -> Active:
    """A worker for one stage of a cell. HalfbyteError where a process of an earlier comparison does not let go."""
    name, more = stage
    path = root / "cells" / cell.id
    wait_for_orphan(path)
    logs = root / "logs"
    job, log = logs / f"{cell.id}-{name}.json", logs / f"{cell.id}-{name}.log"
    write_atomic(job, json.dumps({"stage": name, "folder": str(path), **more}) + "\n")
    environment = dict(os.environ)
    if not environment.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
        environment["OMP_WAIT_POLICY"] = "PASSIVE"  # as the command line does (`cli.wait_without_spinning`)
    meter = energy.Meter() if metered else None
    with one_line(log), log.open("ab") as out:
        begins = out.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "halfbyte.compare.worker", str(job)],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal is for the comparison, which asks its workers once
        )
    return Active(cell, name, process, log, begins, meter, Others(process.pid))


def wait_for_orphan(path: Path) -> None:
    """Wait until a worker that lost its comparison has saved and left this run."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (owner := running(path)) is not None:
        if time.monotonic() > deadline:
            raise HalfbyteError(f"{path} is still being written by process {owner.pid}: wait for it, or stop it")
        time.sleep(POLL_SECONDS)


def _close(one: Active) -> None:
    if one.process.stdin is not None:
        one.process.stdin.close()


def _stop(active: Sequence[Active]) -> None:
    """Ask all workers to save and leave; a second interruption kills them."""
    for one in active:
        with contextlib.suppress(ProcessLookupError):
            one.process.terminate()
    try:
        for one in active:
            one.process.wait(SAVING_SECONDS)
    except BaseException:
        for one in active:
            one.process.kill()
            one.process.wait()
        raise
    finally:
        for one in active:
            _close(one)


def _ended(code: int) -> str:
    if code == 4:
        return "it was asked to stop from outside"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"it was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"it left with code {code}"


def _message(one: Active, code: int) -> str:
    """Why a worker failed: its own line, or how it ended."""
    lines = one.log.read_bytes()[one.log_begins :].decode(errors="replace").splitlines()
    said = next((line.removeprefix(FAILED) for line in reversed(lines) if line.startswith(FAILED)), None)
    if said is not None and code > 0:
        return said
    if code < 0 or code == 4:
        return f"{_ended(code)}, {ATTEMPTS} times"
    return f"{_ended(code)}; the end of its output: {lines[-1] if lines else 'nothing'} ({one.log} has all of it)"


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt here, as SIGINT does; where handlers may not be set, nothing changes."""

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
