"""What the native library does where memory runs out: MemoryError, and afterwards it works as before.

Under RLIMIT_DATA, in processes of their own: an abort would take pytest with it.
"""

import re
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from halfbyte.ops import attention, linear, loss, native, pool
from tests.limits import in_new_process, limited

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only"),
    pytest.mark.skipif(native.library() is None, reason="no native library"),
]
ROOM = 6_000_000
"""Bytes for the results of the calls below, but not for what they work with."""


def big_linear() -> Callable[[], Tensor]:
    view = linear.dense_view(torch.randn(256, 2048))
    x = torch.randn(2048, 2048)
    assert view is not None
    return lambda: linear.linear_forward(x, [linear.LinearSegment(view)])[0]


def big_attention() -> Callable[[], Tensor]:
    q, k, v = (torch.randn(2048, 8, 64) for _ in range(3))
    return lambda: attention.attention(q, k, v, (2048,), 0.125, None, None)[0]


def big_loss() -> Callable[[], Tensor]:
    view = linear.dense_view(torch.randn(8192, 64))
    hidden, targets = torch.randn(2048, 64), torch.arange(2048)
    assert view is not None
    return lambda: loss.linear_cross_entropy(hidden, view, targets, None, True)[0]


def starved(make: Callable[[], Callable[[], Tensor]], threads: int) -> tuple[str, bool]:
    """(what a call without memory raised, whether the same call with memory is then what it is elsewhere)."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    call = make()
    with limited(ROOM):
        try:
            call()
            raised = "nothing"
        except MemoryError as error:
            raised = str(error)
    after = call()
    return raised, torch.equal(after, call()) and bool(after.isfinite().all())


def mapped() -> str:
    """The pool gives up what lies idle before it gives up."""
    idle = pool.empty((40_000_000,), torch.uint8)
    del idle
    with limited(10_000_000):
        held = pool.empty((45_000_000,), torch.uint8)  # does not fit beside the idle one, but in its place
        try:
            pool.empty((50_000_000,), torch.uint8)
        except MemoryError as error:
            return f"{held.numel()} {error}"
    return "nothing was raised"


def test_the_pool_says_so_and_gives_up_what_is_idle_first() -> None:
    assert re.fullmatch(r"45000000 no memory for 50,\d{3},\d{3} bytes of activations", in_new_process(mapped))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("function", [big_linear, big_attention, big_loss])
def test_scratch_that_cannot_be_had_is_a_memory_error(function: Callable[[], Tensor], threads: int) -> None:
    raised, works = in_new_process(starved, function, threads)
    assert raised.endswith("of the native library found no memory to work with"), raised
    assert works
