"""QLoRA from end to end in one flat file, on the library's parts: no config, no run directory, no abstractions.

    python examples/flat_qlora.py MODEL ROWS.jsonl ADAPTER_FOLDER --steps 100

Read it to see what `halfbyte train` does, or copy it to do something else. What it leaves out: checkpoints and resume,
evaluation while training, gradient accumulation beyond what memory asks for, and every kind of bookkeeping.
"""

import argparse
import time
from pathlib import Path

import torch

from halfbyte.adapters import LoraOptions, attach, disabled, save_adapter
from halfbyte.batch import Batch
from halfbyte.data import DataOptions, collate, plan_micro_batches, prepare
from halfbyte.evaluate.generate import generate
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.optim import OptimOptions, learning_rate_at
from halfbyte.optim.adamw import AdamW, clip_factor, global_norm
from halfbyte.quant import QuantOptions

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="a model folder, a Hub id or a GGUF file")
parser.add_argument("rows", help="training rows, in any form that halfbyte reads")
parser.add_argument("out", type=Path, help="where the adapter goes")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--rows-per-update", type=int, default=16)
parser.add_argument("--tokens-at-once", type=int, default=2048, help="what one forward and backward pass takes")
parser.add_argument("--seed", type=int, default=42)
arguments = parser.parse_args()

# The base model: linears in 4-bit NF4 with double quantization, everything else in a dtype that is fast here.
loaded = load_model(ModelOptions(model=arguments.model), QuantOptions(quant_type="nf4", blocksize=64))
model, tokenizer = loaded.model, loaded.tokenizer

# Adapters on every linear but the output head; only they are trained. They are float32, computed in the model's dtype.
lora = LoraOptions(lora_r=16, lora_alpha=32)
report = attach(model, lora, arguments.seed)
print(f"{report.trainable_parameters:,} of {report.total_parameters:,} parameters are trained ({report.share:.2%})")

# Rows become examples: token ids, and which of them the model has to predict. A few are held out.
data = prepare(DataOptions(data=arguments.rows, eval_split=0.05, max_seq_length=1024), tokenizer, arguments.seed)
order = data.sampler(arguments.seed)
print(f"{len(data.train):,} rows to train on, {len(data.eval):,} held out, as {data.data_format}")


def batches(examples: list) -> list[Batch]:
    """Examples laid end to end, without padding, in as few passes as `tokens_at_once` allows."""
    lengths = [len(example) for example in examples]
    pieces = plan_micro_batches(lengths, 1, packing=True, max_tokens=arguments.tokens_at_once)
    return [collate([examples[i] for i in piece]) for piece in pieces]


@torch.no_grad()
def held_out_loss() -> float:
    """Mean negative log-likelihood of a held-out token."""
    model.eval()
    total = tokens = 0.0
    for batch in batches(data.eval):
        nll, count = model.loss(batch)
        total, tokens = total + float(nll), tokens + count
    return total / tokens


print(f"held-out loss before: {held_out_loss():.4f}")

# AdamW over the adapters, with the learning rate as a function of the step.
options = OptimOptions(learning_rate=2e-4, lr_scheduler_type="cosine", warmup_ratio=0.03, max_grad_norm=1.0)
optimizer = AdamW({name: p for name, p in model.named_parameters() if p.requires_grad}, options)

started, seen = time.perf_counter(), 0
for step in range(1, arguments.steps + 1):
    rows = order.rows_for((step - 1) * arguments.rows_per_update, arguments.rows_per_update)
    micro_batches = batches([data.train[row] for row in rows])
    # The loss of an update is a mean over all its supervised tokens: each pass contributes its sum over that number.
    supervised = sum(batch.supervised_tokens for batch in micro_batches)
    model.train()
    loss = 0.0
    for batch in micro_batches:
        nll, _ = model.loss(batch)
        (nll / supervised).backward()
        loss += float(nll.detach()) / supervised
        seen += batch.tokens
    norm = global_norm(optimizer.gradients())
    optimizer.step(learning_rate_at(step, arguments.steps, options), clip_factor(norm, options.max_grad_norm))
    optimizer.zero_grad()
    if step == 1 or step % 10 == 0 or step == arguments.steps:
        rate = seen / (time.perf_counter() - started)
        print(f"step {step}/{arguments.steps}  loss {loss:.4f}  gradient {norm:.2f}  {rate:,.0f} tokens/s")

print(f"held-out loss after: {held_out_loss():.4f}")

# PEFT's own files: peft.PeftModel.from_pretrained loads this folder.
save_adapter(model, arguments.out, lora, base=arguments.model)
print(f"saved {arguments.out}")

# One held-out row, without and with the adapter.
example = next((e for e in data.eval if e.prompt_length), None)
if example is not None:
    prompt, greedy = example.prompt_ids.tolist(), GenerateOptions(max_new_tokens=40)
    with disabled(model):
        base = generate(model, tokenizer, prompt, greedy, data.stop_ids)
    tuned = generate(model, tokenizer, prompt, greedy, data.stop_ids)
    print(f"asked:    {example.prompt}\nexpected: {example.completion}\nbase:     {base.text}\ntuned:    {tuned.text}")
