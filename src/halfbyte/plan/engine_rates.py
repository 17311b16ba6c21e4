"""How fast halfbyte's own operators are on this machine: each is run for some tens of milliseconds on random numbers.

torch's matrix product says what the processor can do, and not what a fused 4-bit linear, an attention over documents or
the chunked loss reach; these are the parts that a training step consists of. Forward and backward pass together.

Units: FLOP/s (a multiply-add is two operations).
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.ops import attention, linear, loss
from halfbyte.quant import DenseWeight, QuantOptions, Weight, quantize

TOKENS, FEW, WIDTH, RANK = 512, 64, 1024, 16
VOCABULARY = 8192
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
BUDGET = 0.12
"""Seconds for each operator and dtype."""


def measure(dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of forward and backward pass with the native engine.

    quantized    an NF4 linear with an adapter of rank 16, base products alone counted, 512 tokens; `few`: 64 tokens
    dense        the same with its weight in `dtype`
    loss         the head with its softmax; attention: causal, of the pairs that are seen
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    values = random(WIDTH, WIDTH) / WIDTH**0.5
    return {
        "quantized": _linear(quantize(values.to(dtype), QuantOptions()), random, dtype, TOKENS),
        "few": _linear(quantize(values.to(dtype), QuantOptions()), random, dtype, FEW),
        "dense": _linear(DenseWeight(values.to(dtype)), random, dtype, TOKENS),
        "loss": _loss(random, dtype),
        "attention": _attention(random, dtype),
    }


def _linear(weight: Weight, random: Callable[..., Tensor], dtype: torch.dtype, tokens: int) -> float:
    view = weight.native_view()
    assert view is not None
    segment = linear.LinearSegment(view, None, random(RANK, WIDTH), random(WIDTH, RANK), 1.0)
    x_TI, dy_TO = random(tokens, WIDTH).to(dtype), random(tokens, WIDTH).to(dtype)
    low_TR = random(tokens, RANK).to(dtype)

    def both() -> None:
        linear.linear_forward(x_TI, [segment])
        linear.linear_backward(dy_TO, x_TI, low_TR, [segment], needs_input=True)

    return 4.0 * tokens * WIDTH * WIDTH / best_seconds(both)


def _loss(random: Callable[..., Tensor], dtype: torch.dtype) -> float:
    view = DenseWeight((random(VOCABULARY, WIDTH) / WIDTH**0.5).to(dtype)).native_view()
    assert view is not None
    hidden_ND, targets_N = random(TOKENS, WIDTH).to(dtype), torch.arange(TOKENS)
    seconds = best_seconds(lambda: loss.linear_cross_entropy(hidden_ND, view, targets_N, None, needs_grad=True))
    return 4.0 * TOKENS * VOCABULARY * WIDTH / seconds


def _attention(random: Callable[..., Tensor], dtype: torch.dtype) -> float:
    qkv = random(TOKENS, HEADS + 2 * KV_HEADS, HEAD_DIM).to(dtype)
    q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
    dout, scale = random(TOKENS, HEADS, HEAD_DIM).to(dtype), HEAD_DIM**-0.5

    def both() -> None:
        out, lse = attention.attention(q, k, v, (TOKENS,), scale)
        attention.attention_backward(dout, q, k, v, out, lse, (TOKENS,), scale)

    # Two products forward and five backward, of the pairs that are seen.
    return 7.0 * 2 * HEADS * HEAD_DIM * TOKENS * TOKENS / 2 / best_seconds(both)


def best_seconds(call: Callable[[], object], budget: float | None = None) -> float:
    """The fastest of several calls within `budget` seconds (BUDGET): the rate without the neighbours' noise."""
    best, deadline = float("inf"), time.perf_counter() + (BUDGET if budget is None else budget)
    for attempt in range(50):
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        if attempt:  # the first call pays for page faults and kernel choice
            best = min(best, seconds)
        if attempt >= 2 and time.perf_counter() > deadline:
            break
    return best
