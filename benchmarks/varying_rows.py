"""Memory and time of training steps whose token counts all differ, as those of short rows do.

    python benchmarks/varying_rows.py MODEL [--steps 25] [--threads 1]

16 rows of 12 to 49 tokens a step, two of them supervised, QLoRA r 16 on all linears, no optimizer. Prints the resident
memory and its peak after every sixth step: what grows here is kernels that oneDNN keeps for every new shape, and a heap
that fragments.
"""

import argparse
import random
import time

import torch

from halfbyte.adapters import LoraOptions, attach, parameters
from halfbyte.batch import IGNORE, Batch
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.quant import QuantOptions
from halfbyte.train.memory import process_memory


def make_batch(rng: random.Random) -> Batch:
    lengths = [rng.randint(12, 49) for _ in range(16)]
    ids = torch.randint(10, 30000, (sum(lengths),))
    targets = torch.full_like(ids, IGNORE)
    ends = torch.tensor(lengths).cumsum(0)
    targets[ends - 2] = targets[ends - 3] = 9
    return Batch(ids, torch.cat([torch.arange(n) for n in lengths]), targets, tuple(lengths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(ModelOptions(model=args.model), QuantOptions()).model
    attach(model, LoraOptions())
    rng, started = random.Random(0), time.perf_counter()
    for step in range(args.steps):
        batch = make_batch(rng)
        loss, count = model.loss(batch)
        (loss / count).backward()
        for parameter in parameters(model):
            parameter.grad = None
        if step % 6 == 0:
            resident, peak = process_memory()
            print(f"step {step:3d}  {batch.tokens} tokens  {resident / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    print(f"{(time.perf_counter() - started) / args.steps:.2f} s a step")


if __name__ == "__main__":
    main()
