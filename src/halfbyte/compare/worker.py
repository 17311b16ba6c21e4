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
    from halfbyte.run.config import RunConfig
    from halfbyte.run.run import resume, run
    from halfbyte.train.run_directory import CONFIG

    path = Path(job["folder"])
    if (path / CONFIG).is_file():
        resume(path)
    else:
        run(RunConfig.model_validate(job["config"]))


def metrics(job: dict[str, Any]) -> None:
    """The tuned model's answers on the held-out rows."""
    from halfbyte.evaluate.rows_file import write_rows
    from halfbyte.files import write_atomic
    from halfbyte.run.target import evaluate_tuned, find

    path = Path(job["folder"])
    result = evaluate_tuned(find(str(path)), _options(job))
    write_rows(path / "metric_rows.jsonl", result)
    write_atomic(path / "evaluation.json", json.dumps(result.to_json(), indent=1) + "\n")


def base(job: dict[str, Any]) -> None:
    """The base's answers on the rows that the comparison holds out."""
    from halfbyte.files import write_atomic
    from halfbyte.run.config import RunConfig
    from halfbyte.run.target import Target, evaluate_tuned

    config = RunConfig.model_validate(job["config"])
    result = evaluate_tuned(Target(config, None, None), _options(job))
    write_atomic(Path(job["output"]), json.dumps(result.to_json(), indent=1) + "\n")


def _options(job: dict[str, Any]) -> Any:
    from halfbyte.evaluate.evaluate import EvaluateOptions

    return EvaluateOptions(
        metrics=tuple(job["metrics"]), max_rows=job["metric_rows"], max_new_tokens=job["max_new_tokens"]
    )


def merge(job: dict[str, Any]) -> None:
    """The merged model's loss on the run's held-out rows; the merged folder is not kept."""
    from halfbyte.evaluate.evaluate import EvaluateOptions
    from halfbyte.export.merge import MergeOptions
    from halfbyte.files import write_atomic
    from halfbyte.run import folder
    from halfbyte.run.target import Target, evaluate_tuned, find, merge_target

    path, out = Path(job["folder"]), Path(job["output"])
    try:
        report = merge_target(find(str(path)), out, MergeOptions(overwrite=True)).to_json()
        config, _ = folder.read_config(path)
        merged = config.replace(model=str(out), revision=None, method="lora", requantize=False, quant_pattern={},
                                init_lora_weights="default", loftq_iter=1, adapter_path=None)  # fmt: skip
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
