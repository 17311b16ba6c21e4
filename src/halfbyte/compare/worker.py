"""One cell in a process of its own: `python -m halfbyte.compare.worker JOB.json`.

The peak of memory that a run reports is its process's, so every cell gets a fresh one. What it does is a run like any
other (`run.run`), or goes on with one that was begun; afterwards, in further processes, what else is measured on its
files:

    train      the run itself
    metrics    generated answers on the held-out rows: evaluation.json, metric_rows.jsonl
    base       the same of the base, before any training: baseline.json
    merge      the adapter merged, and the merged model's held-out loss: merge.json

The other end of stdin is the comparison. When it closes, the comparison is gone, also by kill -9, and the run saves
and stops as if it had been asked to.
"""

import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError

FAILED = "failed: "
"""Begins the last line of stderr of a cell that ended with a message for the user."""


def stop_without_a_parent() -> None:
    """Ask this process to stop once stdin is at its end."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def train(job: dict[str, Any]) -> None:
    """The run of a cell: begun, gone on with, or there already."""
    from halfbyte.files import write_atomic
    from halfbyte.run import folder
    from halfbyte.run.config import RunConfig, to_yaml
    from halfbyte.run.run import resume, run
    from halfbyte.train.run_directory import CONFIG

    path, here = Path(job["folder"]), RunConfig.model_validate(job["config"])
    if not (path / CONFIG).is_file():
        run(here)
        return
    config, record = folder.read_config(path)
    if moved := _moved(config, here):
        write_atomic(path / CONFIG, to_yaml(config.replace(**moved), record))
    resume(path)


def _moved(config: Any, here: Any) -> dict[str, Any]:
    """Where model, rows and adapter are now, as far as that is elsewhere: fingerprints say that they are the same."""
    values = {name: getattr(here, name) for name in ("model", "data", "eval_data", "chat_template", "adapter_path")}
    if here.adapter_path is not None:
        values["adapter_path"] = str(Path(here.adapter_path).resolve())
    moved = {name: value for name, value in values.items() if value != getattr(config, name)}
    return moved | ({"revision": here.revision} if "model" in moved else {})


def metrics(job: dict[str, Any]) -> None:
    """The tuned model's answers on the held-out rows. Their loss is what the run found when it ended."""
    from halfbyte.evaluate.rows_file import NAME, read_rows, write_rows
    from halfbyte.files import write_atomic
    from halfbyte.run.target import evaluate_tuned

    path = Path(job["folder"])
    known = read_rows(path / NAME) if (path / NAME).is_file() else ()
    result = evaluate_tuned(_target(job), _options(job), known)
    write_rows(path / "metric_rows.jsonl", result)
    write_atomic(path / "evaluation.json", _said(result, job))


def base(job: dict[str, Any]) -> None:
    """The base's answers on the rows that the comparison holds out."""
    from halfbyte.files import write_atomic
    from halfbyte.run.config import RunConfig
    from halfbyte.run.target import Target, evaluate_tuned

    config = RunConfig.model_validate(job["config"])
    result = evaluate_tuned(Target(config, None, None), _options(job))
    write_atomic(Path(job["output"]), _said(result, job))


def _options(job: dict[str, Any]) -> Any:
    from halfbyte.evaluate.evaluate import EvaluateOptions

    asked = job["asked"]
    return EvaluateOptions(
        metrics=tuple(asked["metrics"]),
        max_rows=asked["metric_rows"],
        max_new_tokens=asked["max_new_tokens"],
        allow_code_execution=job["allow_code_execution"],
    )


def _said(result: Any, job: dict[str, Any]) -> str:
    """The figures, with what was asked for: figures of other rows or shorter answers are others."""
    return json.dumps(result.to_json() | {"asked": job["asked"]}, indent=1) + "\n"


def _target(job: dict[str, Any]) -> Any:
    """The cell's run, with model and rows where the comparison has them: an accepted run names another machine's."""
    from halfbyte.run.config import RunConfig
    from halfbyte.run.target import find

    found = find(job["folder"])
    moved = _moved(found.config, RunConfig.model_validate(job["config"]))
    moved.pop("adapter_path", None)  # what the run went on from is in its own adapter
    if found.adapter is None:  # the run is the model
        moved = {name: value for name, value in moved.items() if name not in ("model", "revision")}
    return replace(found, config=found.config.replace(**moved))


def merge(job: dict[str, Any]) -> None:
    """The merged model's loss on the run's held-out rows; the merged folder is not kept."""
    from halfbyte.evaluate.evaluate import EvaluateOptions
    from halfbyte.export.merge import MergeOptions
    from halfbyte.files import write_atomic
    from halfbyte.run.target import Target, evaluate_tuned, merge_target

    path, out = Path(job["folder"]), Path(job["output"])
    try:
        target = _target(job)
        report = merge_target(target, out, MergeOptions(overwrite=True)).to_json()
        merged = target.config.replace(
            model=str(out), revision=None, method="lora", requantize=False, quant_pattern={},
            init_lora_weights="default", loftq_iter=1, adapter_path=None,
        )  # fmt: skip
        result = evaluate_tuned(Target(merged, None, None), EvaluateOptions())
    finally:
        shutil.rmtree(out, ignore_errors=True)
    scores = report["scores"]
    said = {
        "schema_version": 1,
        "loss": result.loss,
        "base": report["base"],
        "bytes": report["bytes"],
        "kl": None if scores is None else next(c["kl"] for c in scores["candidates"] if c["name"] == scores["chosen"]),
    }
    write_atomic(path / "merge.json", json.dumps(said, indent=1) + "\n")


STAGES = {"train": train, "metrics": metrics, "base": base, "merge": merge}


def main() -> None:
    """Run the stage that the job names; leave with the exit code of `halfbyte` for what went wrong."""
    stop_without_a_parent()
    job = json.loads(Path(sys.argv[1]).read_bytes())
    try:
        STAGES[job["stage"]](job)
    except HalfbyteError as error:
        print(f"{FAILED}{error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(4)


if __name__ == "__main__":
    main()
