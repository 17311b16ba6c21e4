"""`halfbyte demo`: the whole way on a small real model, in minutes, with nothing prepared by hand.

    model → task → plan → train → save → reload from disk → base against tuned on held-out rows → what to do next

It is a user of halfbyte like any other: it writes two files of rows, makes a config, calls `halfbyte.run`, and has the
saved run evaluated. Its report is `demo.json` in the run's folder; a second demo finds it there, and one that was
interrupted goes on where it stopped.
"""

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from halfbyte.demo import json_match
from halfbyte.demo.model import LICENCE, demo_model
from halfbyte.demo.screen import Screen
from halfbyte.demo.task import HELD_OUT_ROWS, TRAIN_ROWS, write_task
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.evaluate import BaseAndTuned, EvaluateOptions
from halfbyte.files import write_atomic
from halfbyte.plan.hardware import detect
from halfbyte.run import folder
from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.run import Event, RunResult, resume, run
from halfbyte.run.target import evaluate_target, find
from halfbyte.train.memory import process_memory
from halfbyte.train.progress import Progress
from halfbyte.train.run_directory import is_run

SCHEMA_VERSION = 1
OUTPUT_DIR = Path("runs/demo")
REPORT = "demo.json"
METRIC = "json_match"
MEMORY = 3_000_000_000
"""Bytes that the demo may take: the budget of its plan, and of what it then does."""
ANSWER_TOKENS = 48
"""The longest answer of the task has 34 tokens in Gemma's vocabulary; a model that has not ended by then is wrong."""


