"""What runs on this machine took, beside what was predicted: kept in the user's data folder, to predict better.

One row a run in an SQLite file (`path()`), written when the run is over. It holds figures and the names of the method,
the formats and the architecture, never the name of a model or of data, a path, or anything of the user's texts
(docs/history.md lists the columns). `HALFBYTE_HISTORY=0` keeps nothing and reads nothing; deleting the file forgets.

Nothing here may harm a run: whatever is wrong with the file, `keep` returns a sentence to warn with and the others
behave as if there was no history. Other processes may write at the same time: SQLite's own locks hold them apart.

Units: bytes, seconds.
"""

import contextlib
import itertools
import json
import math
import os
import sqlite3
import statistics
import sys
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from halfbyte.plan import arithmetic
from halfbyte.plan import calibration as shipped_constants
from halfbyte.plan.calibration import Calibration
from halfbyte.plan.hardware import Hardware, machine_key
from halfbyte.plan.refit import Ratios, refit

SCHEMA_VERSION = 1
REPORT_VERSION = 1
LAST_RUNS = 200
"""Runs that a refit looks at: machines and versions change."""
KEPT_RUNS = 10_000
SHORTEST = 10.0
"""Seconds below which a run tells nothing about time: that is start-up, and the plan's figures are rounded."""
STEPPED_DOWN = "stepped_down"
"""Status of a run for which memory fell short, and that went on in a smaller layout than was predicted for."""
PATIENCE = 5.0
"""Seconds to wait for another process's lock."""


class _Unusable(Exception):
    """The file cannot be used; the text says why, and what to do."""


@dataclass(frozen=True)
class Run:
    """One row. `predicted` is the arithmetic before any calibration and any probe, `said` what plan.json told at last.

    machine             `hardware.machine_key`: processor, cores, threads, GPU, torch version, backend
    arithmetic          of which formulas `predicted` is (`plan.arithmetic`)
    family, parameters  the architecture's name (gemma3_text) and its size
    quant, rank         NF4 or "gguf", ... and LoRA's rank; None where the method has none
    probed_seconds      the prediction after a probe, where there was one
    phases              {"predicted", "probed", "measured"}: {"bytes" | "seconds": {phase: figure}} as JSON
    status              completed, stopped_early or stepped_down
    resumed, first      it was interrupted once; it was the first of its process to take memory
    """

    finished: str
    machine: str
    device: str
    backend: str
    halfbyte: str
    arithmetic: str
    family: str
    parameters: int
    trainable_parameters: int
    method_name: str
    dtype: str
    quant: str | None
    rank: int | None
    optim: str
    rows_at_once: int
    longest: int
    checkpointing: bool
    steps: int
    tokens: int
    predicted_bytes: float
    said_bytes_p50: float
    said_bytes_p95: float
    measured_bytes: float
    predicted_seconds: float
    said_seconds_p50: float
    said_seconds_p95: float
    probed_seconds: float | None
    measured_seconds: float
    status: str = "completed"
    resumed: bool = False
    first: bool = True
    phases: dict[str, Any] = field(default_factory=dict)

    @property
    def configuration(self) -> str:
        """What makes two runs repetitions of each other."""
        parts = (self.family, self.parameters, self.method_name, self.dtype, self.quant, self.rank, self.optim)
        return "/".join(map(str, (*parts, self.rows_at_once, self.longest, self.checkpointing)))

    @property
    def tells_memory(self) -> bool:
        """A run that stepped down took less than its layout would have: more than predicted it may have taken still."""
        predicted, measured = self.predicted_bytes, self.measured_bytes
        if not self.first or self.resumed or min(predicted, measured) <= 0:
            return False
        return self.status != STEPPED_DOWN or measured > predicted

    @property
    def tells_time(self) -> bool:
        long_enough = self.measured_seconds >= SHORTEST and self.predicted_seconds > 0
        return self.status == "completed" and not self.resumed and long_enough


_NAMES = tuple(f.name for f in fields(Run))
_TYPES: dict[Any, str] = {int: "INTEGER", int | None: "INTEGER", bool: "INTEGER", float: "REAL", float | None: "REAL"}
_COLUMNS = ", ".join(f"{f.name} {_TYPES.get(f.type, 'TEXT')}" for f in fields(Run))


def path() -> Path:
    """`history.sqlite` in the user's data folder: $XDG_DATA_HOME/halfbyte or ~/.local/share/halfbyte; on macOS
    ~/Library/Application Support/halfbyte, on Windows %LOCALAPPDATA%\\halfbyte."""
    if given := os.environ.get("XDG_DATA_HOME"):
        folder = Path(given)
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Application Support"
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        folder = Path.home() / ".local" / "share"
    return folder / "halfbyte" / "history.sqlite"


