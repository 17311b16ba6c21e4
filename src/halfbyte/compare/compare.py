"""`halfbyte compare` from a request to a report: plan, show, run what is missing, report.

    compare(request) -> Comparison

COMPARISON/
    comparison.json     what was asked, the variants and their plans, the cells: all that the report needs beside them
    cells/<id>/         a run directory each (`compare.cells`)
    logs/               what the workers were given and printed
    report.json, .html, .md

Everything is decided from what is on the disk, so the same command goes on after any kill, and a finished cell is never
run twice. The report is a function of comparison.json and the cells' small files and of nothing else.
"""

import contextlib
import datetime
import itertools
import json
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halfbyte.compare import cells as cell_files
from halfbyte.compare import energy, identity, process, report_data, tune
from halfbyte.compare.design import Cell, Design, PlannedVariant, cell_of, make_design
from halfbyte.compare.options import CompareOptions, Request
from halfbyte.compare.render import write_report
from halfbyte.compare.variants import shared
from halfbyte.data.options import DataOptions, sources_of
from halfbyte.errors import DoesNotFit, Interrupted, UsageError
from halfbyte.files import write_atomic
from halfbyte.models.options import ModelOptions
from halfbyte.plan.hardware import Hardware, detect
from halfbyte.plan.price import Price
from halfbyte.quant.options import QuantOptions
from halfbyte.run import folder
from halfbyte.run.config import RunConfig
from halfbyte.train.lock import Lock
from halfbyte.train.run_directory import CONFIG, RESULT, running

