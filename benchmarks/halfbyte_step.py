"""One training step of halfbyte, timed: our side of `benchmarks/compare.py`.

    python benchmarks/halfbyte_step.py --model DIR --method qlora --batch 4 --seq 512 [--checkpointing] [--steps 4]
                                       [--gemm]

Random tokens from a fixed seed, LoRA on all linear layers without dropout, AdamW, bf16 unless --dtype says otherwise;
every token supervised unless --supervised says how many. Prints one JSON line: seconds of every measured step, their
median, tokens per second, the process's peak resident memory in bytes, seconds to load, the loss of the last step; with
--gemm also the rate of torch's own products (`gemm_rate.py`) and the step's share of it.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import gemm_rate
import torch

from halfbyte.adapters import LoraOptions, attach, parameters
from halfbyte.batch import IGNORE, Batch
from halfbyte.heap import give_back
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.ops import backend
from halfbyte.optim import OptimOptions
from halfbyte.optim.adamw import AdamW
from halfbyte.quant import DTYPES, QuantOptions
from halfbyte.train.memory import process_memory


def make_batch(batch: int, length: int, supervised: float, vocabulary: int = 30000) -> Batch:
    """`batch` documents of random tokens; the last `supervised` share of each carries the loss."""
    rows = torch.randint(10, min(30000, vocabulary), (batch, length), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(rows, IGNORE)
    targets[:, :-1] = rows[:, 1:]
    targets[:, : length - round(length * supervised)] = IGNORE
    positions = torch.arange(length).repeat(batch)
    return Batch(rows.flatten(), positions, targets.flatten(), (length,) * batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", choices=["lora", "qlora"], default="qlora")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--optim", default="adamw")
    parser.add_argument("--supervised", type=float, default=1.0)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--dora", action="store_true", help="train the rows' magnitudes, too")
    parser.add_argument("--gemm", action="store_true", help="measure torch's own products afterwards")
    parser.add_argument("--profile", action="store_true", help="print where the time of one more step goes")
    args = parser.parse_args()

    torch.manual_seed(0)
    started = time.perf_counter()
    quant = QuantOptions() if args.method == "qlora" else None
    loaded = load_model(ModelOptions(model=args.model), quant, DTYPES[args.dtype])
    model, spec = loaded.model, loaded.spec
    del loaded  # its tokenizer: the peers' loops hold none
    give_back()
    assert spec is not None, "the fallback has no shapes to count"
    load_seconds = time.perf_counter() - started
    _, load_peak = process_memory()
    attach(model, LoraOptions(lora_r=args.rank, lora_alpha=args.rank, use_dora=args.dora))
    model.checkpointing = args.checkpointing
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(named) == len(list(parameters(model)))
    optimizer = AdamW(named, OptimOptions(optim=args.optim))
    batch = make_batch(args.batch, args.seq, args.supervised, spec.vocab_size)
    loss = torch.zeros(())
    optimizer_seconds: list[float] = []

    def step() -> None:
        nonlocal loss
        loss, count = model.loss(batch)
        loss = loss / count
        loss.backward()
        start = time.perf_counter()
        optimizer.step(2e-4)
        optimizer_seconds.append(time.perf_counter() - start)
        optimizer.zero_grad()

    seconds = []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    if args.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40))
    median = statistics.median(seconds[2:])
    peak = process_memory()[1]
    tokens = args.batch * args.seq
    result = {
        "impl": "halfbyte",
        "backend": str(backend()),
        "method": args.method,
        "model": Path(args.model).name,
        "batch": args.batch,
        "seq": args.seq,
        "dtype": args.dtype,
        "checkpointing": args.checkpointing,
        "dora": args.dora,
        "seconds_per_step": median,
        "seconds": seconds[2:],
        "tokens_per_second": tokens / median,
        "optimizer_seconds": statistics.median(optimizer_seconds[2:]),
        "peak_rss_bytes": peak,
        "load_seconds": load_seconds,
        "load_peak_rss_bytes": load_peak,
        "loss": loss.item(),
    }
    if args.gemm:
        result["gemm_flops"] = gemm_rate.rate(spec, tokens, DTYPES[args.dtype])
        result["gemm_share"] = gemm_rate.step_operations(spec, tokens) / median / result["gemm_flops"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
