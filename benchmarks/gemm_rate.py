"""The rate of torch's own matrix products on a model's own shapes: what a training step is held against.

A LoRA step multiplies every base weight twice a token: forward (x W^T) and for the gradient of its input (g W). For
each distinct shape of a model's linears and head, both products are timed at T tokens with `out=` given (a fresh output
of more than 30 MB costs page faults), the best of a few runs counting; each weighs as often as the model has it. The
rate is the sum of the operations over the sum of the best times: what a step of nothing but torch's best products
would reach.
"""

import time
from collections import Counter

import torch

from halfbyte.models.spec import ModelSpec


def shapes(spec: ModelSpec) -> Counter[tuple[int, int]]:
    """(out_features, in_features) of every product with a base weight, head included, and how often a model has it."""
    found = Counter((linear.out_features, linear.in_features) for linear in spec.linears())
    found[spec.vocab_size, spec.hidden_size] += 1
    return found


def step_operations(spec: ModelSpec, tokens: int) -> int:
    """Floating-point operations of a step's products with base weights: 2 forward, 2 for the gradient, a weight and
    token. What checkpointing computes again is not counted."""
    return 4 * spec.matmul_parameters() * tokens


def _best(out: int, width: int, tokens: int, dtype: torch.dtype, repeats: int) -> float:
    """Best seconds of forward and input gradient of one shape, added."""
    weight = torch.full((out, width), 0.5, dtype=dtype)
    x, y = torch.full((tokens, width), 0.5, dtype=dtype), torch.full((tokens, out), 0.5, dtype=dtype)
    total = 0.0
    for left, right, result in ((x, weight.t(), y), (y, weight, x)):
        best = float("inf")
        for round_ in range(repeats + 1):
            start = time.perf_counter()
            torch.mm(left, right, out=result)
            if round_:  # the first builds oneDNN's kernel
                best = min(best, time.perf_counter() - start)
        total += best
    return total


def rate(spec: ModelSpec, tokens: int, dtype: torch.dtype, repeats: int = 3) -> float:
    """Operations per second."""
    with torch.no_grad():
        seconds = sum(n * _best(out, width, tokens, dtype, repeats) for (out, width), n in shapes(spec).items())
    return step_operations(spec, tokens) / seconds