FILE = "comparison.json"
LOCK = "compare.lock"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison. `report` is report.json's content, None after a dry run.

    failed    messages by cell id
    """

    path: Path
    plan: Mapping[str, Any]
    report: Mapping[str, Any] | None
    failed: Mapping[str, str]

    @property
    def exit_code(self) -> int:
        """0 with a report of all that was asked for, 1 where something of it failed."""
        return 1 if self.failed else 0


def silent(event: Mapping[str, Any]) -> None:
    """The listener of those who do not listen."""


def compare(request: Request, on_event: process.Tell = silent, dry_run: bool = False, command: str = "") -> Comparison:
    """Run what is missing and write the report. With `dry_run`, plan only: nothing is written.

    UsageError for what is wrong with the request; DoesNotFit where no two variants fit; Interrupted after Ctrl-C or
    SIGTERM, with everything saved: the same command goes on.
    """
    options = request.options
    price = Price.parse(options.price) if options.price is not None else None
    root = options.output
    _require_ours(root)
    stored = _stored(root)
    design = make_design(request, stored.get("layouts", {}))
    _require_same(root, stored, design)
    hardware = detect()
    plan = plan_of(design, options, price)
    places = root / "cells"
    known, searches = tune.so_far(design, options, places) if options.tune_lr else (design, [])
    cells = known.cells(skipped=True)
    there = {cell.id for cell in cells if cell_files.is_finished(places, cell)}
    missing = [cell for cell in cells if cell.id not in there and not cell_files.is_begun(places, cell)]
    # A searched rate is not known yet, and with it which of the runs are accepted.
    accepted = set() if options.tune_lr else cell_files.acceptable(options.accept, missing)
    left = [cell for cell in (*known.cells(), *searches) if cell.id not in there | accepted]
    on_event(
        {
            "event": "planned", "design": design, "plan": plan, "finished": len(there), "accepted": len(accepted),
            "left": len(left), "seconds_left": sum(_seconds_of(cell, design) for cell in left),
        }
    )  # fmt: skip
    if dry_run:
        return Comparison(root, plan, None, {})
    if not options.accept:
        _require_two(known, there)
    with Lock(root / LOCK):
        try:
            return _run(request, design, plan, price, hardware, stored, on_event, command)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; everything is saved: the same command goes on in {root}") from None


def _require_two(design: Design, there: Collection[str]) -> None:
    """DoesNotFit where not two variants can be compared: neither run here nor there already."""
    known = {cell.variant for cell in design.cells(skipped=True) if cell.id in there}
    compared = [planned for planned in design.variants if not planned.variant.only_a_start]
    able = [planned for planned in compared if planned.skipped is None or planned.key in known]
    if len(able) < 2:
        first = next(planned for planned in compared if planned not in able)
        fits = f"only {able[0].key} fits, and there is nothing to compare it with" if able else "no variant fits"
        raise DoesNotFit(f"{fits}: {first.key}: {first.skipped}")


def _run(
    request: Request,
    design: Design,
    plan: Mapping[str, Any],
    price: Price | None,
    hardware: Hardware,
    stored: Mapping[str, Any],
    on_event: process.Tell,
    command: str,
) -> Comparison:
    options, root = request.options, request.options.output
    machine = cell_files.machine_of(hardware)
    places = root / "cells"
    said: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "created": stored.get("created") or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "options": options.model_dump(mode="json"),
        "machine": machine,
        "versions": versions(),
        "layouts": dict(stored.get("layouts", {})) | layouts(design),
        "plan": plan,
        "price": None if price is None else {"amount": price.amount, "currency": price.currency},
        "tune": None,
        "model": dict(design.model),
        "data": data_of(design),
        "notes": list(design.notes),
        "asked": asked_of(options) if options.metrics else None,
        "baseline": baseline_of(design, options),
    }
    if energy.read() is None:
        said["notes"].append("Energy is not known: this machine shows no counters that this user may read.")
    # What is reported already stays so until the cells are known.
    whole = {**stored, "layouts": said["layouts"]} if "cells" in stored else said
    write_atomic(root / FILE, json.dumps(whole, indent=1) + "\n")
    search = tune.search_of(design, options) if options.tune_lr else None
    failed: dict[str, str] = {}

    def told(event: dict[str, Any]) -> None:
        """Failures are kept as they are told: a stop later on loses none."""
        if event["event"] == "cell" and event["status"] == "failed":
            failed[event["cell"].id] = event["message"]
        on_event(event)

    if search is not None:
        for extension in range(1 + tune.EXTENSIONS):
            _accept(options, places, search.all_cells(), machine)  # what it could not use is told below
            _work(search.all_cells(), design, options, machine, hardware, on_event)
            chosen, losses = tune.chosen_rates(search, places)
            more = tune.beyond(search, design, losses) if extension < tune.EXTENSIONS else None
            if more is None:
                break
            search = more
        design = tune.with_rates(design, chosen)
        said["tune"] = tune.as_dict(search, chosen, losses)  # a rate at which training breaks is an answer, too
    searched = [] if search is None else search.all_cells()
    said["notes"] += _accept(options, places, design.cells(skipped=True), machine, searched)
    there = {cell.id for cell in design.cells(skipped=True) if cell_files.is_finished(places, cell)}
    _require_two(design, there)
    runnable = {cell.id for cell in design.cells()}
    wanted = [cell for cell in design.cells(skipped=True) if cell.id in runnable | there]
    said |= {
        "seeds": list(design.seeds),
        "variants": [variant_as_dict(planned, design, request) for planned in design.variants],
        "cells": [
            {"id": cell.id, "variant": cell.variant, "seed": cell.seed, "source": cell.source} for cell in wanted
        ],
    }
    write_atomic(root / FILE, json.dumps(said, indent=1) + "\n")
    try:
        _work(wanted, design, options, machine, hardware, told)
        failed |= _baseline(design, options, machine, hardware, on_event)
    except KeyboardInterrupt:
        if not any(cell_files.is_finished(places, cell) for cell in wanted):
            raise
        _report(said, root, failed, on_event)
        raise Interrupted(
            f"stopped; everything is saved: the same command goes on in {root}; until then report.html there is of the "
            "finished runs"
        ) from None
    report = _report(said, root, failed, on_event)
    return Comparison(root, plan, report, failed)


def _report(said: dict[str, Any], root: Path, failed: Mapping[str, str], on_event: process.Tell) -> Mapping[str, Any]:
    """Write the report of the cells that are finished."""
    said["failed"] = dict(failed)
    write_atomic(root / FILE, json.dumps(said, indent=1) + "\n")
    report = report_data.build(root)
    write_report(report, root)
    on_event({"event": "report", "path": root, "report": report})
    return report


def _require_ours(root: Path) -> None:
    """UsageError for a folder that holds something else."""
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file: choose another output")
    if root.is_dir() and not (root / FILE).is_file():
        others = [entry for entry in root.iterdir() if entry.name != LOCK and not entry.name.endswith(".partial")]
        if others:
            raise UsageError(f"{root} is not empty and holds no comparison: choose another output")


def _stored(root: Path) -> dict[str, Any]:
    """What an earlier start of this comparison decided."""
    if not (root / FILE).is_file():
        return {}
    stored = folder.read_json(root / FILE)
    if stored.get("schema_version", 0) > SCHEMA_VERSION:
        raise UsageError(f"{root / FILE} is of a newer halfbyte: upgrade it, or choose another output")
    return stored


def _require_same(root: Path, stored: Mapping[str, Any], design: Design) -> None:
    """UsageError where the folder has finished runs of another model or of other rows: their report would be lost.

    One that has none of its runs finished has nothing to lose. Where variants learn from different rows (`unequal`),
    one that learns from rows that are known is enough: it may be the others that are new.
    """
    if not any((root / "cells" / cell["id"] / cell_files.CELL).is_file() for cell in stored.get("cells", ())):
        return
    model, now = stored["model"], design.model
    rows = {variant["work"]["data"] for variant in stored["variants"]}
    if model["fingerprint"] != now["fingerprint"]:
        other = f"{model['name']}, and {now['name']} is another model"
        if model["name"] == now["name"]:
            other = f"{model['name']} with other weights than it has now"
    elif rows.isdisjoint(planned.work.data for planned in design.variants):
        names = ", ".join(data["name"] for data in stored["data"])
        other = f"other rows ({names}: the rows, template, max_seq_length or what is supervised differ)"
    else:
        return
    raise UsageError(f"{root} holds a comparison of {other}: choose another output (-o), or its report would be lost")


def layouts(design: Design) -> dict[str, Any]:
    """What was decided for each variant, by the id of its first cell."""
    return {
        cell_of(planned, planned.config.seed).id: {
            "layout": dict(planned.layout), "plan": planned.plan, "skipped": planned.skipped,
            "hardware": list(planned.hardware),
        }
        for planned in design.variants
    }  # fmt: skip


def _accept(
    options: CompareOptions,
    places: Path,
    wanted: Sequence[Cell],
    machine: Mapping[str, Any],
    others: Sequence[Cell] = (),
) -> list[str]:
    if not options.accept:
        return []
    places.mkdir(parents=True, exist_ok=True)
    return list(cell_files.accept(options.accept, places, wanted, machine, others).notes)


def _work(
    wanted: Sequence[Cell],
    design: Design,
    options: CompareOptions,
    machine: Mapping[str, Any],
    hardware: Hardware,
    on_event: process.Tell,
) -> None:
    """Bring the cells to their end; `on_event` hears of those that fail."""
    root = options.output
    cells = list({cell.id: cell for cell in wanted}.values())
    continued = {cell.source for cell in cells if cell.source is not None}

    unfinished = [cell for cell in cells if not cell_files.is_finished(root / "cells", cell)]

    def lacking(cell: Cell) -> bool:
        """Whether one that is to go on from it cannot: it came from elsewhere without its adapter."""
        return cell_files.lacks_adapter(root / "cells" / cell.id, cell, unfinished)

    def next_stage(cell: Cell) -> process.Stage | None:
        path = root / "cells" / cell.id
        if not cell_files.is_finished(root / "cells", cell) or lacking(cell):
            return "train", {"config": run_config(cell, root).model_dump(mode="json", exclude_unset=True)}
        only_begun = cell.kind == "tune" or design.variant(cell.variant).variant.only_a_start
        if only_begun or not cell_files.has_model(path):
            return None
        here = {"config": cell.config.model_dump(mode="json", exclude_unset=True)}
        if options.metrics and not cell_files.is_measured(path / cell_files.EVALUATION, asked_of(options)):
            return "metrics", here | measuring(options)
        adapter = (path / cell_files.ADAPTER[0]).is_file()
        if options.merge_loss and adapter and not (path / cell_files.MERGE).is_file():
            return "merge", here | {"output": str(root / "cells" / f".{cell.id}.merged")}
        return None

    def finish(cell: Cell, around: process.Around) -> None:
        keep = options.keep or cell.id in continued
        cell_files.close(root / "cells" / cell.id, machine, around.joules, around.others, keep)

    left = [cell for cell in cells if next_stage(cell) or not (root / "cells" / cell.id / cell_files.CELL).is_file()]
    for cell in left:
        _clear_unfit(root / "cells" / cell.id, cell, on_event, lacking(cell))
    outcome = process.run_cells(left, root, next_stage, finish, options.jobs, hardware.usable, on_event)
    for cell in left:
        if cell.id in outcome.failed and cell_files.is_finished(root / "cells", cell):  # a metric failed, not the run
            around = outcome.around.get(cell.id, process.UNKNOWN)
            cell_files.close(root / "cells" / cell.id, machine, around.joules, around.others, keep=True)


def _clear_unfit(path: Path, cell: Cell, on_event: process.Tell, lacking: bool) -> None:
    """A folder that is no run, or a finished one that is not the cell's or is `lacking` the adapter that is gone on
    from, cannot be gone on with: begin again.

    A finished run is somebody's work (`halfbyte resume` went on with it, say): it is kept under another name.
    """
    begun = (path / CONFIG).is_file() and not (path / RESULT).is_file()
    if begun or not path.is_dir() or running(path) is not None:
        return
    reason = cell_files.finished(path, cell.want, cell.pairs, cell.source is not None)
    if reason is None and lacking:
        reason = "it has no adapter to go on from"
    if reason is None:
        return
    if (path / CONFIG).is_file() and (path / RESULT).is_file():
        number = next(n for n in itertools.count(1) if not path.with_name(f"{path.name}.set-aside-{n}").exists())
        kept = path.rename(path.with_name(f"{path.name}.set-aside-{number}"))
        on_event({"event": "note", "message": f"{cell.variant}, seed {cell.seed}: {reason}; kept in {kept}, run anew"})
        return
    old = path.with_name(f".{path.name}.old")  # whole or not there, as a kill in between would leave neither
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old)


def asked_of(options: CompareOptions) -> dict[str, Any]:
    """What decides a metric's figure beside model and rows."""
    return {
        "metrics": list(options.metrics), "metric_rows": options.metric_rows, "max_new_tokens": options.max_new_tokens,
    }  # fmt: skip


