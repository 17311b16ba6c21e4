"""The verbs for Python: what `hb.plan`, `hb.train`, `hb.resume`, `hb.evaluate` and `hb.load` are.

Each takes what the command line takes, a config as a value, a YAML file, or its fields as keywords, and returns values.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from halfbyte.evaluate.classify import Classified, Texts
from halfbyte.evaluate.evaluate import BaseAndTuned, EvaluateOptions, EvaluateResult
from halfbyte.plan.recommend import Plan
from halfbyte.run import target
from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.offer import offer
from halfbyte.run.run import Listener, RunResult, run, silent
from halfbyte.run.run import resume as resume_run

Config = RunConfig | Path | str | None
"""A config, a YAML file, or None for keywords alone."""


def config_of(config: Config, values: dict[str, Any]) -> RunConfig:
    """One config from a config or a file, with keywords over it."""
    if isinstance(config, RunConfig):
        return load_config(None, None, **(config.model_dump() | values)) if values else config
    return load_config(Path(config) if config is not None else None, None, **values)


def plan(
    config: Config = None,
    /,
    *,
    methods: Sequence[str] = (),
    price: str | None = None,
    deadline: str | None = None,
    **values: Any,
) -> Plan:
    """Every method's memory, time and cost on this machine, and the one to use. `hb.plan(model="…", data="…").reason`

    methods, price, deadline   as `halfbyte plan` takes them: ("lora", "qdora"), "0.34 EUR/h", "6h"
    """
    answer = offer(config_of(config, values), methods=methods, price=price, deadline=deadline)
    assert isinstance(answer, Plan)  # one machine, and no pick
    return answer


def train(
    config: Config = None, /, *, overwrite: bool = False, on_event: Listener = silent, **values: Any
) -> RunResult:
    """Train; returns what came out. Prints nothing: `on_event` hears everything; `train.progress.Progress` is one."""
    return run(config_of(config, values), on_event, overwrite)


def resume(path: Path | str, *, max_steps: int | None = None, on_event: Listener = silent) -> RunResult:
    """Continue a run, or extend a complete one up to `max_steps`."""
    return resume_run(Path(path), on_event, max_steps)


def evaluate(
    name: Path | str,
    data: Path | str | None = None,
    *,
    metrics: Sequence[str] = (),
    adapter: Path | str | None = None,
    **changes: Any,
) -> BaseAndTuned | EvaluateResult:
    """Figures of a run, an adapter or a model on `data` (by default the rows that the run held out)."""
    found = target.find(str(name), None if adapter is None else str(adapter), **changes)
    with_rows = target.rows_from(found, None if data is None else str(data))
    return target.evaluate_target(with_rows, EvaluateOptions(metrics=tuple(metrics)))


def classify(
    name: Path | str, texts: Sequence[Texts], adapter: Path | str | None = None, **changes: Any
) -> list[Classified]:
    """The class of each text, by a run or a model with a trained head: `hb.classify(run, ["Great."])[0].label`."""
    opened = target.open_target(target.find(str(name), None if adapter is None else str(adapter), **changes))
    return target.classify_texts(opened, texts)


def load(name: Path | str, adapter: Path | str | None = None, *, trainable: bool = False, **changes: Any) -> nn.Module:
    """A model as an nn.Module, its tokenizer at `.tokenizer`; see `run.target.load`."""
    return target.load(str(name), None if adapter is None else str(adapter), trainable, **changes)
