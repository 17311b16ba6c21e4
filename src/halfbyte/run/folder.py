"""The folder of a run as a database: what is written in it about what it ran on, and how others read it."""

import datetime
import json
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halfbyte import ops
from halfbyte.errors import UsageError
from halfbyte.evaluate.evaluate import EvaluateResult, RowResult
from halfbyte.files import write_atomic
from halfbyte.run.config import RECORD_KEY, SCHEMA_VERSION, RunConfig, build, translate
from halfbyte.run.planning import Survey
from halfbyte.train.events import Event, read_events
from halfbyte.train.progress import follow
from halfbyte.train.run_directory import CONFIG, EVENTS, RESULT, is_run, running
from halfbyte.yamlfile import read_yaml

BASE = "base.json"
_PACKAGES = ("halfbyte", "torch", "transformers", "tokenizers", "safetensors")


def record_of(found: Survey) -> dict[str, Any]:
    """What a run was recorded on: base, data, template, versions. Goes into run.yaml."""
    prepared = found.prepared
    assert prepared is not None
    return {
        "schema_version": SCHEMA_VERSION,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "base_model": {
            "name": found.config.model,
            "kind": found.source.kind,
            "revision": found.source.revision,
            "fingerprint": found.source.fingerprint,
        },
        "data": {
            "fingerprint": prepared.fingerprint,
            "format": prepared.data_format,
            "train_rows": len(prepared.train),
            "eval_rows": len(prepared.eval),
        }
        | ({"labels": [choice.word for choice in prepared.labels]} if found.config.task == "classification" else {}),
        "chat_template": {
            "name": prepared.template.name if prepared.template else None,
            "sha256": prepared.template_hash,
        },
        "backend": ops.backend().name,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def require_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UsageError naming the first of base, data and template that is not what the run was started with."""
    parts = (
        ("base_model", "fingerprint", "the base model's weights"),
        ("data", "fingerprint", "the data"),
        ("chat_template", "sha256", "the chat template"),
    )
    for part, key, what in parts:
        old, new = before.get(part, {}).get(key), now[part][key]
        if old != new:
            raise UsageError(
                f"{path}: {what} changed since the run was started ({key} {str(old)[:23]}…, now {str(new)[:23]}…): "
                "put it back, or start a new run"
            )


def read_config(path: Path) -> tuple[RunConfig, dict[str, Any]]:
    """(config, record) of a run's folder. UsageError if there is none, or it is damaged."""
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder: give a run's folder (`halfbyte runs` lists them)")
    if not (path / CONFIG).is_file():
        raise UsageError(f"{path} holds no run: it has no {CONFIG} (`halfbyte runs` lists runs)")
    entries = read_yaml(path / CONFIG)
    record = entries[RECORD_KEY].value if RECORD_KEY in entries else None
    if not isinstance(record, dict):
        raise UsageError(f"{path / CONFIG} has no {RECORD_KEY}: it is a config, not a run's own file")
    config = build(translate(entries))
    if (
        config.method == "qlora"
        and record.get("schema_version", 1) < 2
        and record.get("base_model", {}).get("kind") == "gguf"
    ):
        config = config.replace(requantize=True)  # what it was trained on
    return config, record


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run's folder. UsageError if it is damaged."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"{path} is not there") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is damaged: not a JSON object")
    return value


def write_base(path: Path, base: EvaluateResult) -> None:
    """Keep the base's figures on the held-out rows, for a run that trains the base itself."""
    write_atomic(path / BASE, json.dumps(base.to_json(rows=True), indent=1) + "\n")


def read_base(path: Path) -> EvaluateResult | None:
    if not (path / BASE).is_file():
        return None
    value = read_json(path / BASE)
    rows = [RowResult(**row) for row in value["rows"]]
    intervals = {name: (low, high) for name, (low, high) in value["intervals"].items()}
    return EvaluateResult(value["loss"], value["supervised_tokens"], {}, intervals, rows)


def events_of(path: Path, wait: bool = False) -> Iterator[Event]:
    """The events of a run as they come, until it ends; with `wait` also of one that has not begun."""
    if not wait and not is_run(path):
        raise UsageError(f"{path} holds no run (`halfbyte runs` lists them; --wait waits for one)")
    return follow(path, wait_for_start=wait)


@dataclass(frozen=True)
class RunSummary:
    """One line of `halfbyte runs`. `status`: running, completed, stopped_early, failed, or interrupted."""

    path: Path
    status: str
    model: str
    method: str
    step: int
    total_steps: int | None
    eval_loss: float | None
    seconds: float | None
    started: str | None

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "path": str(self.path)}


def list_runs(root: Path) -> list[RunSummary]:
    """Every run below `root` (at most two folders deep), the newest first; damaged ones are listed as that."""
    found = [summary(path) for path in _run_folders(root)]
    return sorted(found, key=lambda run: run.started or "", reverse=True)


def _run_folders(root: Path) -> Iterator[Path]:
    if (root / CONFIG).is_file():
        yield root
        return
    for path in sorted(root.glob("*/")) + sorted(root.glob("*/*/")):
        if (path / CONFIG).is_file():
            yield path


def summary(path: Path) -> RunSummary:
    """What the files of a run say about it."""
    try:
        config, record = read_config(path)
        model, method, started = Path(config.model).name, config.method_name, str(record.get("started"))
        events = read_events(path / EVENTS) if (path / EVENTS).is_file() else []
    except UsageError:
        return RunSummary(path, "damaged", "?", "?", 0, None, None, None, None)
    steps = [event["step"] for event in events if event.get("step") is not None]
    begun = next((event for event in reversed(events) if event["event"] in ("start", "resume")), {})
    ended = events[-1] if events and events[-1]["event"] == "end" else None
    losses = [event["loss"] for event in events if event["event"] == "eval"]
    return RunSummary(
        path=path,
        status=_status(path, ended),
        model=model,
        method=method,
        step=max(steps, default=0),
        total_steps=begun.get("total_steps"),
        eval_loss=losses[-1] if losses else None,
        seconds=ended["seconds"] if ended else None,
        started=started,
    )


def _status(path: Path, ended: Mapping[str, Any] | None) -> str:
    """A run is running while its lock is alive, and complete when its result is there."""
    if running(path) is not None:
        return "running"
    if ended is not None and ended["status"] in ("failed", "stopped_early"):
        return str(ended["status"])
    return "completed" if (path / RESULT).is_file() else "interrupted"
