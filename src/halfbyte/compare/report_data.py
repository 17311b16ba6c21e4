"""report.json from a comparison's folder: a function of comparison.json and the cells' small files, nothing else.

`build(folder)` reads; nothing is run and nothing is written. Variants whose cells are missing have the figures of those
that are there, and the report says how many.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.compare import wording
from halfbyte.compare.cells import is_measured
from halfbyte.compare.measure import EVAL_LOSS, Measured, Point, after, first_loss, measure, reached
from halfbyte.compare.others import QUIET
from halfbyte.compare.sentence import sentence
from halfbyte.compare.statistics import (
    Difference,
    Figure,
    mean_interval,
    paired_difference,
    pareto,
    row_difference,
)
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.metrics import ACCURACY
from halfbyte.run.folder import read_json
from halfbyte.train.run_directory import RESULT

SCHEMA_VERSION = 1
FILE = "comparison.json"
BASELINE = "baseline.json"
CURVE_POINTS = 24
"""Points of a training curve: of single updates three seeds' bands are so wide that they hide one another."""
COMPARED = ("peak_memory_bytes", "seconds", "step_seconds", "tokens_per_second")
"""Metrics beside those of quality that pairs of variants are compared in."""

_SPENT = {"key": "supervised_tokens", "unit": "count", "quality": False}
_METRICS: tuple[tuple[str, str, str, str], ...] = (
    ("peak_memory_bytes", "peak memory", "lower", "bytes"),
    ("seconds", "time of a run", "lower", "seconds"),
    ("step_seconds", "time of an update", "lower", "seconds"),
    ("tokens_per_second", "tokens a second", "higher", "tokens/s"),
    ("warmup_seconds", "time of the first updates", "lower", "seconds"),
    ("trainable_parameters", "trained parameters", "lower", "count"),
    ("adapter_bytes", "size of the adapter", "lower", "bytes"),
    ("checkpoint_bytes", "size of a checkpoint", "lower", "bytes"),
    ("merge_loss", "held-out loss once merged", "lower", "loss"),
    ("energy_joules", "energy of a run", "lower", "joules"),
    ("cost", "cost of a run", "lower", "money"),
)


@dataclass(frozen=True)
class Cells:
    """A variant's finished cells by seed."""

    key: str
    by_seed: Mapping[int, Measured]

    def values(self, metric: str, seeds: Sequence[int] | None = None) -> list[float]:
        """One value a seed, for the seeds that have it (or for `seeds`, which all have it)."""
        chosen = self.by_seed if seeds is None else seeds
        return [self.by_seed[s].figures[metric] for s in chosen if metric in self.by_seed[s].figures]

    def seeds(self, metric: str) -> list[int]:
        return [seed for seed, measured in self.by_seed.items() if metric in measured.figures]

    def figure(self, metric: str) -> Figure | None:
        values = self.values(metric)
        return mean_interval(values) if values else None


def build(root: Path) -> dict[str, Any]:
    """The report of the comparison in `root`, as REPORT's schema has it."""
    said = read_json(root / FILE)
    compared = [v for v in said["variants"] if not v["only_a_start"]]
    messages: dict[str, str] = {}
    cells = _measured(root, said, messages)
    groups = [Cells(v["key"], cells.get(v["key"], {})) for v in compared]
    metrics = _metrics(groups, said)
    by_key = {metric["key"]: metric for metric in metrics}
    quality = metrics[0]
    variants = [
        _variant(v, group, groups, compared, quality, said, metrics) for v, group in zip(compared, groups, strict=True)
    ]
    comparisons = _comparisons(groups, by_key)
    plan = said.get("plan") or {}
    return {
        "schema_version": SCHEMA_VERSION,
        "created": said["created"],
        "command": said["command"],
        "title": said["options"]["title"] or _title(said, compared),
        "sentence": sentence(
            quality,
            by_key,
            variants,
            comparisons,
            {v["key"] for v in compared if v["skipped"]},
            _quiet(groups),
            sum(data["eval_rows"] for data in said["data"]),
        ),
        "model": said["model"],
        "data": said["data"],
        "machine": said["machine"],
        "versions": said["versions"],
        "settings": _settings(said, compared),
        "metrics": [{k: v for k, v in metric.items() if k != "currency"} for metric in metrics],
        "variants": variants,
        "baselines": _baselines(root, said, groups, compared, by_key),
        "comparisons": comparisons,
        "convergence": _convergence(groups),
        "pareto": _pareto(groups, metrics),
        "plan": {"seconds": plan.get("seconds"), "cost": plan.get("cost"), "without": plan.get("without", [])},
        "cells": _cell_list(said, cells, messages),
        "commands": [said["command"], *(v["command"] for v in compared if v["skipped"] is None)],
        "notes": _notes(said, compared, groups, comparisons, quality),
        "warnings": _warnings(said, compared, groups, cells, messages),
    }