def measuring(options: CompareOptions) -> dict[str, Any]:
    """What a worker needs to measure metrics."""
    return {"asked": asked_of(options), "allow_code_execution": options.allow_code_execution}


def run_config(cell: Cell, root: Path) -> RunConfig:
    """The config of a cell's run: its own folder, and the adapter that it goes on from."""
    changes: dict[str, Any] = {"output_dir": root / "cells" / cell.id}
    if cell.source is not None:
        changes["adapter_path"] = str(root / "cells" / cell.source)
    return cell.config.replace(**changes)


def _baseline(
    design: Design,
    options: CompareOptions,
    machine: Mapping[str, Any],
    hardware: Hardware,
    on_event: process.Tell,
) -> dict[str, str]:
    """The metrics of the base, measured once."""
    root = options.output
    out = root / report_data.BASELINE
    asked = baseline_of(design, options)
    if asked is None or cell_files.is_measured(out, asked):
        return {}
    first = _held_by(design)
    fields = first.config.pick(ModelOptions).model_dump() | first.config.pick(DataOptions).model_dump()
    if first.config.method == "qlora":
        fields |= first.config.pick(QuantOptions).model_dump()
    method = "qlora" if first.config.method == "qlora" else "lora"
    config = RunConfig.model_validate(fields | {"seed": first.config.seed, "method": method})
    cell = Cell("baseline", "base", first.config.seed, config, {}, first.pairs, kind="base")
    more = {"config": config.model_dump(mode="json"), "output": str(out), "asked": asked}
    stage = ("base", measuring(options) | more)

    def next_stage(_: Cell) -> process.Stage | None:
        return None if cell_files.is_measured(out, asked) else stage

    found = process.run_cells([cell], root, next_stage, lambda _, __: None, 1, hardware.usable, on_event)
    return {f"the base's {', '.join(options.metrics)}": message for message in found.failed.values()}


