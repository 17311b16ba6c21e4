"""halfbyte and its peers on the same training steps, in turns, as a Markdown table.

    python benchmarks/compare.py --out DIR --peers-python .venv-peers/bin/python [--preset quick|full] [--rounds 3]
    python benchmarks/compare.py --out DIR --row gemma-3-270m:4x512:qlora:bf16 --contenders halfbyte,trl
    python benchmarks/compare.py --out DIR --table-only

A row is a model, batch x length, method, dtype and, with `:ckpt`, activation checkpointing. Every measurement is a
process of its own (`halfbyte_step.py`, `peer_step.py`), never two at once; methods and contenders of a row take turns
for `--rounds` rounds, so that a busy moment of the machine hits all alike. Each result is a line of DIR/results.jsonl:
an interrupted run goes on where it stopped, failed processes are tried again, and `comparison_table.py` makes the table
from the file alone. DIR/machine.json says what it was measured on; results of two machines are not mixed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import comparison_table
import machine

HERE = Path(__file__).resolve().parent
CONTENDERS = ("halfbyte", "loop", "compile", "trl", "loop+halfbyte")
METHODS = ("lora", "qlora")
DTYPES = ("bf16", "fp32")
# One instruction set for everybody: halfbyte, oneDNN, MKL and torch's own kernels.
ISAS = {
    "": {},
    "avx2": {
        "HALFBYTE_ISA": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}


@dataclass(frozen=True)
class Row:
    model: str
    batch: int
    seq: int
    method: str
    dtype: str
    checkpointing: bool = False
    isa: str = ""

    def __str__(self) -> str:
        extra = (" checkpointing" if self.checkpointing else "") + (f" {self.isa}" if self.isa else "")
        return f"{self.model} {self.batch}x{self.seq} {self.method} {self.dtype}{extra}"


def parse_row(text: str) -> Row:
    """MODEL:BATCHxSEQ:METHOD:DTYPE[:ckpt]; raises ArgumentTypeError."""
    try:
        model, shape, method, dtype, *rest = text.split(":")
        batch, seq = map(int, shape.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not MODEL:BATCHxSEQ:METHOD:DTYPE[:ckpt]") from None
    if method not in METHODS or dtype not in DTYPES or rest not in ([], ["ckpt"]) or min(batch, seq) < 1 or not model:
        raise argparse.ArgumentTypeError(f"{text!r}: METHOD is lora or qlora, DTYPE bf16 or fp32, then only :ckpt")
    return Row(model, batch, seq, method, dtype, bool(rest))


def preset(name: str, dtype: str) -> list[Row]:
    if name == "quick":
        return [Row("gemma-3-270m", 1, 128, method, dtype) for method in METHODS]
    shapes = [("gemma-3-270m", 4, 512), ("qwen2.5-coder-1.5b", 1, 512), ("qwen2.5-coder-1.5b", 4, 512)]
    return [
        Row(model, batch, seq, method, dtype, checkpointing)
        for checkpointing in (False, True)
        for model, batch, seq in shapes
        for method in METHODS
    ]


@dataclass(frozen=True)
class Job:
    row: Row
    contender: str
    round: int

    @property
    def key(self) -> str:
        return json.dumps([asdict(self.row), self.contender, self.round], sort_keys=True)


def plan(rows: Sequence[Row], contenders: Sequence[str], rounds: int) -> Iterator[Job]:
    """All processes in the order in which they run. Rows that differ in the method only take turns too: their times
    are divided by each other."""
    together: dict[Row, list[Row]] = {}
    for row in rows:
        together.setdefault(replace(row, method=""), []).append(row)
    for group in together.values():
        for round_ in range(rounds):
            for contender in contenders:
                # LoRA dequantizes nothing: its other backend would be measured twice.
                for row in group:
                    if row.method == "qlora" or contender != "loop+halfbyte":
                        yield Job(row, contender, round_)


def command(job: Job, args: argparse.Namespace) -> list[str]:
    row, ours = job.row, job.contender == "halfbyte"
    words = [sys.executable, str(HERE / "halfbyte_step.py"), "--gemm"] if ours else [args.peers_python]
    if not ours:
        impl, _, backend = job.contender.partition("+")
        words += [str(HERE / "peer_step.py"), "--impl", impl, *(["--backend", backend] if backend else [])]
    words += ["--model", str(args.models / row.model), "--method", row.method, "--dtype", row.dtype]
    words += ["--batch", str(row.batch), "--seq", str(row.seq), "--steps", str(args.steps)]
    return words + (["--checkpointing"] if row.checkpointing else [])


def environment(isa: str, threads: int) -> dict[str, str]:
    """The same for everybody; settings of this shell that would favour or hinder one are dropped."""
    dropped = {name for settings in ISAS.values() for name in settings} | {"HALFBYTE_NATIVE", "HALFBYTE_BNB"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    common = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return kept | common | {"TOKENIZERS_PARALLELISM": "false"} | ISAS[isa]


def measure(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Run one process: {"result": its JSON line} or {"error": the last line it said}."""
    try:
        done = subprocess.run(
            command(job, args),
            env=environment(job.row.isa, args.threads),
            capture_output=True,
            text=True,
            timeout=args.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {args.timeout} s"}
    except OSError as error:
        return {"error": str(error)}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing on stderr"]
        return {"error": f"exit {done.returncode}: {said[-1].strip()}"}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"impl"')]
    return {"result": json.loads(lines[-1])} if lines else {"error": "printed no result"}


def say(number: int, total: int, job: Job, record: dict[str, Any], seconds: float) -> None:
    if "error" in record:
        told = f"failed: {record['error']}"
    else:
        result = record["result"]
        told = f"{result['tokens_per_second']:.0f} tokens/s, {result['peak_rss_bytes'] / 1e9:.2f} GB"
    print(
        f"[{number}/{total}] {job.row} | {job.contender} | round {job.round + 1}: {told} ({seconds:.0f} s)", flush=True
    )


def run(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    path = args.out / "results.jsonl"
    done = {json.dumps(record["key"]) for record in comparison_table.read(path) if "result" in record}
    revision = machine.revision()
    for number, job in enumerate(jobs, 1):
        key = json.loads(job.key)
        if json.dumps(key) in done:
            continue
        started = time.time()
        record = {"key": key, "revision": revision, "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        record |= measure(job, args)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        say(number, len(jobs), job, record, time.time() - started)


def check_machine(args: argparse.Namespace) -> None:
    """Write DIR/machine.json, or stop where the results there were measured on another machine or otherwise."""
    here = machine.describe(args.threads, args.peers_python if needs_peers(args) else None) | {"steps": args.steps}
    path = args.out / "machine.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [name for name, value in here.items() if value is not None and before.get(name) not in (None, value)]
        if changed:
            sys.exit(f"{args.out} was measured otherwise ({', '.join(changed)} changed): choose another --out")
        here = before | {name: value for name, value in here.items() if value is not None}
    path.write_text(json.dumps(here, indent=1) + "\n")


def needs_peers(args: argparse.Namespace) -> bool:
    return set(args.contenders) != {"halfbyte"}


def contender_list(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - set(CONTENDERS)):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(CONTENDERS)}")
    return names


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--preset", choices=["quick", "full"], default="quick")
    parser.add_argument("--row", type=parse_row, action="append", dest="rows", help="instead of a preset; repeatable")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the preset's rows")
    parser.add_argument("--contenders", type=contender_list, default=list(CONTENDERS[:4]), help=", ".join(CONTENDERS))
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--steps", type=positive, default=4, help="measured steps a process, after two more")
    parser.add_argument("--threads", type=positive, default=machine.cores())
    parser.add_argument("--isa", choices=[name for name in ISAS if name], default="", help="limit everybody to it")
    parser.add_argument("--models", type=Path, default=Path("~/.cache/halfbyte-models").expanduser())
    parser.add_argument("--peers-python", help="the Python of the environment with the peers")
    parser.add_argument("--timeout", type=positive, default=3600, help="seconds a process")
    parser.add_argument("--table-only", action="store_true", help="make the table of what is there")
    args = parser.parse_args(words)
    if args.table_only:
        return args
    args.rows = [replace(row, isa=args.isa) for row in args.rows or preset(args.preset, args.dtype)]
    if needs_peers(args) and not args.peers_python:
        parser.error("the peers need --peers-python (`make bench` makes it), or --contenders halfbyte")
    if missing := sorted({row.model for row in args.rows if not (args.models / row.model / "config.json").is_file()}):
        parser.error(f"no model folder {', '.join(missing)} in {args.models} (--models)")
    return args


def main() -> None:
    args = parse()
    if not args.table_only:
        args.out.mkdir(parents=True, exist_ok=True)
        check_machine(args)
        run(list(plan(args.rows, args.contenders, args.rounds)), args)
    table = comparison_table.make(args.out)
    (args.out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
