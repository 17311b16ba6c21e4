"""Other people's dashboards as listeners of events: tensorboard, wandb, mlflow, trackio.

    listeners = open_sinks(options.report_to, run_path, config)

Each is imported only when asked for. All get the same numbers under the same names: every figure of a `step` event as
train/<name>, with train/tokens_per_second, and every figure of an `eval` event as eval/<name>. A sink that fails while
training goes on is dropped with a warning event: an outage of a web service is no reason to lose a run.

The ids under which a service knows the run are kept in RUN/sinks.json, so a resumed run continues its curves.
"""

import contextlib
import json
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import write_atomic
from halfbyte.train.events import Event

SINKS_FILE = "sinks.json"
PROJECT = "halfbyte"
_NOT_FIGURES = ("event", "time", "step")


class Sink(Protocol):
    """A listener that wants to know when it is over."""

    name: str

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None: ...


def open_sinks(names: Iterable[str], run: Path, config: Mapping[str, Any]) -> list[Sink]:
    """The sinks of a run by name. UsageError for a name that nobody knows or a package that is not installed."""
    makers: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {
        "tensorboard": TensorBoard,
        "wandb": WandB,
        "mlflow": MLflow,
        "trackio": Trackio,
    }
    sinks: list[Sink] = []
    for name in names:
        if name not in makers:
            raise UsageError(f"report_to: there is no {name}; choose from {', '.join(makers)}")
        try:
            sinks.append(makers[name](run, config))
        except ImportError as error:
            raise UsageError(
                f"report_to: {name} is not installed ({error}): pip install 'halfbyte[track]', or pip install {name}"
            ) from None
        except Exception as error:
            raise HalfbyteError(f"report_to: {name} could not be started: {error}") from error
    return sinks


def figures(event: Event) -> dict[str, float]:
    """The numbers of a step or eval event under the names that every sink shows."""
    if event["event"] not in ("step", "eval"):
        return {}
    prefix = "train" if event["event"] == "step" else "eval"
    found = {
        f"{prefix}/{key}": float(value)
        for key, value in event.items()
        if key not in _NOT_FIGURES and isinstance(value, int | float) and not isinstance(value, bool)
    }
    if event["event"] == "step" and event["seconds"] > 0:
        found["train/tokens_per_second"] = event["tokens"] / event["seconds"]
    return found


def run_id(run: Path, name: str, new: str | None = None) -> str | None:
    """The id of this run at a service, from sinks.json; `new` is noted if there is none."""
    path = run / SINKS_FILE
    known: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        known = json.loads(path.read_bytes())
    if name not in known and new is not None:
        known = {"schema_version": 1, **known, name: new}
        write_atomic(path, json.dumps(known, indent=1) + "\n")
    found = known.get(name)
    return None if found is None else str(found)


class TensorBoard:
    """Event files in RUN/tensorboard. A resumed run purges what it repeats."""

    name = "tensorboard"

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import_module("tensorboard")
        self._make = import_module("torch.utils.tensorboard").SummaryWriter
        self._folder = run / "tensorboard"
        self._config = json.dumps(config, indent=1, default=str)
        self._writer: Any = None

    def __call__(self, event: Event) -> None:
        if event["event"] in ("start", "resume"):
            self._writer = self._make(str(self._folder), purge_step=event["step"] + 1 if event["step"] else None)
            self._writer.add_text("config", f"```\n{self._config}\n```", 0)
        for name, value in figures(event).items():
            self._writer.add_scalar(name, value, event["step"], walltime=event["time"])
        if event["event"] == "warning":
            self._writer.add_text("warnings", event["message"], event["step"])
        if event["event"] in ("eval", "checkpoint", "end"):
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline works as always."""

    name = "wandb"

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        module = import_module("wandb")
        self._run = module.init(
            project=PROJECT,
            name=run.name,
            dir=str(run),
            id=run_id(run, self.name, uuid.uuid4().hex[:8]),
            resume="allow",
            config=_plain(config),
        )
        # wandb's own step never goes back; ours does when a run is resumed.
        self._run.define_metric("train/*", step_metric="step")
        self._run.define_metric("eval/*", step_metric="step")

    def __call__(self, event: Event) -> None:
        if found := figures(event):
            self._run.log({"step": event["step"], **found})
        if event["event"] == "end":
            self._run.summary.update({"status": event["status"]})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow's tracking API, at MLFLOW_TRACKING_URI or where MLflow keeps its things by default."""

    name = "mlflow"

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        tracking = import_module("mlflow.tracking")
        self._entities = import_module("mlflow.entities")
        self._client = tracking.MlflowClient()
        known = run_id(run, self.name)
        if known is None:
            experiment = self._client.get_experiment_by_name(PROJECT)
            where = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
            known = run_id(run, self.name, self._client.create_run(where, run_name=run.name).info.run_id)
            for key, value in _plain(config).items():
                self._client.log_param(known, key, str(value)[:500])
        else:
            self._client.update_run(known, status="RUNNING")
        self._id = known
        self._status = "FAILED"

    def __call__(self, event: Event) -> None:
        if found := figures(event):
            stamp = int(event["time"] * 1000)
            metrics = [self._entities.Metric(k, v, stamp, event["step"]) for k, v in found.items()]
            self._client.log_batch(self._id, metrics=metrics)
        if event["event"] == "end":
            self._status = {"failed": "FAILED", "interrupted": "KILLED"}.get(event["status"], "FINISHED")

    def close(self) -> None:
        self._client.set_terminated(self._id, status=self._status)


class Trackio:
    """Trackio keeps runs on this machine (TRACKIO_DIR) unless a Space is configured."""

    name = "trackio"

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        self._module = import_module("trackio")
        name = run_id(run, self.name, f"{run.name}-{uuid.uuid4().hex[:6]}")
        with contextlib.redirect_stdout(sys.stderr):  # it prints, and our standard output may be JSON
            self._run = self._module.init(
                project=PROJECT, name=name, config=_plain(config), resume="allow", embed=False
            )

    def __call__(self, event: Event) -> None:
        if found := figures(event):
            self._run.log(found, step=event["step"])

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._module.finish()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON values, which every service takes."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    return plain
