"""What a run was predicted to need against what it needed: many configurations, each a `halfbyte train`.

    python benchmarks/plan_accuracy.py --out FOLDER [--rounds 3] [--configs NAME,…] [--table]

Every run is a process of its own: plan.json is on the disk before its first step, result.json after its last, and this
program only reads the two. Each third configuration is held out: the constants in `plan/calibration.py` and
`plan/time.py` were fitted without it. Times are medians of the rounds, each corrected for what the machine's own speed
was around that run (a product of matrices, timed before and after). FOLDER/runs.jsonl has a line a run; an interrupted
benchmark goes on where it stopped. `--table` prints the Markdown of docs/planner-accuracy.md without running anything.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plan_models
from transformers import AutoTokenizer

from halfbyte.plan.hardware import reference_gemm

EVAL_ROWS = 2
CASES = """
gemma:qlora:1x128            gemma:qlora:2x512           gemma:qlora:8x128:ckpt       gemma:lora:2x256
gemma:lora:1x1024:ckpt       gemma:full:1x256            gemma:full:4x128:ckpt        gemma:dora:2x256
gemma:qlora:1x1024:r64       gemma:qdora:1x512           qwen:qlora:1x128             qwen:qlora:1x256:ckpt
qwen:lora:1x128              qwen:qlora:2x128:r64        qwen:qdora:1x128             llama-50m:qlora:8x128
llama-50m:lora:4x1024        llama-50m:full:4x512        llama-50m:full:1x4096:ckpt   llama-50m:dora:8x256
llama-50m:qlora:1x4096       llama-50m:lora:1x128:float32  qwen2-130m:qlora:8x256     qwen2-130m:lora:8x128:r64
qwen2-130m:full:2x512        qwen2-130m:full:8x256:ckpt  qwen2-130m:qlora:1x2048      qwen2-130m:qdora:4x256:ckpt
phi3-350m:qlora:4x128        phi3-350m:lora:1x512:ckpt   phi3-350m:full:1x256         phi3-350m:qlora:1x1024:ckpt
phi3-350m:lora:8x128         qwen3-600m:qlora:1x512      qwen3-600m:dora:4x128        llama-1b:qlora:1x256
llama-1b:lora:1x256:ckpt     llama-1b:lora:1x128         llama-3b:qlora:1x128:ckpt    llama-3b:lora:1x128
gemma-gguf:qlora:4x128       gemma-gguf:lora:1x512       qwen-gguf:qlora:1x256        qwen2-130m:full:1x256:float32
"""


@dataclass(frozen=True)
class Case:
    """One configuration. `held_out`: not used for fitting."""

    name: str
    model: str
    method: str
    rows: int
    tokens: int
    checkpointing: bool
    rank: int
    dtype: str
    optim: str
    held_out: bool


def parse(name: str, held_out: bool) -> Case:
    model, method, size, *rest = name.split(":")
    rows, tokens = map(int, size.split("x"))
    rank = next((int(word[1:]) for word in rest if word[0] == "r" and word[1:].isdigit()), 16)
    dtype = "float32" if "float32" in rest else "bfloat16"
    optim = next((word for word in rest if word.startswith("adamw")), "adamw")
    return Case(name, model, method, rows, tokens, "ckpt" in rest, rank, dtype, optim, held_out)


def cases() -> list[Case]:
    return [parse(name, index % 3 == 2) for index, name in enumerate(CASES.split())]


def write_data(folder: Path, case: Case, steps: int, model: Path) -> tuple[Path, Path]:
    """Rows of `tokens` tokens each, give or take one where a text cut in two is read differently."""
    tokenizer = AutoTokenizer.from_pretrained(model.with_suffix("") if model.suffix == ".gguf" else model)
    room = case.tokens - len(tokenizer("")["input_ids"]) - 1
    files = folder / "train.jsonl", folder / "eval.jsonl"
    counts = case.rows * steps, EVAL_ROWS
    for number, (file, count) in enumerate(zip(files, counts, strict=True)):
        texts = [plan_models.words(case.tokens, 1000 * number + i) for i in range(count)]
        found = tokenizer(texts, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        rows = [{"text": text[: offsets[room - 1][1]]} for text, offsets in zip(texts, found, strict=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def measure(case: Case, model: Path, out: Path, steps: int, flags: Sequence[str]) -> dict[str, Any]:
    """One run in a fresh process; what plan.json and result.json say."""
    scratch = out / "run"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    train, held_out = write_data(scratch, case, steps, model)
    run = scratch / "out"
    command = [
        sys.executable, "-m", "halfbyte", "train", "--model", model, "--data", train, "--eval-data", held_out,
        "--method", case.method, "--max-seq-length", case.tokens, "--max-steps", steps, "--output-dir", run,
        "--per-device-train-batch-size", case.rows, "--gradient-accumulation-steps", 1, "--dtype", case.dtype,
        "--optim", case.optim, "--gradient-checkpointing" if case.checkpointing else "--no-gradient-checkpointing",
        "--save-total-limit", 1, "--rehearsal", "--json", *flags,
    ]  # fmt: skip
    if case.method != "full":
        command += ["--lora-r", case.rank]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HALFBYTE_HISTORY": "0"}
    before, started = reference_gemm(), time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    wall, after = time.perf_counter() - started, reference_gemm()
    if done.returncode:
        raise SystemExit(f"{case.name}: halfbyte train failed with {done.returncode}: {done.stderr[-2000:]}")
    plan, result = json.loads((run / "plan.json").read_text()), json.loads((run / "result.json").read_text())
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    shutil.rmtree(scratch)
    steps = [event for event in events if event["event"] == "step"]
    keep = (
        "peak_memory_bytes", "seconds", "seconds_by_phase", "peak_phase", "memory_by_phase", "memory_by_component",
        "before_probe", "rates",
    )  # fmt: skip
    return {
        "case": case.name,
        "plan": {key: plan[key] for key in keep if key in plan},
        "measured": {
            "peak_memory_bytes": result["peak_memory_bytes"],
            "seconds": result["seconds"],
            "seconds_by_phase": result["seconds_by_phase"],
            "steps": [event["seconds"] for event in steps],
            "memory": [(event["memory_bytes"], event["peak_memory_bytes"]) for event in steps],
            "wall": wall,
        },
        "reference": [before, after],
    }


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collect(args: argparse.Namespace, chosen: Sequence[Case]) -> None:
    log = args.out / "runs.jsonl"
    done: dict[str, int] = defaultdict(int)
    for record in read(log):
        done[record["case"]] += 1
    for round_ in range(args.rounds):
        for case in chosen:
            if done[case.name] > round_:
                continue
            model = plan_models.find(case.model, args.models, args.made)
            record = measure(case, model, args.out, args.steps, args.flag)
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            done[case.name] += 1
            plan, got = record["plan"], record["measured"]
            error = plan["peak_memory_bytes"]["p50"] / got["peak_memory_bytes"] - 1
            said = sum(plan["seconds_by_phase"][phase]["p50"] for phase in AHEAD)
            took = sum(got["seconds_by_phase"][phase] for phase in AHEAD)
            print(
                f"{case.name:36} {got['peak_memory_bytes'] / 1e9:6.3f} GB {error:+7.1%} in {plan['peak_phase']:8} "
                f"{took:6.1f} s {said / took - 1:+7.1%}  reference {record['reference'][0] / 1e9:.0f}",
                flush=True,
            )


@dataclass(frozen=True)
class Line:
    """One configuration's errors, predicted over measured minus one, and whether p95 held.

    seconds   of loading, training, evaluating and saving: what the plan of before the run speaks of
    probed    error of what the plan said after the rehearsal about all that was still to come
    spread    of `seconds` over the rounds: greatest less least, over the median
    """

    case: Case
    peak: float
    memory: float
    holds: bool
    seconds: float
    time: float
    probed: float
    spread: float


AHEAD = ("train", "evaluate", "save")
"""What is still to come after a rehearsal."""


def lines_of(records: Iterable[dict[str, Any]]) -> list[Line]:
    """The errors of every configuration that was run.

    Seconds count as they would have been at the machine's usual speed, the median of all reference products; those that
    a rehearsal timed or predicted are scaled by what the same run's reference was.
    """
    by_case: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_case[record["case"]].append(record)
    usual = statistics.median(rate for runs in by_case.values() for run in runs for rate in run["reference"])
    lines = []
    for case in cases():
        runs = by_case.get(case.name)
        if not runs:
            continue
        peaks = [run["measured"]["peak_memory_bytes"] for run in runs]
        speed = [statistics.mean(run["reference"]) / usual for run in runs]
        took = [run["measured"]["seconds_by_phase"] for run in runs]
        whole = [k * sum(t[phase] for phase in ("load", *AHEAD)) for k, t in zip(speed, took, strict=True)]
        ahead = [k * sum(t[phase] for phase in AHEAD) for k, t in zip(speed, took, strict=True)]
        plan, seconds = runs[-1]["plan"], statistics.median(whole)  # of the newest code, where rounds saw several
        said = speed[-1] * sum(plan["seconds_by_phase"][phase]["p50"] for phase in AHEAD)
        lines.append(
            Line(
                case,
                statistics.median(peaks),
                plan["peak_memory_bytes"]["p50"] / statistics.median(peaks) - 1,
                plan["peak_memory_bytes"]["p95"] >= max(peaks),
                seconds,
                plan["before_probe"]["seconds"]["p50"] / seconds - 1,
                said / statistics.median(ahead) - 1,
                (max(whole) - min(whole)) / seconds,
            )
        )
    return lines


def summary(errors: Sequence[float]) -> tuple[float, float]:
    """(median, 95th percentile) of the absolute errors."""
    return tuple(float(np.quantile(np.abs(errors), q)) for q in (0.5, 0.95))  # type: ignore[return-value]


def markdown(lines: Sequence[Line]) -> str:
    head = "| model | method | rows x tokens | | peak GB | error | s | spread | error | error, probed |"
    out = [head, "|---|---|---|---|---|---|---|---|---|---|"]
    for line in lines:
        case = line.case
        more = [f"r {case.rank}"] if case.rank != 16 else []
        more += ["recomputed"] * case.checkpointing + [case.optim] * (case.optim != "adamw")
        more += [case.dtype] * (case.dtype != "bfloat16") + ["**held out**"] * case.held_out
        out.append(
            f"| {case.model} | {case.method} | {case.rows} x {case.tokens} | {', '.join(more)} | "
            f"{line.peak / 1e9:.3f} | {line.memory:+.1%} | {line.seconds:.1f} | {line.spread:.0%} | {line.time:+.1%} | "
            f"{line.probed:+.1%} |"
        )
    out += ["", "| | configurations | memory: median, 95 % | above p95 | time: median, 95 % | probed: median, 95 % |"]
    out += ["|---|---|---|---|---|---|"]
    groups = {"all": lines, "fitted": [x for x in lines if not x.case.held_out]}
    groups["held out"] = [x for x in lines if x.case.held_out]
    for name, group in groups.items():
        if not group:
            continue
        cells = ["{:.1%}, {:.1%}".format(*summary([x.memory for x in group]))]
        cells.append(str(sum(not x.holds for x in group)))
        for field in ("time", "probed"):
            cells.append("{:.1%}, {:.1%}".format(*summary([getattr(x, field) for x in group])))
        out.append(f"| {name} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/plan"))
    parser.add_argument("--models", type=Path, default=Path.home() / ".cache" / "halfbyte-models")
    parser.add_argument("--made", type=Path, default=Path("runs/plan-models"), help="where random models are written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="updates of each run")
    parser.add_argument("--configs", default="", help="parts of names, separated by commas; all by default")
    parser.add_argument("--flag", action="append", default=[], help="a further flag of halfbyte train")
    parser.add_argument("--table", action="store_true", help="print the tables and run nothing")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [part for part in args.configs.split(",") if part]
    chosen = [case for case in cases() if not wanted or any(part in case.name for part in wanted)]
    if not args.table:
        collect(args, chosen)
    print(markdown(lines_of(read(args.out / "runs.jsonl"))))


if __name__ == "__main__":
    main()
