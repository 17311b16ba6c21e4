"""Memory for activations that is owned and reused, instead of allocated anew in every step.

glibc serves the large and small tensors of a step from one heap, where those that live until the backward pass come to
lie between those that do not: a quarter of the peak of Gemma 3 270M's step was such holes. Mapping every tensor by
itself leaves no holes and costs a page fault for every 4 KB. Here a tensor's memory is a mapping of its own that goes
back to a list when the last tensor on it is gone, and serves the next one of about that size.

More is never held than was in use at once: before a new mapping is made, idle ones go.
"""

import mmap
import threading
import weakref
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from halfbyte.heap import give_back

SMALLEST = 1 << 18
"""Bytes from which on a tensor comes from here; smaller ones are the C library's business."""
_SLACK = 8  # a mapping serves a tensor that is smaller by at most an eighth
_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)


class Pool:
    """Mappings by size. `held`, `used` and `peak` (of `used`) are bytes."""

    def __init__(self) -> None:
        self.held = self.used = self.peak = 0
        self._idle: list[mmap.mmap] = []  # the longest unused first
        # Tensors die in any thread, also inside `take`, when the garbage collector runs there.
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> memoryview:
        """A writable view of at least `nbytes`; when nothing refers to it any more, its memory is free again."""
        with self._lock:
            block = self._pop(nbytes) or self._map(nbytes)
            self.used += len(block)
            self.peak = max(self.peak, self.used)
        view = memoryview(block)
        weakref.finalize(view, self._return, block).atexit = False
        return view

    def _pop(self, nbytes: int) -> mmap.mmap | None:
        fitting = [b for b in self._idle if nbytes <= len(b) <= nbytes + nbytes // _SLACK]
        if not fitting:
            return None
        best = min(fitting, key=len)
        self._idle.remove(best)
        return best

    def _map(self, nbytes: int) -> mmap.mmap:
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        while self._idle and self.held + size > max(self.peak, self.used + size):
            self.held -= len(self._idle[0])
            del self._idle[0]
        try:
            block = _mapping(size)
        except OSError:  # what lies idle may be what is missing
            self.held -= sum(len(idle) for idle in self._idle)
            self._idle.clear()
            try:
                block = _mapping(size)
            except OSError as error:
                raise MemoryError(f"no memory for {size:,} bytes of activations") from error
        if _HUGE is not None and size >= 1 << 22:
            block.madvise(_HUGE)
        self.held += size
        return block

    def _return(self, block: mmap.mmap) -> None:
        with self._lock:
            self.used -= len(block)
            self._idle.append(block)

    def clear(self) -> None:
        """Give every idle mapping back to the system."""
        with self._lock:
            self.held -= sum(len(block) for block in self._idle)
            self._idle.clear()
            self.peak = self.used


def _mapping(size: int) -> mmap.mmap:
    """Private where the system makes a difference: shared memory gets no huge pages, and no limit on data counts it."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


pool = Pool()


def release() -> None:
    """Give what lies idle back to the system, the pool's mappings and the heap's pages: before work of other sizes."""
    pool.clear()
    give_back()


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As torch.empty on the CPU, from the pool where it is large."""
    count = prod(shape)
    nbytes = count * dtype.itemsize
    if nbytes < SMALLEST:
        return torch.empty(tuple(shape), dtype=dtype)
    # `set_`, not `view`: what a custom Function returns must not be a view, or nobody may write to it.
    memory = torch.frombuffer(pool.take(nbytes), dtype=dtype, count=count).untyped_storage()
    tensor: Any = torch.empty(0, dtype=dtype)
    result: Tensor = tensor.set_(memory, 0, tuple(shape))
    return result


def empty_like(tensor: Tensor) -> Tensor:
    """Contiguous, whatever the strides of `tensor`."""
    return empty(tensor.shape, tensor.dtype)
