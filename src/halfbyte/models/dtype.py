"""Which type to compute in on this machine, by measurement."""

import time
from functools import cache

import torch

_GAIN = 1.2
_ROUNDS = 5


@cache
def fast_dtype() -> tuple[torch.dtype, str]:
    """bfloat16 if its matrix products are at least 1.2 times as fast as float32's here, else float32; and why.

    A processor without bfloat16 instructions emulates them (10 times slower than float32), one with AMX gains 5
    to 10 times: the gap is wide, and the threshold keeps noise from deciding. Some tens of milliseconds, once a
    process. A run records the type that was chosen, so that resuming does not measure again.
    """
    single, half = _rates((torch.float32, torch.bfloat16))
    gain = half / single
    figures = f"bf16 {half / 1e12:.2f} TFLOP/s, float32 {single / 1e12:.2f}"
    if gain >= _GAIN:
        return torch.bfloat16, f"bfloat16: measured {figures} on this processor"
    return torch.float32, f"float32: measured {figures} on this processor; bfloat16 is not fast here"


def _rates(dtypes: tuple[torch.dtype, ...], rows: int = 256, width: int = 1024) -> list[float]:
    """Best FLOP/s of a linear in each type on one thread, the rounds interleaved so that a busy moment hits all.

    One thread, because on busy cores several wait for each other longer than they compute, and that once turned the
    choice around.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _best(dtypes, rows, width)
    finally:
        torch.set_num_threads(threads)


def _best(dtypes: tuple[torch.dtype, ...], rows: int, width: int) -> list[float]:
    data = {d: (torch.ones(rows, width, dtype=d), torch.ones(width, width, dtype=d)) for d in dtypes}
    best = dict.fromkeys(dtypes, float("inf"))
    with torch.no_grad():
        for round_ in range(_ROUNDS + 1):
            for dtype, (x, weight) in data.items():
                start = time.perf_counter()
                torch.nn.functional.linear(x, weight)
                seconds = time.perf_counter() - start
                if round_:  # the first round warms caches and builds oneDNN's kernels
                    best[dtype] = min(best[dtype], seconds)
    return [2 * rows * width * width / best[d] for d in dtypes]
