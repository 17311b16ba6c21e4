"""A run's figures for what learns from them: the time left while it goes on, the machine's history once it is over.

outlook(path, config, prepared)          fields of the training plan that the time left is made from
untouched()                              whether the process's peak will be the run's
remember(path, config, found, result, alone)    plan.json and result.json as a row of `plan.history`
accuracy_here()                          what the rows of this machine say of the predictions
"""

import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from halfbyte import ops
from halfbyte.data import Prepared
from halfbyte.errors import HalfbyteError
from halfbyte.models.spec import ModelSpec
from halfbyte.plan import arithmetic, history
from halfbyte.plan.hardware import detect
from halfbyte.plan.memory import PROCESS_FLOOR
from halfbyte.run import tasks
from halfbyte.run.config import RunConfig
from halfbyte.run.planning import SCORING_LABELS, Survey
from halfbyte.train.events import read_events
from halfbyte.train.memory import process_memory
from halfbyte.train.run_directory import EVENTS, PLAN

FRESH = 1.5 * PROCESS_FLOOR
"""Bytes of a process that has imported what a run needs, and not much else."""


def outlook(path: Path, config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """`predicted` and `final_evaluations` of `train.state.TrainPlan`."""
    return {"predicted": predicted(_plan_of(path)), "final_evaluations": final_evaluations(config, prepared)}


def final_evaluations(config: RunConfig, prepared: Prepared) -> int:
    """Passes over the held-out rows after the last step: the base's unless it is known by then, and the labels'.

    The tuned model's losses are those of the last evaluation.
    """
    if not prepared.eval:
        return 0
    if prepared.pairs or config.task == tasks.CLASSIFICATION:
        return 1
    if config.method == "full":
        return SCORING_LABELS // 2 if prepared.labels else 0
    return SCORING_LABELS if prepared.labels else 1


def predicted(plan: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Seconds by phase as plan.json has them, after the probe where there was one.

    None for a plan of an older version, which had one figure where there is an interval now, or one that was changed.
    """
    if plan is None:
        return None
    try:
        seconds = history.middles(plan["seconds_by_phase"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return {"seconds": seconds, "probed": bool(plan.get("probed"))}


def untouched() -> bool:
    """Before a run: whether this process has had no more memory than one that has just begun. A notebook's peak may be
    whatever was done in it before."""
    return process_memory()[1] < FRESH


def remember(path: Path, config: RunConfig, found: Survey, result: Mapping[str, Any], alone: bool = True) -> str | None:
    """Keep what was predicted and what happened, if anything was. Returns what to warn of; never raises.

    alone   whether the process's peak is this run's (`untouched` before it began)
    """
    if not history.enabled():
        return None
    try:
        run = row(path, config, found, result, alone)
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, OSError, HalfbyteError) as error:
        return f"this run is not in the history: its plan.json is not as it was written ({type(error).__name__})"
    return history.keep(run) if run is not None else None


def accuracy_here() -> dict[str, Any]:
    """How good the predictions were on this machine: `halfbyte plan --accuracy`."""
    hardware = detect()
    return history.accuracy(history.key_of(hardware, hardware.device), hardware.device)


def row(
    path: Path, config: RunConfig, found: Survey, result: Mapping[str, Any], alone: bool = True
) -> history.Run | None:
    """The figures of a finished run; None where nothing was predicted."""
    plan = _plan_of(path)
    if plan is None or not isinstance(found.spec, ModelSpec):
        return None
    events = read_events(path / EVENTS)
    constants = plan["calibration"]
    memory, seconds = plan["peak_memory_bytes"], plan["seconds"]
    first_seconds = plan["before_probe"]["seconds"] if plan["probed"] else seconds
    on_gpu = config.device == "cuda"
    reached = max((event.get("device_memory_bytes") or 0 for event in events), default=0)
    return history.Run(
        finished=history.now(),
        machine=history.key_of(detect(), str(config.device)),
        device=str(config.device),
        backend=ops.backend().name,
        halfbyte=_version(),
        arithmetic=arithmetic.version(),
        family=_family(found),
        parameters=found.spec.total_parameters,
        trainable_parameters=plan["trainable_parameters"],
        method_name=config.method_name,
        dtype=config.dtype,
        quant=(found.source.blocks or config.quant_type) if config.method == "qlora" else None,
        rank=config.lora_r if config.method != "full" else None,
        optim=config.optim,
        rows_at_once=plan["per_device_train_batch_size"],
        longest=plan["data"]["longest"],
        checkpointing=bool(config.gradient_checkpointing),
        steps=result["step"],
        tokens=result["tokens"],
        predicted_bytes=memory["p50"] / constants["memory_scale"],
        said_bytes_p50=memory["p50"],
        said_bytes_p95=memory["p95"],
        measured_bytes=reached if on_gpu else result["peak_memory_bytes"],
        predicted_seconds=first_seconds["p50"] / constants["time_scale"],
        said_seconds_p50=seconds["p50"],
        said_seconds_p95=seconds["p95"],
        probed_seconds=seconds["p50"] if plan["probed"] else None,
        measured_seconds=result["seconds"],
        status=history.STEPPED_DOWN if any(result["layout"].values()) else result["status"],
        resumed=any(event["event"] == "resume" for event in events),
        first=history.first_of_process() and alone,
        phases=history.phases_of(plan, result),
    )


def _family(found: Survey) -> str:
    """The architecture's name; whatever else a config.json may have written there is not kept."""
    name = str(found.source.config.get("model_type", ""))
    return name if re.fullmatch(r"[a-z0-9_.-]{1,40}", name) else "other"


def _plan_of(path: Path) -> dict[str, Any] | None:
    try:
        plan = json.loads((path / PLAN).read_bytes())
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) else None


def _version() -> str:
    try:
        return version("halfbyte")
    except PackageNotFoundError:
        return "not installed"
