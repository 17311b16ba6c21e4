"""A finished cell's figures, read from its small files.

The first updates of a process are slower than the rest (memory is touched for the first time, workspaces grow): up to
three of them are *warm-up*, counted apart from the step time and the rate. So are the first ones after a resume.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte.compare.cells import CELL, EVALUATION, MERGE, METRIC_ROWS, is_measured, machine_name
from halfbyte.compare.statistics import Rows
from halfbyte.evaluate.rows_file import NAME as ROWS
from halfbyte.evaluate.rows_file import EvalRow, read_rows
from halfbyte.run.folder import read_json
from halfbyte.train.events import Event, read_events
from halfbyte.train.run_directory import EVENTS, RESULT

WARM_UP = 3
EVAL_LOSS = "eval_loss"
_NO_METRICS = ("loss", "perplexity", "supervised_tokens", "evaluated_rows", "schema_version")


@dataclass(frozen=True)
class Point:
    """A loss at one time of a run: updates, supervised tokens and seconds of updates so far."""

    step: int
    supervised_tokens: int
    seconds: float
    loss: float


@dataclass(frozen=True)
class Measured:
    """One cell. `figures` by metric key, without those that are unknown; `rows` of figures that are means over rows.

    base        figures of the untrained model on the same rows
    majority    share of the commonest label among the held-out rows
    machine     what tells the machine that it ran on (`cells.machine_name`)
    lowered     memory ran short, and it went on in a layout that takes less
    others      the share of the processor that other work took meanwhile; None: not known
    components  bytes by component (`run.components`); empty in a run of a version that did not count them
    """

    figures: Mapping[str, float]
    rows: Mapping[str, Rows]
    base: Mapping[str, float]
    majority: float | None
    train: tuple[Point, ...]
    held_out: tuple[Point, ...]
    origin: str
    machine: str | None
    task_metrics: tuple[str, ...]
    lowered: bool = False
    others: float | None = None
    components: Mapping[str, float] = field(default_factory=dict)


def measure(path: Path, price: float | None = None, asked: Mapping[str, Any] | None = None) -> Measured:
    """The figures of the cell in `path`. `price`: money an hour; `asked`: the metrics that count, and on which rows.

    UsageError for damaged files.
    """
    result, events = read_json(path / RESULT), read_events(path / EVENTS)
    cell = read_json(path / CELL) if (path / CELL).is_file() else {}
    train, held_out = _curves(events)
    figures: dict[str, float | None] = {EVAL_LOSS: result["eval_loss"]}
    scores = {k: v for k, v in result["metrics"].items() if _is_score(k, v)}
    base = {k: v for k, v in result["metrics"].get("base", {}).items() if k in scores}
    if result["base_eval_loss"] is not None:
        base[EVAL_LOSS] = result["base_eval_loss"]
    rows, majority = _rows(path / ROWS)
    if asked is not None and is_measured(path / EVALUATION, asked):
        more = {k: v for k, v in read_json(path / EVALUATION).items() if _is_score(k, v)}
        scores |= more
        found, _ = _rows(path / METRIC_ROWS)
        rows |= {name: found[name] for name in more if name in found}
        rows = {name: value for name, value in rows.items() if name not in more or name in found}
    figures |= scores
    figures |= _speed(events)
    peaks = [e["peak_memory_bytes"] for e in events if e.get("peak_memory_bytes") is not None]
    figures |= {
        "peak_memory_bytes": max([*peaks, result["peak_memory_bytes"]]),
        "seconds": result["seconds"],
        "trainable_parameters": next((e["trainable_parameters"] for e in events if "trainable_parameters" in e), None),
        "adapter_bytes": cell.get("adapter_bytes"),
        "checkpoint_bytes": next((e["bytes"] for e in reversed(events) if e["event"] == "checkpoint"), None),
        "merge_loss": read_json(path / MERGE)["loss"] if (path / MERGE).is_file() else None,
        "energy_joules": cell.get("energy_joules"),
        "cost": None if price is None else result["seconds"] / 3600 * price,
    }
    known = {name: float(value) for name, value in figures.items() if value is not None and math.isfinite(value)}
    if held_out and EVAL_LOSS in base:
        held_out = (Point(0, 0, 0.0, base[EVAL_LOSS]), *held_out)
    origin = str(cell.get("origin", "this comparison"))
    machine = machine_name(cell.get("machine", {}))
    lowered = any((result.get("layout") or {}).values())
    return Measured(
        known, rows, base, majority, train, held_out, origin, machine, tuple(scores), lowered, cell.get("others_share"),
        result.get("memory_by_component", {}),
    )  # fmt: skip


def after(source: Measured, own: Measured) -> Measured:
    """A run that went on from another's adapter, as one: both runs' time, tokens, energy and cost, the higher peak."""
    figures = dict(own.figures)
    for name in ("seconds", "energy_joules", "cost", "warmup_seconds"):
        if name in figures:
            if name in source.figures:
                figures[name] += source.figures[name]
            else:
                del figures[name]
    higher = max(source, own, key=lambda run: run.figures["peak_memory_bytes"])
    figures["peak_memory_bytes"] = higher.figures["peak_memory_bytes"]
    last = source.train[-1] if source.train else Point(0, 0, 0.0, 0.0)

    def moved(points: Sequence[Point]) -> tuple[Point, ...]:
        return tuple(
            Point(p.step + last.step, p.supervised_tokens + last.supervised_tokens, p.seconds + last.seconds, p.loss)
            for p in points
            if p.step
        )

    return replace(
        own,
        figures=figures,
        base=source.base,
        train=(*source.train, *moved(own.train)),
        held_out=(*source.held_out, *moved(own.held_out)),
        machine=own.machine if own.machine == source.machine else f"{source.machine} and {own.machine}",
        lowered=source.lowered or own.lowered,
        others=None if source.others is None or own.others is None else max(source.others, own.others),
        components=higher.components,
    )


def _is_score(name: str, value: Any) -> bool:
    return name not in _NO_METRICS and isinstance(value, int | float) and not isinstance(value, bool)


def _rows(path: Path) -> tuple[dict[str, Rows], float | None]:
    """Figures by row, and the share of the commonest label; nothing for a run of before there was such a file."""
    if not path.is_file():
        return {}, None
    found = read_rows(path)
    names = tuple(row.row for row in found)
    made = {EVAL_LOSS: Rows(names, _array([row.nll for row in found]), _array([row.tokens for row in found]))}
    for metric in dict.fromkeys(name for row in found for name in row.scores):
        scored = [row for row in found if metric in row.scores]
        values = _array([row.scores[metric] for row in scored])
        made[metric] = Rows(tuple(row.row for row in scored), values, np.ones(len(scored)))
    return made, _majority(found)


def _majority(rows: Sequence[EvalRow]) -> float | None:
    labels = [row.label for row in rows if row.label is not None]
    return max(labels.count(label) for label in set(labels)) / len(labels) if labels else None


def _array(values: Sequence[float]) -> Any:
    return np.asarray(values, dtype=np.float64)


def _curves(events: Sequence[Event]) -> tuple[tuple[Point, ...], tuple[Point, ...]]:
    """Training and held-out losses over the run. A resumed run's events have every step once."""
    train: list[Point] = []
    held_out: list[Point] = []
    tokens, seconds = 0, 0.0
    for event in events:
        if event["event"] == "step":
            tokens += event["supervised_tokens"]
            seconds += event["seconds"]
            if event["loss"] is not None:
                train.append(Point(event["step"], tokens, seconds, event["loss"]))
        elif event["event"] == "eval" and event["loss"] is not None:
            held_out.append(Point(event["step"], tokens, seconds, event["loss"]))
    return tuple(train), tuple(held_out)