def enabled() -> bool:
    """Unless HALFBYTE_HISTORY is 0, no, off or false."""
    return os.environ.get("HALFBYTE_HISTORY", "1").strip().lower() not in ("0", "no", "off", "false")


def keep(run: Run) -> str | None:
    """Write a row. Returns what to warn the user of, None if all is well; never raises."""
    if not enabled():
        return None
    try:
        with _open(create=True) as database:
            values = [json.dumps(value) if isinstance(value, dict) else value for value in astuple(run)]
            marks = ", ".join("?" * len(values))
            database.execute(f"INSERT INTO runs ({', '.join(_NAMES)}) VALUES ({marks})", values)
            database.execute("DELETE FROM runs WHERE id <= (SELECT MAX(id) FROM runs) - ?", (KEPT_RUNS,))
    except _Unusable as error:
        return f"this run is not in the history: {error}"
    return None


def runs(machine: str | None = None, device: str | None = None, last: int = LAST_RUNS) -> list[Run]:
    """The last runs, newest first, of one machine and device or of all; none where the history cannot be used."""
    found, _ = read(machine, device, last)
    return found


def read(machine: str | None = None, device: str | None = None, last: int = LAST_RUNS) -> tuple[list[Run], str | None]:
    """`runs`, and why there are none where the file is there and cannot be used."""
    if not enabled():
        return [], None
    where = {name: value for name, value in (("machine", machine), ("device", device)) if value is not None}
    condition = " AND ".join(f"{name} = ?" for name in where) or "1"
    query = f"SELECT {', '.join(_NAMES)} FROM runs WHERE {condition} ORDER BY id DESC LIMIT ?"
    try:
        with _open(create=False) as database:
            rows = database.execute(query, (*where.values(), last)).fetchall()
    except FileNotFoundError:
        return [], None
    except _Unusable as error:
        return [], str(error)
    made = (_run(row) for row in rows)
    return [run for run in made if run is not None], None


def _run(row: Sequence[Any]) -> Run | None:
    """A row as a value; None for one that somebody else has written something into."""
    values = dict(zip(_NAMES, row, strict=True))
    try:
        values["phases"] = json.loads(values["phases"])
        for name in ("checkpointing", "resumed", "first"):
            values[name] = bool(values[name])
        figures = (f.name for f in fields(Run) if f.type in (int, float))
        return Run(**values) if all(math.isfinite(values[name]) for name in figures) else None
    except (TypeError, ValueError):
        return None


@contextlib.contextmanager
def _open(create: bool) -> Iterator[sqlite3.Connection]:
    """The database in a transaction. _Unusable for whatever SQLite or the system refuses; FileNotFoundError without
    `create` where there is none."""
    try:
        file = path()
    except RuntimeError as error:
        raise _Unusable(str(error)) from error
    connection = None
    try:
        if not create and not file.exists():
            raise FileNotFoundError(file)
        if create:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        connection = sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE" if create else "BEGIN")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise _Unusable(f"{file} is of a newer halfbyte")
        if version == 0 and create:
            connection.execute(f"CREATE TABLE runs (id INTEGER PRIMARY KEY, {_COLUMNS})")
            connection.execute("CREATE INDEX runs_of_machine ON runs (machine, device)")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        if version == 0 and not create:
            raise FileNotFoundError(file)  # another process is about to make it
        yield connection
        connection.execute("COMMIT")
    except (sqlite3.OperationalError, OSError) as error:
        if isinstance(error, FileNotFoundError) and not create:
            raise
        raise _Unusable(f"{file}: {error}") from error
    except (sqlite3.Error, ValueError, OverflowError) as error:  # a damaged file's text need not even be UTF-8
        raise _Unusable(f"{file} is damaged ({type(error).__name__}): delete it, and halfbyte learns anew") from error
    finally:
        if connection is not None:
            connection.close()


def calibration(machine: str, device: str) -> Calibration | None:
    """The constants that this machine's runs ask for (`plan.refit`); None where there are none to learn from."""
    found = runs(machine, device)
    if found:
        version = arithmetic.version()
        found = [run for run in found if run.arithmetic == version]
    shipped = shipped_constants.of(device)
    held, taken = [r for r in found if r.tells_memory], [r for r in found if r.tells_time]
    probed = [run for run in taken if run.probed_seconds]
    if not held and not taken:
        return None
    return refit(
        shipped,
        Ratios(tuple(_log(r.measured_bytes, r.predicted_bytes) for r in held), _configurations(held)),
        Ratios(tuple(_log(r.measured_seconds, r.predicted_seconds) for r in taken), _configurations(taken)),
        Ratios(tuple(_log(r.measured_seconds, r.probed_seconds or 1.0) for r in probed), _configurations(probed)),
        [shipped.memory_margin / r.predicted_bytes for r in held],
    )


