"""A Llama-7B-shaped model trained with QLoRA: random weights made as a stream, one tensor at a time, never whole.

    python benchmarks/llama7b_step.py [--seq 1024] [--steps 2] [--threads N] [--layers 32]

Llama 2 7B's shape (hidden 4096, intermediate 11008, 32 layers, 32 heads, vocabulary 32,000), NF4 with double
quantization, embeddings and head in bf16, LoRA r 16 on all linears, AdamW, activation checkpointing, every token
supervised. Prints one JSON line: seconds of each step, tokens per second, the process's peak resident memory.
"""

import argparse
import json
import statistics
import time

import torch
from halfbyte_step import make_batch

from halfbyte.adapters import LoraOptions, attach
from halfbyte.heap import give_back
from halfbyte.models.decoder import Decoder
from halfbyte.models.spec import ModelSpec
from halfbyte.optim import OptimOptions
from halfbyte.optim.adamw import AdamW
from halfbyte.quant import DenseWeight, QuantOptions, Weight, quantize
from halfbyte.train.memory import process_memory

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def build(layers: int, dtype: torch.dtype) -> Decoder:
    spec = ModelSpec.from_config(SHAPE | {"num_hidden_layers": layers})
    shapes = dict(spec.tensors())

    def made(name: str) -> torch.Tensor:
        return torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0.0, 0.02)

    def weight(name: str, quantizable: bool) -> Weight:
        return quantize(made(name), QuantOptions()) if quantizable else DenseWeight(made(name).to(dtype))

    return Decoder.build(spec, weight, lambda name: torch.ones(shapes[name]), dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    started = time.perf_counter()
    model = build(args.layers, torch.bfloat16)
    give_back()
    made_in = time.perf_counter() - started
    attach(model, LoraOptions(lora_r=16, lora_alpha=16))
    model.checkpointing = True
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamW(named, OptimOptions())
    batch = make_batch(1, args.seq, 1.0)
    seconds = []
    for _ in range(args.steps + 1):
        start = time.perf_counter()
        loss, count = model.loss(batch)
        loss = loss / count
        loss.backward()
        optimizer.step(2e-4)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    print(
        json.dumps(
            {
                "model": "llama-7b-shaped",
                "layers": args.layers,
                "seq": args.seq,
                "seconds": seconds[1:],
                "tokens_per_second": args.seq / median,
                "peak_rss_bytes": process_memory()[1],
                "make_seconds": made_in,
                "loss": loss.item(),
            }
        )
    )


if __name__ == "__main__":
    main()
