"""A cell's folder: whether its run is finished, what else is there, and how a run from elsewhere becomes a cell.

COMPARISON/cells/<id>/ is a run directory like any other, with these files beside:

    cell.json            what was measured around the run: sizes, energy, the machine, where it was run
    evaluation.json, metric_rows.jsonl, merge.json      what was asked for beside the run (see `compare.worker`)

A run counts as finished when its run.yaml is the wanted run's, its events.jsonl ends and its result.json is whole.
"""

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from halfbyte.adapters.peft_io import CONFIG as ADAPTER_CONFIG
from halfbyte.compare import identity
from halfbyte.compare.design import Cell
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.rows_file import NAME as ROWS
from halfbyte.export.folder import new_folder
from halfbyte.files import write_atomic
from halfbyte.plan.hardware import Hardware
from halfbyte.run import folder
from halfbyte.run.config import RunConfig
from halfbyte.run.continued import SHAPE
from halfbyte.train.checkpoint import list_checkpoints
from halfbyte.train.events import read_events
from halfbyte.train.run_directory import CONFIG, EVENTS, PLAN, RESULT

CELL = "cell.json"
EVALUATION, METRIC_ROWS, MERGE = "evaluation.json", "metric_rows.jsonl", "merge.json"
SMALL = (CONFIG, PLAN, EVENTS, RESULT, ROWS, CELL, EVALUATION, METRIC_ROWS, MERGE)
"""All that a report needs of a cell."""
ADAPTER = ("adapter_model.safetensors", ADAPTER_CONFIG)
SCHEMA_VERSION = 1
HERE = "this comparison"
UNUSED = 3
"""Runs of an accepted folder that are told one by one why they were not used."""
_DEPTH = 4  # folders below an accepted one that are searched for runs


def finished(path: Path, want: Mapping[str, Any], pairs: bool, chained: bool = False) -> str | None:
    """Why the run in `path` is not the wanted one, finished; None: it is.

    chained   it goes on from the cell that the id names, which its own files do not say
    """
    found = _ended(path)
    if isinstance(found, str):
        return found
    config, record = found
    if chained:
        fields = {name: value for name, value in want["fields"].items() if name not in SHAPE}  # the adapter's own
        config, want = config.replace(adapter_path=None), {**want, "continues": None, "fields": fields}
    return identity.mismatch(want, config, record, pairs)


def _ended(path: Path) -> tuple[RunConfig, Mapping[str, Any]] | str:
    """The config and the record of a run that came to its end; or why it is none."""
    try:
        config, record = folder.read_config(path)
        result = folder.read_json(path / RESULT)
        events = read_events(path / EVENTS)
    except (HalfbyteError, OSError) as error:
        return str(error)
    if not events or events[-1]["event"] != "end" or events[-1].get("status") not in ("completed", "stopped_early"):
        return "its events.jsonl has no end"
    if result.get("step") != events[-1].get("step"):
        return "its result.json and events.jsonl are of different runs"
    if len({event.get("total_steps") for event in events if event["event"] in ("start", "resume")}) > 1:
        return "it went on for another number of updates than it was begun with, and so did its learning rate"
    return config, record


def is_finished(cells: Path, cell: Cell) -> bool:
    """Whether this comparison's folder has the cell's run, finished."""
    return finished(cells / cell.id, cell.want, cell.pairs, cell.source is not None) is None


def is_begun(cells: Path, cell: Cell) -> bool:
    """Whether this comparison's folder has something of the cell's run: that is gone on with, none is accepted."""
    return (cells / cell.id / EVENTS).is_file()


def has_model(path: Path) -> bool:
    """Whether a run's adapter or weights are there still."""
    return (path / ADAPTER[0]).is_file() or any(path.glob("model*.safetensors"))


def is_measured(path: Path, asked: Mapping[str, Any]) -> bool:
    """Whether an evaluation's file has what is asked for, of the same rows and with answers as long."""
    with contextlib.suppress(UsageError):
        found = folder.read_json(path).get("asked") or {}
        names = found.get("metrics", [])
        return set(asked["metrics"]) <= set(names) and found == {**asked, "metrics": names}
    return False


