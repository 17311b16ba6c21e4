"""What `halfbyte compare` says of speed and memory against a loop written by hand, on the same work, in turns.

    python benchmarks/compare_loop.py -m gemma-3-270m.gguf -d rows.jsonl [--methods lora,qlora] [--rounds 5] [--steps N]
                                      [-o FILE.json] [flags of the comparison's runs]

A round is a comparison of the methods (the command itself, its report.json read afterwards) and a plain PyTorch loop
for each: the same model and adapters, the same rows in the same micro-batches, `torch.optim.AdamW` and torch's own
clipping, timed around each update. Every one is a fresh process, never two at once; rounds take turns which goes first.
Prints the medians of the rounds with their spread, and the report's figure over the loop's, paired by round; -o keeps
them with every round's own figures, and with what they were measured on.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from halfbyte.adapters import LoraOptions, attach
from halfbyte.compare.cells import machine_of
from halfbyte.compare.compare import versions
from halfbyte.compare.measure import WARM_UP
from halfbyte.compare.pack import cut
from halfbyte.data import DataOptions, collate, plan_micro_batches, prepare
from halfbyte.files import write_atomic
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.plan.hardware import detect
from halfbyte.run.folder import read_config
from halfbyte.run.run import quant_of
from halfbyte.train.memory import process_memory

Round = dict[str, dict[str, dict[str, float]]]
"""Figures by method and side: what the report says and what the loop found."""
FIGURES = {"step_seconds": "s", "tokens_per_second": "tokens/s", "peak_memory_bytes": "bytes"}


def loop(run: Path) -> dict[str, float]:
    """The run's updates by hand."""
    config, _ = read_config(run)
    loaded = load_model(config.pick(ModelOptions), quant_of(config))
    model: Any = loaded.model
    attach(model, config.pick(LoraOptions), config.seed)
    model.checkpointing = bool(config.gradient_checkpointing)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate or 2e-4, weight_decay=config.weight_decay)
    data = prepare(config.pick(DataOptions), loaded.tokenizer, config.seed)
    order, at_once = data.sampler(config.seed), config.per_device_train_batch_size
    assert at_once is not None
    assert config.gradient_accumulation_steps is not None
    assert config.max_steps is not None
    assert config.max_grad_norm is not None
    rows = at_once * config.gradient_accumulation_steps
    if config.max_steps * rows > len(data.train):
        raise SystemExit("--steps goes beyond an epoch, where a run begins a new update: give fewer")
    seconds, tokens = [], []
    for step in range(config.max_steps):
        started = time.perf_counter()
        chosen = [data.train[i] for i in order.rows_for(step * rows, rows)]
        pieces = plan_micro_batches([len(e) for e in chosen], at_once, config.packing, at_once * 10**9)
        batches = [collate([chosen[i] for i in piece]) for piece in pieces]
        supervised = sum(batch.supervised_tokens for batch in batches)
        for batch in batches:
            nll, _ = model.loss(batch)
            (nll / supervised).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(batch.tokens for batch in batches))
    return {
        "step_seconds": statistics.median(seconds[WARM_UP:]),
        "tokens_per_second": sum(tokens[WARM_UP:]) / sum(seconds[WARM_UP:]),
        "peak_memory_bytes": process_memory()[1],
    }


def compared(arguments: argparse.Namespace, out: Path) -> dict[str, dict[str, float]]:
    """The report's figures by method."""
    words = ["-m", arguments.model, "-d", arguments.data, "--methods", ",".join(arguments.methods), "--seeds", "1"]
    # An evaluation in the middle would be no part of an update's time, and the last one is there anyway.
    words += ["--max-steps", str(arguments.steps), "--eval-steps", str(arguments.steps), "-o", str(out)]
    words += ["--no-packing", "--requantize", *arguments.more]
    code = "import sys; from halfbyte.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", code, "compare", *words], check=True, stdout=subprocess.DEVNULL)
    report = json.loads((out / "report.json").read_text())
    return {v["key"]: {name: v["figures"][name]["mean"] for name in FIGURES} for v in report["variants"]}


def by_hand(run: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--loop", run], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def runs_of(out: Path) -> dict[str, Path]:
    """A comparison's run folders by method."""
    cells = json.loads((out / "comparison.json").read_text())["cells"]
    return {cell["variant"]: out / "cells" / cell["id"] for cell in cells}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def summary(rounds: Sequence[Round]) -> dict[str, dict[str, dict[str, Any]]]:
    """By method and figure: both sides' medians over the rounds, and the report's over the loop's, paired by round."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for method in rounds[0]:
        found[method] = {}
        for name, unit in FIGURES.items():
            report, by_loop = ([one[method][side][name] for one in rounds] for side in ("report", "loop"))
            ratios = [a / b for a, b in zip(report, by_loop, strict=True)]
            found[method][name] = {
                "unit": unit, "report": spread(report), "loop": spread(by_loop), "report_over_loop": spread(ratios)
            }  # fmt: skip
    return found


def record(rounds: Sequence[Round], arguments: argparse.Namespace) -> dict[str, Any]:
    """What -o keeps, without this machine's paths."""
    return {
        "schema_version": 1,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine_of(detect()),
        "versions": versions(),
        "model": Path(arguments.model).name,
        "data": Path(arguments.data).name,
        "settings": {
            "methods": arguments.methods, "steps": arguments.steps, "warm_up_steps": WARM_UP,
            "threads": torch.get_num_threads(), "flags": cut(arguments.more),
        },
        "rounds": list(rounds),
        "summary": summary(rounds),
    }  # fmt: skip


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    lines = ["| method | figure | report | loop by hand | report over loop |", "|---|---|---|---|---|"]
    for method, figures in found.items():
        for name, one in figures.items():
            shown = (
                f"{s['median']:.4g} ({s['least']:.4g} to {s['largest']:.4g})"
                for s in (one["report"], one["loop"], one["report_over_loop"])
            )
            lines.append(f"| {method} | {name}, {one['unit']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model")
    parser.add_argument("-d", "--data")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["lora", "qlora"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("-o", "--output", type=Path, help="a JSON file that keeps what was measured")
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    arguments, more = parser.parse_known_args()
    arguments.more = more
    if arguments.loop is not None:
        print(json.dumps(loop(arguments.loop)))
        return
    if arguments.model is None or arguments.data is None:
        parser.error("-m MODEL and -d ROWS are needed")
    measured: list[Round] = []
    with tempfile.TemporaryDirectory() as scratch:
        first = Path(scratch) / "first"
        compared(arguments, first)  # not counted: it says which runs the loop repeats, and warms the disk's cache
        runs = runs_of(first)
        for number in range(arguments.rounds):
            loops = {}
            if number % 2:
                loops = {method: by_hand(run) for method, run in runs.items()}
            found = compared(arguments, Path(scratch) / f"round-{number}")
            loops = loops or {method: by_hand(run) for method, run in runs.items()}
            measured.append({method: {"report": found[method], "loop": loops[method]} for method in runs})
            print(f"round {number + 1}: {json.dumps(measured[-1])}", file=sys.stderr)
    if arguments.output is not None:
        write_atomic(arguments.output, json.dumps(record(measured, arguments), indent=1) + "\n")
    print(table(summary(measured)))


if __name__ == "__main__":
    main()