def _measured(root: Path, said: Mapping[str, Any], messages: dict[str, str]) -> dict[str, dict[int, Measured]]:
    """Finished cells by variant and seed; a chain's with what came before. Damaged ones go into `messages`."""
    price = said["price"]["amount"] if said["price"] is not None else None
    by_id: dict[str, Measured] = {}
    found: dict[str, dict[int, Measured]] = {}
    for cell in said["cells"]:
        path = root / "cells" / cell["id"]
        if not (path / RESULT).is_file():  # written last: what failed afterwards is a metric or a merge
            continue
        try:
            made = measure(path, price, said.get("asked"))
        except HalfbyteError as error:
            messages[cell["id"]] = str(error)
            continue
        if cell["source"] is not None:
            if cell["source"] not in by_id:
                continue
            made = after(by_id[cell["source"]], made)
        by_id[cell["id"]] = made
        found.setdefault(cell["variant"], {})[cell["seed"]] = made
    return found


# ---------------------------------------------------------------- metrics


def _metrics(groups: Sequence[Cells], said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was measured anywhere. The first decides: as asked for, else the first of the task's own, else the loss."""
    names = dict.fromkeys(n for g in groups for m in g.by_seed.values() for n in m.task_metrics)
    made: list[dict[str, Any]] = [
        {"key": name, "label": name.replace("_", " "), "better": "higher", "unit": "share", "quality": True}
        for name in names
        if not name.startswith(("rewards/", "logps/")) or name == "rewards/accuracies"
    ]
    for metric in made:
        values = [value for group in groups for value in group.values(metric["key"])]
        if any(not 0 <= value <= 1 for value in values):
            metric["unit"] = "loss"  # a number without a unit, four digits after the point
    made.append({"key": EVAL_LOSS, "label": "held-out loss", "better": "lower", "unit": "loss", "quality": True})
    made.sort(key=lambda metric: metric["key"] != said["options"]["quality"])
    currency = said["price"]["currency"] if said["price"] is not None else ""
    for key, label, better, unit in _METRICS:
        if any(group.values(key) for group in groups):
            if unit == "money":
                label = f"{label} ({currency})"
            made.append({"key": key, "label": label, "better": better, "unit": unit, "quality": False})
            if unit == "money":
                made[-1]["currency"] = currency
    return made


def _baselines(
    root: Path,
    said: Mapping[str, Any],
    groups: Sequence[Cells],
    compared: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """The untrained model, in 16 bits where a variant holds it so, else as the first does; the commonest label."""
    order = sorted(
        zip(compared, groups, strict=True), key=lambda pair: (pair[0]["config"]["method"] == "qlora", pair[0]["key"])
    )
    made: dict[str, Any] = {}
    asked = said.get("baseline")
    measured = read_json(root / BASELINE) if asked is not None and is_measured(root / BASELINE, asked) else {}
    for name in metrics:
        if not metrics[name]["quality"]:
            continue
        values = next(
            (v for _, g in order if (v := [m.base[name] for m in g.by_seed.values() if name in m.base])), None
        )
        base = measured.get(name) if name != EVAL_LOSS else None
        if base is None and values:
            base = sum(values) / len(values)
        shares = [m.majority for g in groups for m in g.by_seed.values() if m.majority is not None]
        majority = sum(shares) / len(shares) if shares and name == ACCURACY else None
        if base is not None or majority is not None:
            made[name] = {"base": base, "majority": majority}
    return made


# ---------------------------------------------------------------- variants


def _variant(
    said: Mapping[str, Any],
    cells: Cells,
    groups: Sequence[Cells],
    compared: Sequence[Mapping[str, Any]],
    quality: Mapping[str, Any],
    whole: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    config, plan = said["config"], said["plan"]
    adapters, quantized = config["method"] != "full", config["method"] == "qlora"
    chained = said["continue_from"] is not None
    figures = {metric["key"]: _bounded(cells.figure(metric["key"]), metric) for metric in metrics}
    own_blocks = whole["model"]["quantized_source"] is not None and quantized and not config["requantize"]
    components, counted = _components(cells, plan)
    return {
        "key": said["key"],
        "label": said["label"],
        "method_name": said["method_name"],
        "fields": said["fields"],
        "precision": _precision(config, own_blocks),
        "quant_type": config["quant_type"] if quantized and not own_blocks else None,
        "blocksize": config["blocksize"] if quantized and not own_blocks else None,
        "double_quant": config["double_quant"] if quantized and not own_blocks else None,
        "paged": config["optim"].startswith("paged"),
        "optim": config["optim"],
        "lora_r": config["lora_r"] if adapters else None,
        "target_modules": config["target_modules"] if adapters else None,
        "learning_rate": said["learning_rate"],
        "hardware": said["hardware"],
        "command": said["command"],
        "figures": {name: None if figure is None else figure.as_dict() for name, figure in figures.items()},
        "against_full": _against_full(cells, groups, compared, quality),
        "components": components,
        "components_measured": counted,
        "peak_phase": plan["peak_phase"] if plan else None,
        "predicted": {key: plan[key] for key in ("peak_memory_bytes", "seconds")} if plan and not chained else {},
        "curves": _curves(cells),
        "cells": [cell["id"] for cell in whole["cells"] if cell["variant"] == said["key"]],
        "notes": _variant_notes(said, cells, whole),
    }


def _bounded(figure: Figure | None, metric: Mapping[str, Any]) -> Figure | None:
    """An interval without what the figure cannot be: no time, memory or loss is below 0, and no share above 1."""
    if figure is None or figure.low is None or figure.high is None or min(figure.values) < 0:
        return figure
    of_users = metric["quality"] and metric["unit"] != "share" and metric["key"] != EVAL_LOSS  # it may be any number
    low, high = (figure.low if of_users else max(figure.low, 0.0)), figure.high
    return replace(figure, low=low, high=min(high, 1.0) if metric["quality"] and metric["unit"] == "share" else high)


def _components(cells: Cells, plan: Mapping[str, Any] | None) -> tuple[dict[str, float], bool]:
    """Bytes by component without those of none, and whether they were measured: the runs' mean, else the plan's."""
    told = [measured.components for measured in cells.by_seed.values()]
    if told and all(told):
        names = dict.fromkeys(name for one in told for name in one)
        means = {name: statistics.fmean(one.get(name, 0) for one in told) for name in names}
        return {name: size for name, size in means.items() if size}, True
    planned = plan["memory_by_component"][plan["peak_phase"]] if plan else {}
    return {name: size["p50"] for name, size in planned.items() if size["p50"]}, False


def _precision(config: Mapping[str, Any], own_blocks: bool) -> str:
    if config["method"] != "qlora":
        return str(config["dtype"])
    return "the file's own blocks" if own_blocks else str(config["quant_type"])


def _variant_notes(said: Mapping[str, Any], cells: Cells, whole: Mapping[str, Any]) -> list[str]:
    notes = []
    if said["skipped"] is not None:
        notes.append(f"not run here: {said['skipped']}")
    if said["continue_from"] is not None:
        notes.append(
            f"goes on from the adapter of {said['continue_from']}: time, energy and cost are of both runs, the peak is "
            "the higher one, and the second run begins its order of rows and its learning rate anew"
        )
    missing = len(whole["seeds"]) - len(cells.by_seed)
    if missing and said["skipped"] is None:
        notes.append(f"{missing} of {len(whole['seeds'])} runs are missing")
    others = sorted({m.origin for m in cells.by_seed.values() if m.origin != "this comparison"})
    notes += [f"some of its runs are from {origin}" for origin in others]
    return notes


def _against_full(
    cells: Cells, groups: Sequence[Cells], compared: Sequence[Mapping[str, Any]], quality: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A score as a share of full fine-tuning's; of a loss, the share of what full fine-tuning took off the base's.

    None where full fine-tuning gained nothing with a seed: the seeds at which it did, alone, would flatter it.
    """
    plain = [v["key"] for v in compared if v["method_name"] == "full" and v["continue_from"] is None]
    full = next((group for group in groups if plain and group.key == plain[0]), None)
    if full is None or full is cells:
        return None
    metric, shares = quality["key"], []
    for seed in full.seeds(metric):
        mine = cells.by_seed.get(seed)
        if mine is None or metric not in mine.figures:
            continue
        own, theirs = mine.figures[metric], full.by_seed[seed].figures[metric]
        zero = 0.0 if quality["better"] == "higher" else full.by_seed[seed].base.get(metric)
        if zero is None or (theirs <= zero if quality["better"] == "higher" else theirs >= zero):
            return None
        shares.append((own - zero) / (theirs - zero))
    return {"metric": metric, "share": mean_interval(shares).as_dict()} if shares else None


def _curves(cells: Cells) -> dict[str, Any]:
    runs = list(cells.by_seed.values())
    size = -(-max((len(run.train) for run in runs), default=0) // CURVE_POINTS)
    return {
        "train": _curve([_thinned(run.train, size) for run in runs]),
        "eval": _curve([run.held_out for run in runs]),
    }


def _thinned(points: Sequence[Point], size: int) -> tuple[Point, ...]:
    """Each point the mean of `size` updates, the last one of those that are left."""
    if size <= 1:
        return tuple(points)
    pieces = [points[start : start + size] for start in range(0, len(points), size)]
    return tuple(
        Point(p[-1].step, p[-1].supervised_tokens, p[-1].seconds, sum(x.loss for x in p) / len(p)) for p in pieces
    )


def _curve(runs: Sequence[Sequence[Point]]) -> list[dict[str, Any]]:
    """The mean over seeds at every update that all runs have, with its interval."""
    if not runs:
        return []
    by_step = [{point.step: point for point in run} for run in runs]
    made = []
    for step in sorted(set.intersection(*(set(points) for points in by_step))):
        points = [points[step] for points in by_step]
        figure = mean_interval([point.loss for point in points])
        made.append(
            {
                "supervised_tokens": round(sum(point.supervised_tokens for point in points) / len(points)),
                "seconds": sum(point.seconds for point in points) / len(points),
                "mean": figure.mean,
                "low": figure.low,
                "high": figure.high,
            }
        )
    return made


# ---------------------------------------------------------------- between variants


def _comparisons(groups: Sequence[Cells], metrics: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for metric in metrics.values():
        if not metric["quality"] and metric["key"] not in COMPARED:
            continue
        for a, b in itertools.combinations(groups, 2):
            found = difference(a, b, metric["key"])
            if found is not None:
                made.append(_comparison(a, b, metric, *found))
    return made


def difference(a: Cells, b: Cells, metric: str) -> tuple[Difference, bool] | None:
    """(a minus b over the seeds that both have, whether rows were paired too); None where there is no such seed.

    Memory and time are compared on one machine only: a seed that one variant ran elsewhere is left out.
    """
    seeds = [seed for seed in a.seeds(metric) if seed in b.seeds(metric)]
    if metric in COMPARED:
        seeds = [seed for seed in seeds if a.by_seed[seed].machine == b.by_seed[seed].machine]
    if not seeds:
        return None
    rows = [(a.by_seed[seed].rows.get(metric), b.by_seed[seed].rows.get(metric)) for seed in seeds]
    paired = [(one, other) for one, other in rows if one is not None and other is not None and one.pairs_with(other)]
    if len(paired) == len(seeds):
        return row_difference([one for one, _ in paired], [other for _, other in paired]), True
    return paired_difference(a.values(metric, seeds), b.values(metric, seeds)), False


def _comparison(a: Cells, b: Cells, metric: dict[str, Any], found: Difference, by_row: bool) -> dict[str, Any]:
    lower = found.mean < 0
    better = "a" if lower == (metric["better"] == "lower") else "b"
    verdict = f"{better} better" if found.found else "no difference found"
    return {
        "a": a.key,
        "b": b.key,
        "metric": metric["key"],
        "difference": found.as_dict(),
        "detectable": found.detectable,
        "verdict": verdict,
        "paired_by": "seed and row" if by_row else "seed",
        "sentence": _said(a.key, b.key, metric, found),
    }


def _said(a: str, b: str, metric: dict[str, Any], found: Difference) -> str:
    label, size = metric["label"], wording.difference(found.mean, metric)
    if found.low is None or found.high is None:
        if not found.mean:
            return f"{label}: {a} and {b} are equal with one seed, which says nothing of other seeds."
        side = "lower" if found.mean < 0 else "higher"
        return f"{label}: {a} is {side} than {b} by {size} with one seed, which says nothing of other seeds."
    ends = [wording.difference(value, metric) for value in (found.low, found.high)]
    signed = [f"{'-' if value < 0 else ''}{text}" for value, text in zip((found.low, found.high), ends, strict=True)]
    between = f"95 %: {signed[0]} to {signed[1]}"
    if found.found:
        return f"{label}: {a} is {'lower' if found.mean < 0 else 'higher'} than {b} by {size} ({between})."
    least = f"; one of {wording.difference(found.detectable, metric)} would have been found" if found.detectable else ""
    return f"{label}: no difference found between {a} and {b} ({between}){least}."


def _convergence(groups: Sequence[Cells]) -> list[dict[str, Any]]:
    """What it took to come down to some held-out losses, `_levels`."""
    made = []
    for loss in _levels(groups):
        rows = []
        for group in groups:
            found = [at for m in group.by_seed.values() if (at := reached(m.held_out, loss)) is not None]
            rows.append(
                {
                    "variant": group.key,
                    "reached": len(found),
                    "at_first": sum(at.at_first for at in found),
                    "supervised_tokens": _spent([at.supervised_tokens for at in found]),
                    "seconds": _spent([at.seconds for at in found]),
                }
            )
        made.append({"loss": loss, "rows": rows})
    return made


def _spent(values: Sequence[float]) -> dict[str, Any] | None:
    figure = _bounded(mean_interval(values), _SPENT) if values else None
    return None if figure is None else figure.as_dict()


def _levels(groups: Sequence[Cells]) -> list[float]:
    """Held-out losses whose reaching is told, the highest first: the last of the worst variant, to which all come near;
    half way up from there to where the first evaluations left off, if they did above it; that of the middle variant."""
    losses = sorted(figure.mean for group in groups if (figure := group.figure(EVAL_LOSS)) is not None)
    runs = [measured for group in groups for measured in group.by_seed.values()]
    firsts = [loss for run in runs if (loss := first_loss(run.held_out)) is not None]
    if not losses or not firsts:
        return []
    worst, middle, begins = losses[-1], losses[(len(losses) - 1) // 2], min(firsts)
    levels = [worst + (begins - worst) / 2] if begins > worst else []
    return list(dict.fromkeys(float(f"{level:.4g}") for level in (*levels, worst, middle)))


def _pareto(groups: Sequence[Cells], metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    made = []
    for metric in metrics:
        if not metric["quality"]:
            continue
        sign = 1 if metric["better"] == "lower" else -1
        points: list[tuple[str, float, float, float]] = []
        for group in groups:
            quality, memory, seconds = (group.figure(n) for n in (metric["key"], "peak_memory_bytes", "seconds"))
            if quality is not None and memory is not None and seconds is not None:
                points.append((group.key, quality.mean, memory.mean, seconds.mean))
        front = pareto([(sign * q, m, s) for _, q, m, s in points])
        if points:
            made.append(
                {
                    "quality_metric": metric["key"],
                    "points": [
                        {"variant": key, "quality": q, "memory": m, "seconds": s, "on_front": on}
                        for (key, q, m, s), on in zip(points, front, strict=True)
                    ],
                }
            )
    return made


# ---------------------------------------------------------------- what is said around


def _title(said: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(data["name"] for data in said["data"])
    return f"{', '.join(v['label'] for v in compared)} on {said['model']['name']}, {names}"


def _busy(groups: Sequence[Cells]) -> list[float]:
    """The shares of the processor that other work took beside runs, where that was more than a quiet machine's."""
    return [m.others for g in groups for m in g.by_seed.values() if m.others is not None and m.others > QUIET]


def _quiet(groups: Sequence[Cells]) -> bool | None:
    """Whether the runs had the processor for themselves, as far as it is known; None: it is of no run of a variant."""
    if _busy(groups):
        return False
    known = [any(m.others is not None for m in group.by_seed.values()) for group in groups if group.by_seed]
    return True if all(known) else None


def _settings(said: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    work = compared[0]["work"]
    search = said["tune"]
    return {
        "seeds": said["seeds"],
        "steps": work["steps"],
        "supervised_tokens": work["supervised_tokens"],
        "tune_lr": None if search is None else {name: search[name] for name in ("grid", "chosen", "steps")},
        "side_by_side": said["options"]["jobs"] > 1,
    }


def _cell_list(
    said: Mapping[str, Any], cells: Mapping[str, Mapping[int, Measured]], messages: Mapping[str, str]
) -> list[dict[str, Any]]:
    made, compared = [], {v["key"] for v in said["variants"] if not v["only_a_start"]}
    for cell in said["cells"]:
        if cell["variant"] not in compared:
            continue
        measured = cells.get(cell["variant"], {}).get(cell["seed"])
        message = said.get("failed", {}).get(cell["id"]) or messages.get(cell["id"])
        made.append(
            {
                "id": cell["id"],
                "variant": cell["variant"],
                "seed": cell["seed"],
                "path": f"cells/{cell['id']}",
                "status": "done" if measured is not None else "failed" if message else "missing",
                "origin": "this comparison" if measured is None else measured.origin,
                "seconds": None if measured is None else measured.figures.get("seconds"),
                "others_share": None if measured is None else measured.others,
                "message": message,
            }
        )
    return made


def _notes(
    said: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]],
    groups: Sequence[Cells],
    comparisons: Sequence[Mapping[str, Any]],
    quality: Mapping[str, Any],
) -> list[str]:
    work = compared[0]["work"]
    seen = work["steps"] * work["rows_per_update"]
    rows = (
        f"{work['train_rows']:,} rows" if seen >= work["train_rows"] else f"{seen:,} of the {work['train_rows']:,} rows"
    )
    same = (
        f"With a seed, every variant saw the same {rows} in the same order, {work['rows_per_update']} an update for "
        f"{work['steps']} updates: {work['supervised_tokens']:,} supervised tokens with the first seed. Packing and "
        "micro-batches lay rows out in memory and change no update."
    )
    notes = [
        *([same] if _equal(compared) and _as_long(groups) else []),
        _how_counted(compared, groups),
        "A detectable difference is the true one that these seeds and rows would have found with 80 % power at the 5 % "
        "level.",
    ]
    if comparisons:
        notes.append(
            f"{len(comparisons)} comparisons at the 95 % level: where nothing differs, one in 20 is found by chance."
        )
    if said["tune"] is None:
        notes.append(
            "Learning rates were not searched: every variant has its default or the given one (--tune-lr searches)."
        )
    else:
        notes += _search_notes(said["tune"], compared)
    if quality["better"] == "lower" and any(_against_full(g, groups, compared, quality) for g in groups):
        notes.append("Against full: the share of what full fine-tuning took off the untrained model's held-out loss.")
    return [*notes, *said["notes"]]


def _how_counted(compared: Sequence[Mapping[str, Any]], groups: Sequence[Cells]) -> str:
    counted = [_components(group, None)[1] for group in groups]
    measured = "counted in the runs: their tensors, and what is left of a process's measured peak"
    planned = "planned: not every run counted it (resumed and older runs, a GPU, what does not fit here)"
    if all(counted):
        return f"Memory by component is {measured}."
    if not any(counted):
        return f"Memory by component is {planned}."
    names = wording.names([v["label"] for v, is_counted in zip(compared, counted, strict=True) if not is_counted])
    return f"Memory by component is {measured}. Of {names} it is {planned}."


def _equal(compared: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all variants learned from the same."""
    return len({tuple(v["work"][k] for k in ("data", "rows_per_update", "supervised_tokens")) for v in compared}) == 1


def _as_long(groups: Sequence[Cells]) -> bool:
    """Whether the runs of each seed went through as many supervised tokens; early stopping ends some sooner."""
    seen: dict[int, set[int]] = {}
    for group in groups:
        for seed, measured in group.by_seed.items():
            if measured.train:
                seen.setdefault(seed, set()).add(measured.train[-1].supervised_tokens)
    return all(len(counts) == 1 for counts in seen.values())


def _without_metrics(said: Mapping[str, Any], groups: Sequence[Cells]) -> list[str]:
    """Metrics that were asked for and that runs lack which are there otherwise."""
    asked = [name.rpartition(":")[2] for name in (said.get("asked") or {}).get("metrics", [])]
    found = []
    for group, name in itertools.product(groups, asked):
        lacking = len(group.by_seed) - len(group.values(name))
        if lacking:
            found.append(
                f"{group.key}: {name} is not known of {lacking} of {len(group.by_seed)} runs: it failed, or what they "
                "trained is not there any more (--keep keeps fully trained weights)"
            )
    return found


def _search_notes(search: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was tried, and where a better rate may lie beyond."""
    counts = sorted({len(rates) for rates in search["grid"].values()}) or [0]
    tries = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    notes = [
        f"Learning rates were searched: {tries} a variant, {search['steps']} updates each with a seed of their "
        f"own ({search['seed']}), by held-out loss on the rows of this report."
    ]
    for key, chosen in search["chosen"].items():
        rates = search["grid"][key]
        if len(rates) > 1 and chosen in (min(rates), max(rates)):
            notes.append(
                f"{key}: the best learning rate ({chosen:g}) is at an end of its grid: a better one may lie beyond."
            )
    without = [key for key in search["grid"] if key not in search["chosen"]]
    notes += [f"{key}: no run of its search finished: it kept its own rate." for key in without]
    left_out = [v["key"] for v in compared if v["key"] not in search["grid"]]
    notes += [f"{key}: its learning rate was not searched: it has its own." for key in left_out]
    return notes


def _warnings(
    said: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]],
    groups: Sequence[Cells],
    cells: Mapping[str, Mapping[int, Measured]],
    messages: Mapping[str, str],
) -> list[str]:
    found = [f"{v['label']} was not run here: {v['skipped']}" for v in compared if v["skipped"] is not None]
    failed = said.get("failed", {})
    done = {cell["id"] for cell in said["cells"] if cell["seed"] in cells.get(cell["variant"], {})}
    labels = {cell["id"]: f"{cell['variant']}, seed {cell['seed']}" for cell in said["cells"]}
    found += [
        f"{labels.get(key, key)} {'is not measured whole' if key in done else 'failed'}: {message}"
        for key, message in {**failed, **messages}.items()
    ]
    runnable = [group for v, group in zip(compared, groups, strict=True) if not v["skipped"]]
    missing = sum(len(said["seeds"]) - len(group.by_seed) for group in runnable)
    if missing:
        found.append(f"{missing} runs are missing: the figures are of the others")
    if len(said["seeds"]) == 1:
        found.append("One seed: there are no intervals over seeds, and no difference can be told from chance.")
    if said["options"]["jobs"] > 1:
        found.append("Runs were made side by side: times and rates are of a shared machine.")
    if not _equal(compared):
        found.append("The variants did not learn from the same: rows or supervised tokens differ (--unequal).")
    elif not _as_long(groups):
        found.append("Not all runs of a seed saw the same number of supervised tokens: some ended early.")
    if busy := _busy(groups):
        found.append(
            f"Other work took up to {max(busy):.0%} of the processor beside {len(busy)} of "
            f"{sum(len(group.by_seed) for group in groups)} runs: their times are of a shared machine."
        )
    elif _quiet(groups) is None:
        found.append(
            "What else the processor did beside the runs is not known (they were interrupted, or are of elsewhere): "
            "their times may be of a shared machine."
        )
    found += [
        f"{group.key}, seed {seed}: memory ran short, and it went on in a layout that takes less: its time is of both"
        for group in groups
        for seed, measured in group.by_seed.items()
        if measured.lowered
    ]
    found += _without_metrics(said, groups)
    asked = said["options"]["quality"]
    if asked is not None and not any(asked in m.figures for runs in cells.values() for m in runs.values()):
        found.append(f"{asked}, by which variants were to be judged, was not measured: another metric decides.")
    origins = sorted({m.origin for runs in cells.values() for m in runs.values()} - {"this comparison"})
    if any(origin.startswith("another machine") for origin in origins):
        found.append("Some runs are of another machine: times and memory beside theirs are not of one machine.")
    return found