def close(path: Path, machine: Mapping[str, Any], energy: float | None, others: float | None, keep: bool) -> None:
    """Write cell.json, and before it, unless `keep`, remove what is large and measured: checkpoints, whole weights.

    energy, others   joules, and other work's share of the processor: known of runs that nothing interrupted
    """
    whole = _sessions(path) == 1
    said = {
        "schema_version": SCHEMA_VERSION,
        "origin": HERE,
        "machine": dict(machine),
        "adapter_bytes": _bytes(path, "adapter_model*.safetensors"),
        "weight_bytes": _bytes(path, "model*.safetensors"),
        "energy_joules": energy if whole else None,
        "others_share": others if whole else None,
    }
    if not keep:
        for checkpoint in list_checkpoints(path):
            shutil.rmtree(checkpoint)
        for weights in path.glob("model*.safetensors"):
            weights.unlink()
    if not (path / CELL).is_file():
        write_atomic(path / CELL, json.dumps(said, indent=1) + "\n")


def _bytes(path: Path, pattern: str) -> int | None:
    sizes = [file.stat().st_size for file in path.glob(pattern)]
    return sum(sizes) if sizes else None


def _sessions(path: Path) -> int:
    return sum(event["event"] in ("start", "resume") for event in read_events(path / EVENTS))


def machine_of(hardware: Hardware) -> dict[str, Any]:
    """The machine, as the report says it."""
    return {
        "processor": hardware.processor,
        "cores": hardware.cores,
        "memory_bytes": hardware.memory_total,
        "gpu": hardware.gpus[0].name if hardware.gpus else None,
        "instruction_sets": list(hardware.instruction_sets),
        "system": hardware.system,
    }


def machine_name(machine: Mapping[str, Any]) -> str | None:
    """What tells machines apart whose times and memory are not compared: AMD EPYC, 2 cores, 25 GB. None: not known."""
    processor, cores, memory = (machine.get(name) for name in ("processor", "cores", "memory_bytes"))
    if processor is None:
        return None
    parts = [str(processor)]
    parts += [f"{cores} core{'s' if cores > 1 else ''}"] if cores else []
    parts += [f"{memory / 1e9:.0f} GB"] if memory else []
    parts += [str(machine["gpu"])] if machine.get("gpu") else []
    return ", ".join(parts)


# ---------------------------------------------------------------- runs from elsewhere


@dataclass(frozen=True)
class Accepted:
    """What came of the folders that were offered: ids taken with their place, and what is to be said of the rest."""

    taken: Mapping[str, Path]
    notes: tuple[str, ...]


def lacks_adapter(run: Path, cell: Cell, wanted: Sequence[Cell]) -> bool:
    """Whether another of the wanted cells goes on from this one, whose run here has no adapter: its small files are all
    that a packed comparison keeps."""
    return any(other.source == cell.id for other in wanted) and not (run / ADAPTER[0]).is_file()


def acceptable(places: Sequence[Path], wanted: Sequence[Cell]) -> set[str]:
    """The ids of the wanted cells that finished runs below `places` are; UsageError as in `accept`."""
    found: set[str] = set()
    for path in itertools.chain.from_iterable(_offered(place) for place in places):
        run = _ended(path)
        able = (cell.id for cell in wanted if cell.id not in found and _refused(path, run, cell, wanted) is None)
        found |= set(itertools.islice(able, 1))
    return found