@dataclass(frozen=True)
class DemoReport:
    """What came out; `as_dict()` is demo.json and what `halfbyte demo --json` prints.

    base, tuned        `EvaluateResult.to_json(rows=True)` on the held-out rows; the share that is exactly right is
                       their `json_match`
    predicted          plan.json's peak memory and seconds of the training
    measured           result.json's
    seconds            of the whole demo, model and evaluation included; of its last part, if it was interrupted
    peak_memory_bytes  of the whole process, as the operating system counts it
    next               commands to go on with, each {"what", "command"}
    """

    run: str
    model: str
    method: str
    base: dict[str, Any]
    tuned: dict[str, Any]
    predicted: dict[str, Any]
    measured: dict[str, Any]
    seconds: float
    peak_memory_bytes: int
    next: list[dict[str, str]]
    schema_version: int = SCHEMA_VERSION

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_demo(
    output_dir: Path = OUTPUT_DIR,
    *,
    model: str | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    train: int = TRAIN_ROWS,
    held_out: int = HELD_OUT_ROWS,
) -> DemoReport:
    """Do all of it, and tell it on stdout unless `quiet`.

    model            another model than Gemma 3 270M (anything that `--model` takes); the task stays the same
    overwrite        start over; otherwise a finished demo is shown again, and an interrupted one goes on
    train, held_out  rows of the task

    Raises UsageError where the demo's packages are missing or `output_dir` holds something else, DoesNotFit where the
    machine is too small.
    """
    console = Console(quiet=quiet, highlight=False)
    screen = Screen(console)
    if not overwrite and (report := read_report(output_dir)) is not None:
        screen.title(f"{output_dir} holds a finished demo; `halfbyte demo --overwrite` does it again.")
        _show(screen, report)
        return report

    started = time.perf_counter()
    screen.title("1  The model")
    name = str(demo_model()) if model is None else model
    screen.say(name if model is not None else f"Gemma 3 270M, {name}")
    if model is None:
        screen.say(LICENCE)
    files = write_task(output_dir.with_name(output_dir.name + "-data"), train=train, held_out=held_out)
    screen.title("2  The task: a request in, strict JSON out")
    screen.task(*files)
    trained = _train(demo_config(name, *files, output_dir), overwrite, screen, console)
    screen.title(f"4  Reloaded from {output_dir}: base against tuned, on requests that nobody has trained on")
    scores = _evaluate(output_dir, screen)
    report = _report(trained, name, scores, time.perf_counter() - started)
    write_atomic(output_dir / REPORT, json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
    _show(screen, report)
    return report


def demo_config(model: str, data: Path, held_out: Path, output_dir: Path) -> RunConfig:
    """The run: a config that anyone could have written in YAML."""
    return load_config(
        model=model,
        data=str(data),
        eval_data=str(held_out),
        method="auto",
        memory=min(MEMORY, detect().usable),
        num_train_epochs=1,
        # Above the default: with a hundred-odd updates the default has not finished learning.
        learning_rate=3e-4,
        max_seq_length=256,
        output_dir=str(output_dir),
    )


def read_report(output_dir: Path) -> DemoReport | None:
    """The report of a finished demo, or None. UsageError if the file is damaged."""
    path = output_dir / REPORT
    if not path.is_file():
        return None
    try:
        return DemoReport(**folder.read_json(path))
    except TypeError:
        raise UsageError(
            f"{path} is not of this version of halfbyte: `halfbyte demo --overwrite` does it again"
        ) from None


def _train(config: RunConfig, overwrite: bool, screen: Screen, console: Console) -> RunResult:
    """Plan and train, or go on with what an interrupted demo left."""
    with Progress(console) as progress:

        def listen(event: Event) -> None:
            if event["event"] == "planned":
                screen.title("3  The plan, and the training")
                screen.plan(event["plan"].as_dict())
            elif event["event"] not in ("prepared", "loaded", "finished"):
                progress(event)

        assert config.output_dir is not None
        if overwrite or not is_run(config.output_dir):
            return run(config, listen, overwrite)
        before, _ = folder.read_config(config.output_dir)
        if before.data != str(Path(str(config.data)).resolve()):
            raise UsageError(f"{config.output_dir} holds another run than a demo: choose another --output-dir")
        screen.title(f"3  {config.output_dir} was interrupted: the training goes on")
        return resume(config.output_dir, listen)


def _evaluate(output_dir: Path, screen: Screen) -> BaseAndTuned:
    """What is on the disk, loaded as any user would load it, with and without its adapter."""
    phase = ""

    def progress(what: str, done: int, total: int) -> None:
        nonlocal phase
        if what != phase and what.endswith("answers"):
            screen.say(f"{what} to {total} requests …")
        phase = what

    options = EvaluateOptions(
        metrics=(f"{json_match.__file__}:{METRIC}",), max_new_tokens=ANSWER_TOKENS, eval_batch_size=32
    )
    scores = evaluate_target(find(str(output_dir)), options, progress)
    if not isinstance(scores, BaseAndTuned):
        raise HalfbyteError(f"{output_dir} has no adapter to compare with its base")
    return scores


def _report(trained: RunResult, model: str, scores: BaseAndTuned, seconds: float) -> DemoReport:
    result = trained.result
    return DemoReport(
        run=str(trained.path),
        model=model,
        method=result["method"],
        base=scores.base.to_json(rows=True),
        tuned=scores.tuned.to_json(rows=True),
        predicted=result["predicted"],
        measured={key: result[key] for key in ("peak_memory_bytes", "seconds", "tokens_per_second")},
        seconds=round(seconds, 1),
        peak_memory_bytes=process_memory()[1],
        next=next_commands(trained.path, model),
    )


def next_commands(output_dir: Path, model: str) -> list[dict[str, str]]:
    """What to do now: one's own data, talk to it, take it away. They run as they stand."""
    program = "halfbyte" if shutil.which("halfbyte") else _this_program()
    return [
        {"what": "your own data", "command": f"{program} train --model {model} --data my.jsonl"},
        {"what": "talk to it", "command": f"{program} chat {output_dir}"},
        {"what": "take it away", "command": f"{program} merge {output_dir} my-model"},
    ]


def _this_program() -> str:
    """How this very program was called, where the name alone would not be found (a virtual environment's, say)."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "halfbyte" else f"{sys.executable} -m halfbyte"


def _show(screen: Screen, report: DemoReport) -> None:
    screen.scores(report.base, report.tuned, METRIC)
    screen.rows(report.base["rows"], report.tuned["rows"], METRIC)
    screen.title("5  What it cost")
    screen.cost(report.predicted, report.measured)
    screen.say(
        f"The whole demo: {report.seconds / 60:.1f} minutes, {report.peak_memory_bytes / 1e9:.2f} GB at its peak. "
        f"Everything is in {report.run}; the adapter is PEFT's format."
    )
    screen.title("6  What next")
    screen.commands([(entry["what"], entry["command"]) for entry in report.next])