def _speed(events: Sequence[Event]) -> dict[str, float | None]:
    """Seconds an update and tokens a second without warm-up, and what the warm-up's updates took."""
    steady: list[tuple[float, int, int]] = []
    warm_seconds, since, before = 0.0, 0, 0
    all_steps = sum(event["event"] == "step" for event in events)
    warm_up = min(WARM_UP, max(1, all_steps // 4))
    for event in events:
        if event["event"] in ("start", "resume"):
            since, before = 0, event["step"]
        elif event["event"] == "step":
            updates = event["step"] - before
            since, before = since + 1, event["step"]
            if since <= warm_up:
                warm_seconds += event["seconds"]
            else:
                steady.append((event["seconds"], updates, event["tokens"]))
    if not steady:
        return {"warmup_seconds": warm_seconds}
    seconds = sum(s for s, _, _ in steady)
    return {
        "step_seconds": float(np.median([s / max(updates, 1) for s, updates, _ in steady])),
        "tokens_per_second": sum(tokens for _, _, tokens in steady) / seconds if seconds > 0 else None,
        "warmup_seconds": warm_seconds,
    }


@dataclass(frozen=True)
class Reaching:
    """When a run first had a loss. `at_first`: its first evaluation was below it already, and that one counts."""

    supervised_tokens: float
    seconds: float
    at_first: bool = False


def reached(points: Sequence[Point], loss: float) -> Reaching | None:
    """When the held-out loss first was `loss`, by straight lines between evaluations; None where it never was.

    Not between the untrained model and the first evaluation: most of what is learned is learned there, far from a
    straight line, so that a run that is evaluated more often would seem the faster one.
    """
    for number, point in enumerate(points):
        if point.loss <= loss:
            last = points[number - 1] if number else None
            if last is None or last.step == 0:
                return Reaching(float(point.supervised_tokens), point.seconds, point.step > 0)
            share = (last.loss - loss) / (last.loss - point.loss)
            tokens = last.supervised_tokens + share * (point.supervised_tokens - last.supervised_tokens)
            return Reaching(tokens, last.seconds + share * (point.seconds - last.seconds))
    return None


def first_loss(points: Sequence[Point]) -> float | None:
    """The held-out loss of the first evaluation after training began."""
    return next((point.loss for point in points if point.step), None)
