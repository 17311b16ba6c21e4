"""One training step of the programs that people use today, timed: the other side of `benchmarks/compare.py`.

    python benchmarks/peer_step.py --model DIR --impl loop|compile|trl --method lora|qlora --batch 4 --seq 512
                                   [--dtype bf16|fp32] [--checkpointing] [--backend halfbyte] [--steps 4]

    loop     transformers, PEFT and bitsandbytes in a plain training loop under autocast: the least they can cost
    compile  the same loop with the model under torch.compile
    trl      TRL's SFTTrainer, its defaults but for `chunked_nll`: what a user gets

The work is `halfbyte_step.py`'s: the same random tokens, every one supervised, LoRA on all linear layers without
dropout, AdamW; QLoRA is NF4 with double quantization. --backend halfbyte lets bitsandbytes run halfbyte's kernels
(docs/bitsandbytes.md), which must be installed beside it. Prints the same JSON line as `halfbyte_step.py`.

It runs in an environment of its own (`peers-requirements.txt`) and imports nothing of halfbyte unless told to.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import psutil
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WARM_UP = 2


def peak_memory() -> int:
    """The process's peak resident set in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        return max(psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def load(args: argparse.Namespace) -> torch.nn.Module:
    quantization = None
    if args.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[args.dtype],
        )
    return AutoModelForCausalLM.from_pretrained(
        args.model, dtype=DTYPES[args.dtype], attn_implementation="sdpa", quantization_config=quantization
    )


def lora_config(args: argparse.Namespace) -> LoraConfig:
    return LoraConfig(
        r=args.rank, lora_alpha=args.rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def random_tokens(args: argparse.Namespace, vocabulary: int) -> torch.Tensor:
    """int64 [batch, seq], as `halfbyte_step.make_batch` draws them."""
    shape = (args.batch, args.seq)
    return torch.randint(10, min(30000, vocabulary), shape, generator=torch.Generator().manual_seed(0))


class Measured:
    """Seconds of each step and of its optimizer, and the last loss."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.loss = float("nan")


def run_loop(args: argparse.Namespace, model: torch.nn.Module) -> Measured:
    tokens = random_tokens(args, model.config.vocab_size)
    if args.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.checkpointing)
    elif args.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = get_peft_model(model, lora_config(args))
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    if args.impl == "compile":
        model = torch.compile(model)
    measured = Measured()
    for _ in range(args.steps + WARM_UP):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype == "bf16"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        before = time.perf_counter()
        optimizer.step()
        measured.optimizer_seconds.append(time.perf_counter() - before)
        optimizer.zero_grad()
        measured.seconds.append(time.perf_counter() - start)
    measured.loss = loss.item()
    return measured


class Clock(TrainerCallback):
    """Times whole steps, optimizer included, and keeps the loss that the trainer logs."""

    def __init__(self) -> None:
        self.measured = Measured()

    def on_step_begin(self, *_args: object, **_values: object) -> None:
        self.start = time.perf_counter()

    def on_pre_optimizer_step(self, *_args: object, **_values: object) -> None:
        self.before = time.perf_counter()

    def on_optimizer_step(self, *_args: object, **_values: object) -> None:
        self.measured.optimizer_seconds.append(time.perf_counter() - self.before)

    def on_step_end(self, *_args: object, **_values: object) -> None:
        self.measured.seconds.append(time.perf_counter() - self.start)

    def on_log(self, _args: object, _state: object, _control: object, logs: dict | None = None, **_: object) -> None:
        self.measured.loss = float((logs or {}).get("loss", self.measured.loss))


def run_trl(args: argparse.Namespace, model: torch.nn.Module) -> Measured:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = random_tokens(args, model.config.vocab_size).tolist() * (args.steps + WARM_UP)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=args.batch,
            max_length=args.seq,
            max_steps=args.steps + WARM_UP,
            learning_rate=2e-4,
            bf16=args.dtype == "bf16",
            use_cpu=True,
            gradient_checkpointing=args.checkpointing,
            loss_type="chunked_nll",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=lora_config(args),
            callbacks=[clock],
        )
        trainer.train()
    return clock.measured


def use_backend(name: str) -> None:
    import bitsandbytes  # noqa: F401

    if name == "halfbyte":
        from halfbyte import bnb_backend

        bnb_backend.enable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--impl", choices=["loop", "compile", "trl"], default="loop")
    parser.add_argument("--backend", choices=["bitsandbytes", "halfbyte"], default="bitsandbytes")
    parser.add_argument("--method", choices=["lora", "qlora"], default="qlora")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights; bf16: under autocast")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    use_backend(args.backend)
    started = time.perf_counter()
    model = load(args)
    load_seconds, load_peak = time.perf_counter() - started, peak_memory()
    measured = (run_trl if args.impl == "trl" else run_loop)(args, model)
    seconds = measured.seconds[WARM_UP:]
    median = statistics.median(seconds)
    print(
        json.dumps(
            {
                "impl": args.impl if args.backend == "bitsandbytes" else f"{args.impl}+{args.backend}",
                "method": args.method,
                "model": Path(args.model).name,
                "batch": args.batch,
                "seq": args.seq,
                "dtype": args.dtype,
                "checkpointing": args.checkpointing,
                "seconds_per_step": median,
                "seconds": seconds,
                "tokens_per_second": args.batch * args.seq / median,
                "optimizer_seconds": statistics.median(measured.optimizer_seconds[WARM_UP:]),
                "peak_rss_bytes": peak_memory(),
                "load_seconds": load_seconds,
                "load_peak_rss_bytes": load_peak,
                "loss": measured.loss,
            }
        )
    )


if __name__ == "__main__":
    main()
