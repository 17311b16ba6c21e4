"""What the methods do to training: held-out loss, time and memory of short runs of the same model on the same rows.

    python benchmarks/methods_study.py --model DIR --data ROWS.json --out FOLDER --methods qlora,qdora,loftq,lora,dora
        [--seeds 1,2,3] [--steps 40] [--rows 16] [--held-out 100] [--set galore:learning_rate=8e-5]

Every cell (method, seed) is a `halfbyte train` in a process of its own, into FOLDER/<method>-<seed>; a cell that is
there is not run again, so that a study which was stopped goes on. The last rows of the file are held out, the same for
all. Each method keeps halfbyte's defaults, and no learning rate is searched for any of them; `--set` changes a field of
one of them, and is printed below the table. Prints Markdown: mean and range of the held-out loss over the seeds, its
difference to the plain method on the same base, paired by seed, seconds an update and the highest resident memory.
FOLDER/study.json has it all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfbyte.run.methods import PRESETS


def split_rows(data: Path, held_out: int, out: Path) -> tuple[Path, Path]:
    """The rows' two files below `out`: all but the last `held_out`, and those."""
    rows = json.loads(data.read_text())
    if not isinstance(rows, list) or len(rows) <= held_out:
        raise SystemExit(f"{data}: a JSON list of more than {held_out} rows is needed")
    files = out / "train.json", out / "eval.json"
    for file, part in zip(files, (rows[:-held_out], rows[-held_out:]), strict=True):
        text = json.dumps(part, ensure_ascii=False)
        if file.exists() and file.read_text() != text:
            raise SystemExit(f"{file} is of another study: choose another --out")
        file.write_text(text)
    return files


def run_cell(
    args: argparse.Namespace, method: str, seed: int, settings: Mapping[str, str], files: Sequence[Path]
) -> None:
    """One run, unless its result is there."""
    folder = args.out / f"{method}-{seed}"
    if (folder / "result.json").is_file():
        return
    flags = {
        "model": args.model,
        "data": files[0],
        "eval-data": files[1],
        "method": method,
        "seed": seed,
        "max-steps": args.steps,
        "per-device-train-batch-size": args.rows,
        "gradient-accumulation-steps": 1,
        "eval-steps": args.steps,
        "output-dir": folder,
        **{name.replace("_", "-"): value for name, value in settings.items()},
    }
    command = [sys.executable, "-m", "halfbyte", "train", "--overwrite"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    print(f"{folder.name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def read_cell(folder: Path) -> dict[str, Any]:
    """What the table needs of a finished run."""
    result = json.loads((folder / "result.json").read_text())
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    steps = [event["seconds"] for event in events if event["event"] == "step"]
    started = next(event for event in events if event["event"] == "start")
    return {
        "eval_loss": result["eval_loss"],
        "base_eval_loss": result["base_eval_loss"],
        "train_losses": [event["loss"] for event in events if event["event"] == "step"],
        "seconds_per_update": statistics.median(steps[1:] or steps),
        "peak_memory_bytes": result["peak_memory_bytes"],
        "trainable_parameters": started["trainable_parameters"],
    }


def summary(
    method: str, cells: Mapping[int, Mapping[str, Any]], plain: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """A method's line: over its seeds, and against the plain method's run of the same seed."""
    losses = [cell["eval_loss"] for cell in cells.values()]
    differences = [cell["eval_loss"] - plain[seed]["eval_loss"] for seed, cell in cells.items() if seed in plain]
    return {
        "method": method,
        "seeds": sorted(cells),
        "base_loss": statistics.mean(cell["base_eval_loss"] for cell in cells.values()),
        "loss": statistics.mean(losses),
        "loss_range": [min(losses), max(losses)],
        "difference": statistics.mean(differences) if differences else None,
        "difference_range": [min(differences), max(differences)] if differences else None,
        "seconds_per_update": statistics.median(cell["seconds_per_update"] for cell in cells.values()),
        "peak_memory_bytes": max(cell["peak_memory_bytes"] for cell in cells.values()),
        "trainable_parameters": next(iter(cells.values()))["trainable_parameters"],
    }


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The study as Markdown."""
    head = ("method", "trained", "base", "after (range)", "against the plain method (range)", "s an update", "peak GB")
    out = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for line in lines:
        low, high = line["loss_range"]
        against = "-"
        if line["difference_range"] is not None:
            first, last = line["difference_range"]
            against = f"{line['difference']:+.4f} ({first:+.4f} to {last:+.4f})"
        out.append(
            f"| {line['method']} | {line['trainable_parameters']:,} | {line['base_loss']:.3f} | {line['loss']:.4f} "
            f"({low:.4f} to {high:.4f}) | {against} | {line['seconds_per_update']:.1f} | "
            f"{line['peak_memory_bytes'] / 1e9:.2f} |"
        )
    return "\n".join(out)


def settings_of(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """METHOD:FIELD=VALUE -> {method: {field: value}}."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        method, colon, rest = text.partition(":")
        field, equals, value = rest.partition("=")
        if not colon or not equals:
            raise SystemExit(f"--set {text}: write it as METHOD:FIELD=VALUE")
        found.setdefault(method, {})[field] = value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="a JSON list of rows")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", required=True, help=", ".join(PRESETS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=16, help="rows of an update")
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--set", action="append", default=[], metavar="METHOD:FIELD=VALUE")
    args = parser.parse_args()
    methods, seeds = args.methods.split(","), [int(seed) for seed in args.seeds.split(",")]
    unknown = [name for name in methods if name not in PRESETS]
    if unknown:
        raise SystemExit(f"--methods: {', '.join(unknown)}: choose from {', '.join(PRESETS)}")
    settings = settings_of(args.set)
    args.out.mkdir(parents=True, exist_ok=True)
    files = split_rows(args.data, args.held_out, args.out)
    for seed in seeds:  # a stopped study has every method for the seeds that it reached
        for method in methods:
            run_cell(args, method, seed, settings.get(method, {}), files)
    cells = {method: {seed: read_cell(args.out / f"{method}-{seed}") for seed in seeds} for method in methods}
    lines = [summary(method, cells[method], cells.get(PRESETS[method].method, {})) for method in methods]
    record = {"model": Path(args.model).name, "steps": args.steps, "rows": args.rows, "settings": settings}
    (args.out / "study.json").write_text(json.dumps({**record, "methods": lines, "cells": cells}, indent=1) + "\n")
    print(table(lines))
    for method, changed in settings.items():
        print(f"{method}: {', '.join(f'{field} {value}' for field, value in changed.items())}")


if __name__ == "__main__":
    main()