def accept(
    places: Sequence[Path],
    cells: Path,
    wanted: Sequence[Cell],
    machine: Mapping[str, Any],
    others: Sequence[Cell] = (),
) -> Accepted:
    """Copy finished runs below `places` that are wanted and not there yet into `cells`.

    others   cells that were accepted before: their runs are not called unused

    UsageError for a place without any run. A run that is not wanted is told with a reason; the same ones are told
    however many of the wanted cells are there already.
    """
    missing = {cell.id for cell in wanted if not is_finished(cells, cell)}
    taken: dict[str, Path] = {}
    notes: list[str] = []
    for place in places:
        runs, unused = _offered(place), []
        for run in runs:
            read = _ended(run)
            cell = next((cell for cell in wanted if _refused(run, read, cell, wanted) is None), None)
            if cell is not None:
                if cell.id in missing - taken.keys() and not is_begun(cells, cell):
                    _copy(run, cells / cell.id, machine)
                    taken[cell.id] = run
            elif wanted and all(_refused(run, read, other, others) is not None for other in others):
                nearest = next((cell for cell in wanted if _alike(read, cell)), wanted[0])
                reason = _refused(run, read, nearest, wanted)
                unused.append(f"{run} was not used: for {nearest.variant}, {reason}")
            else:
                unused.append("")  # one that was accepted before
        if len(unused) == len(runs) and all(unused):
            notes += [f"nothing in {place} could be used", *unused[:UNUSED]]
        elif told := [reason for reason in unused if reason]:
            notes += told if len(told) <= UNUSED else [f"{len(told)} other runs in {place} were not wanted"]
    return Accepted(taken, tuple(notes))


def _alike(run: tuple[RunConfig, Mapping[str, Any]] | str, cell: Cell) -> bool:
    """Whether both are of one method: what else differs says more."""
    return not isinstance(run, str) and run[0].method == cell.config.method


def _offered(place: Path) -> list[Path]:
    """The finished runs below a folder, of which there are some."""
    runs = list(_runs(place))
    if not runs:
        raise UsageError(f"--accept {place}: no finished run is there (run.yaml, events.jsonl and result.json)")
    return runs


def _refused(
    path: Path, run: tuple[RunConfig, Mapping[str, Any]] | str, cell: Cell, wanted: Sequence[Cell]
) -> str | None:
    """Why a run, as `_ended` gives it, is not this one of the wanted cells; None: it is.

    A dtype that was left to the machine is none of a run's identity, and still all runs of a report have one.
    """
    if isinstance(run, str):
        return run
    config, record = run
    reason = identity.mismatch(cell.want, config, record, cell.pairs)
    if reason is None and config.dtype != cell.config.dtype:
        reason = f"dtype {config.dtype}, not {cell.config.dtype}"
    if reason is None and lacks_adapter(path, cell, wanted):
        reason = "it has no adapter to go on from"
    return reason


def _runs(place: Path) -> Iterator[Path]:
    if not place.is_dir():
        raise UsageError(f"--accept {place}: no such folder")
    for depth in range(_DEPTH):
        for config in sorted(place.glob("*/" * depth + CONFIG)):
            if all((config.parent / name).is_file() for name in (EVENTS, RESULT)):
                yield config.parent


def _copy(run: Path, out: Path, machine: Mapping[str, Any]) -> None:
    """The small files and the adapter of a run as a cell, whole or not at all."""
    said: dict[str, Any] = {}
    with contextlib.suppress(UsageError):
        said = folder.read_json(run / CELL)
    theirs = said.get("machine") or _machine(run)
    name = machine_name(theirs)
    origin = "an earlier run" if name == machine_name(machine) else f"another machine: {name or 'unknown'}"
    _, record = folder.read_config(run)
    if (made_by := record.get("versions", {}).get("halfbyte")) != version("halfbyte"):
        origin += f" (halfbyte {made_by or 'of an unknown version'})"
    said = {
        "schema_version": SCHEMA_VERSION,
        "adapter_bytes": _bytes(run, "adapter_model*.safetensors"),
        "weight_bytes": _bytes(run, "model*.safetensors"),
        "energy_joules": None,
        "others_share": None,
        **said,
        "machine": theirs,
        "origin": origin,
    }
    with new_folder(out) as part:
        for name in (*SMALL, *ADAPTER):
            if (run / name).is_file():
                shutil.copyfile(run / name, part / name)
        (part / CELL).write_text(json.dumps(said, indent=1) + "\n")


def _machine(run: Path) -> dict[str, Any]:
    """The machine of a run that no comparison made, as its plan found it."""
    with contextlib.suppress(UsageError):
        found = folder.read_json(run / PLAN).get("hardware") or {}
        gpus = found.get("gpus") or [{}]
        return {
            "processor": found.get("processor"), "cores": found.get("cores"),
            "memory_bytes": found.get("memory_total"), "gpu": gpus[0].get("name"),
        }  # fmt: skip
    return {}