def baseline_of(design: Design, options: CompareOptions) -> dict[str, Any] | None:
    """What baseline.json is asked for, None: nothing. The folder may have held a comparison of another model, begun."""
    if not options.metrics:
        return None
    first = _held_by(design)
    asked = asked_of(options) | {"of": identity.identity_of(first.record), "eval_seed": first.config.eval_seed}
    if first.config.method == "qlora":
        asked["held_as"] = first.config.pick(QuantOptions).model_dump(mode="json")
    return asked


def _held_by(design: Design) -> PlannedVariant:
    """The variant as which the untrained model is held: in 16 bits where one does and fits, else as the first does."""
    fitting = [planned for planned in design.variants if planned.skipped is None]
    plain = [planned for planned in fitting if planned.config.method != "qlora"]
    return (plain or fitting or list(design.variants))[0]


# ---------------------------------------------------------------- what is said before


def plan_of(design: Design, options: CompareOptions, price: Price | None) -> dict[str, Any]:
    """Hours and cost of everything, before anything is run; `without`: what is not planned, and comes on top."""
    known = [planned for planned in design.variants if planned.skipped is None and planned.plan is not None]
    share = 1.0
    if options.tune_lr:
        steps = options.tune_steps or -(-design.variants[0].work.steps // 3)
        share += len(options.tune_multiples) * steps / design.variants[0].work.steps / len(design.seeds)
    seconds = {
        end: sum(planned.plan["seconds"][end] for planned in known if planned.plan) * len(design.seeds) * share
        for end in ("p50", "p95")
    }
    return {
        "variants": [planned.key for planned in design.variants],
        "seconds": seconds,
        "cost": None if price is None else _cost(seconds["p50"], price),
        "skipped": {planned.key: planned.skipped for planned in design.variants if planned.skipped is not None},
        "without": ["answers"] * bool(options.metrics) + ["merges"] * options.merge_loss,
    }


def _seconds_of(cell: Cell, design: Design) -> float:
    """How long a run takes, as planned; a short one of the search its share of the updates."""
    planned = design.variant(cell.variant)
    if planned.plan is None:
        return 0.0
    share = (cell.config.max_steps or planned.work.steps) / planned.work.steps if cell.kind == "tune" else 1.0
    return float(planned.plan["seconds"]["p50"]) * share


def _cost(seconds: float, price: Price) -> dict[str, Any]:
    return {"amount": round(seconds / 3600 * price.amount, 6), "currency": price.currency}


def versions() -> dict[str, str]:
    """Of what a result may depend on."""
    import platform

    found = {"python": platform.python_version()}
    for name in ("halfbyte", "torch", "transformers", "tokenizers", "safetensors", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def data_of(design: Design) -> list[dict[str, Any]]:
    """The rows, as the report says them: one entry, whatever the number of files."""
    first = design.variants[0]
    names = ", ".join(Path(source.path).name for source in sources_of(first.config.data))
    return [
        {
            "name": names,
            "fingerprint": first.work.data,
            "rows": first.work.train_rows,
            "eval_rows": first.work.eval_rows,
            "tokens": first.work.data_tokens,
            "supervised_tokens": first.work.data_supervised,
        }
    ]


def variant_as_dict(planned: PlannedVariant, design: Design, request: Request) -> dict[str, Any]:
    """A variant as comparison.json holds it."""
    config, given = planned.config, planned.variant.fields
    values = config.model_dump(mode="json")  # a flag's "8" is 8
    return {
        "key": planned.key,
        "label": planned.variant.label,
        "fields": {name: values.get(name, value) for name, value in given.items()} | {"method": given["method"]},
        "continue_from": planned.variant.continue_from,
        "only_a_start": planned.variant.only_a_start,
        "skipped": planned.skipped,
        "method_name": config.method_name,
        "learning_rate": identity.learning_rate(config, planned.pairs),
        "config": config.replace(**planned.layout).model_dump(mode="json"),
        "pairs": planned.pairs,
        "plan": planned.plan,
        "work": vars(planned.work),
        "record": dict(planned.record),
        "command": train_command(planned, design.seeds[0], request),
        "hardware": list(planned.hardware),
    }


def train_command(planned: PlannedVariant, seed: int, request: Request) -> str:
    """The `halfbyte train` that is the variant's first cell, in the words of the request."""
    of_file, of_flags = shared(request, str(planned.variant.fields["method"]))
    names = {**of_file, **of_flags}
    values: dict[str, Any] = {name: entry.value for name, entry in names.items()}
    values |= dict(planned.variant.fields)
    defaults = {name: field.get_default(call_default_factory=True) for name, field in RunConfig.model_fields.items()}
    for name in ("eval_steps", "eval_seed", "learning_rate"):
        if getattr(planned.config, name) != defaults[name]:
            values[name] = getattr(planned.config, name)
    values["seed"] = seed
    if planned.variant.continue_from is not None:
        values["adapter_path"] = f"RUN-OF-{planned.variant.continue_from}"
    words = ["halfbyte", "train"]
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, Mapping):
            words += [part for key, item in value.items() for part in (flag, f"{key}={item}")]
        elif isinstance(value, list | tuple):
            words += [part for item in value for part in (flag, _text(item))]
        else:
            words += [flag, _text(value)]
    return shlex.join(words)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