def constants_of(hardware: Hardware, device: str) -> Calibration:
    """What a plan for this device is made with: the machine's own constants, else those that ship with halfbyte."""
    return calibration(key_of(hardware, device), device) or shipped_constants.of(device)


def key_of(hardware: Hardware, device: str) -> str:
    """`machine_key` for training on `device`: a GPU beside it changes nothing for a processor."""
    return machine_key(replace(hardware, gpus=()) if device == "cpu" else hardware)


def _log(measured: float, predicted: float) -> float:
    return math.log(measured / predicted)


def _configurations(found: Sequence[Run]) -> tuple[str, ...]:
    return tuple(run.configuration for run in found)


def accuracy(machine: str, device: str) -> dict[str, Any]:
    """How good the predictions were that this machine's users were told, by method; `halfbyte plan --accuracy`.

    An error is |predicted / measured - 1| of the p50 that was told, after a probe where there was one; `within` the
    share of runs that stayed below the p95. `refit` is what the next plan is made with, `other_runs` are those of other
    machine keys.
    """
    found, problem = read(machine, device)
    methods = sorted({run.method_name for run in found})
    fitted = calibration(machine, device)
    return {
        "schema_version": REPORT_VERSION,
        "file": _shown_path(),
        "kept": enabled(),
        "problem": problem,
        "machine": machine,
        "device": device,
        "runs": len(found),
        "other_runs": sum((run.machine, run.device) != (machine, device) for run in runs(last=KEPT_RUNS)),
        "methods": {name: _errors([run for run in found if run.method_name == name]) for name in methods},
        "all": _errors(found),
        "worst": {"memory": _worst(found, "memory"), "time": _worst(found, "time")},
        "shipped": asdict(shipped_constants.of(device)),
        "refit": asdict(fitted) if fitted is not None else None,
    }


def _shown_path() -> str | None:
    try:
        return str(path())
    except RuntimeError:
        return None


def _error(run: Run, what: str) -> float | None:
    """The error of one run; None where it says nothing about this."""
    if what == "memory":
        return abs(run.said_bytes_p50 / run.measured_bytes - 1) if run.tells_memory else None
    return abs(run.said_seconds_p50 / run.measured_seconds - 1) if run.tells_time else None


def _errors(found: Sequence[Run]) -> dict[str, Any]:
    made: dict[str, Any] = {"runs": len(found)}
    for what in ("memory", "time"):
        pairs = [(run, error) for run in found if (error := _error(run, what)) is not None]
        errors = sorted(error for _, error in pairs)
        within = [
            run.measured_bytes <= run.said_bytes_p95
            if what == "memory"
            else run.measured_seconds <= run.said_seconds_p95
            for run, _ in pairs
        ]
        made[what] = {
            "runs": len(errors),
            "median": round(statistics.median(errors), 4) if errors else None,
            "p95": round(errors[math.ceil(0.95 * len(errors)) - 1], 4) if errors else None,
            "within": round(sum(within) / len(within), 4) if within else None,
        }
    return made


def _worst(found: Sequence[Run], what: str) -> dict[str, Any] | None:
    """The run whose prediction was furthest off, so that a person recognises it."""
    pairs = [(error, run) for run in found if (error := _error(run, what)) is not None]
    if not pairs:
        return None
    error, run = max(pairs, key=lambda pair: pair[0])
    said, was = (
        (run.said_bytes_p50, run.measured_bytes) if what == "memory" else (run.said_seconds_p50, run.measured_seconds)
    )
    names = ("finished", "method_name", "family", "parameters", "rows_at_once", "longest")
    return {name: getattr(run, name) for name in names} | {"error": round(error, 4), "predicted": said, "measured": was}


def now() -> str:
    """This moment, in UTC, to the second."""
    return clock.strftime("%Y-%m-%dT%H:%M:%SZ", clock.gmtime())


_asked = itertools.count()


def first_of_process() -> bool:
    """Whether this is asked for the first time: a process's peak memory is its largest run's, whichever came first."""
    return next(_asked) == 0


def phases_of(plan: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Predicted and measured figures by phase, out of plan.json and result.json."""
    first = plan.get("before_probe", plan)
    found: dict[str, Any] = {
        "predicted": {
            "bytes": middles(plan.get("memory_by_phase", {})),
            "seconds": middles(first.get("seconds_by_phase", {})),
        },
        "measured": {
            "bytes": {"run": result.get("peak_memory_bytes")},
            "seconds": result.get("seconds_by_phase", {}),
        },
    }
    if plan.get("probed"):
        found["probed"] = {"seconds": middles(plan.get("seconds_by_phase", {}))}
    return found


def middles(intervals: Mapping[str, Any]) -> dict[str, float]:
    """The p50 of each interval of a plan."""
    return {name: float(value["p50"]) for name, value in intervals.items()}
