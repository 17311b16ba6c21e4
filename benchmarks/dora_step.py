"""What DoRA costs beside LoRA: the same training steps in one process, in turns.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/dora_step.py --model DIR --method qlora --batch 4 --seq 512 [--rounds 5]

Random tokens, rank 16, every token supervised, no dropout, AdamW; one micro-batch is one update, which is where DoRA
costs most: its rows' norms are made once an update. A round is a step of each. Prints one JSON line: the medians, the
ratio of each round, their median, the lowest and the highest. Memory is for `halfbyte_step.py --dora`: here the two
share a process, and what one leaves in it the other finds.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from halfbyte_step import make_batch
from torch import nn

from halfbyte.adapters import LoraOptions, attach
from halfbyte.linear import segments
from halfbyte.linear.dora import row_norms
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.ops import backend
from halfbyte.optim import OptimOptions
from halfbyte.optim.adamw import AdamW
from halfbyte.quant import DTYPES, QuantOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", choices=["lora", "qlora"], default="qlora")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()

    quant = QuantOptions() if args.method == "qlora" else None
    model = load_model(ModelOptions(model=args.model), quant, DTYPES[args.dtype]).model
    attach(model, LoraOptions(lora_r=args.rank))
    model.checkpointing = args.checkpointing
    adapters = [(s, s.adapter) for s in segments(model).values() if s.adapter is not None]
    magnitudes = [nn.Parameter(row_norms(segment.weight)) for segment, _ in adapters]
    batch = make_batch(args.batch, args.seq, 1.0, model.spec.vocab_size)
    plain = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizers = {
        "lora": AdamW(plain, OptimOptions()),
        "dora": AdamW(plain | {f"m{i}": p for i, p in enumerate(magnitudes)}, OptimOptions()),
    }

    def step(name: str) -> float:
        for (_, adapter), magnitude in zip(adapters, magnitudes, strict=True):
            adapter.magnitude = magnitude if name == "dora" else None
        start = time.perf_counter()
        loss, count = model.loss(batch)
        (loss / count).backward()
        optimizers[name].step(1e-4)
        optimizers[name].zero_grad()
        return time.perf_counter() - start

    for name in optimizers:
        for _ in range(2):
            step(name)
    measured: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(args.rounds):
        for name in optimizers:
            measured[name].append(step(name))
    ratios = [d / p for d, p in zip(measured["dora"], measured["lora"], strict=True)]
    print(
        json.dumps(
            {
                "model": Path(args.model).name,
                "backend": str(backend()),
                "threads": torch.get_num_threads(),
                **{key: getattr(args, key) for key in ("method", "batch", "seq", "rank", "dtype", "checkpointing")},
                **{f"{n}_seconds": statistics.median(runs) for n, runs in measured.items()},
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
        )
    )


if __name__ == "__main__":
    main()
