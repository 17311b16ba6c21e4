"""The optimizer's state in memory: plain tensors, or on a GPU such that the driver may move to the host.

A store hands out the work of a step chunk by chunk (`walk`), gives its tensors by their keys for a checkpoint, and
takes them back. `paged.PagedStates` is the other one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from halfbyte.optim.moments import State
from halfbyte.optim.slots import Chunk, Slot, Span
from halfbyte.tensorfile import Planned, part_of

Allocate = Callable[[int, torch.dtype, torch.device], Tensor]
"""(elements, type, device) -> memory for them."""

Work = tuple[Span, State, Tensor]
"""A span, its state, and its gradient in the gradient's own type."""

SMALLEST_MANAGED = 100_000
"""Elements below which a tensor stays on the GPU; bitsandbytes draws the line there too."""


def plain(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(count, dtype=dtype, device=device)


def managed(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """CUDA's managed memory through bitsandbytes: under pressure the driver moves its pages to the host and back.

    bitsandbytes hands out a tensor that looks like a CPU's over such memory; the kernels here want a CUDA tensor over
    the same bytes, which CUDA's array interface gives. The memory is bitsandbytes' and is freed with the process.
    """
    if device.type != "cuda" or count < SMALLEST_MANAGED:
        return plain(count, dtype, device)
    import bitsandbytes.functional as bnb

    host = bnb.get_paged(count, dtype=dtype, device=device)
    return torch.as_tensor(_CudaArray(host), device=device)


class _CudaArray:
    """Managed memory as CUDA's array interface describes it; holds the tensor that owns the address."""

    def __init__(self, host: Tensor) -> None:
        kind = {torch.float32: "<f4", torch.uint8: "|u1", torch.int16: "<i2"}[host.dtype]
        self.host = host
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": tuple(host.shape),
            "typestr": kind,
            "data": (host.data_ptr(), False),
            "version": 3,
        }


class HeldStates:
    """All state in memory."""

    def __init__(self, slots: Sequence[Slot], chunks: Sequence[Chunk], allocate: Allocate = plain) -> None:
        self.chunks = list(chunks)
        self._chunks_of: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            for name in dict.fromkeys(span.slot.name for span in chunk):
                self._chunks_of.setdefault(name, []).append(chunk)
        self.states: dict[str, State] = {}
        for slot in slots:
            tensors = {end: allocate(n, dtype, slot.device) for end, (dtype, n) in slot.layout().items()}
            self.states[slot.name] = State.over(tensors)
            self.states[slot.name].reset()

    def walk(self, slot: Slot | None = None) -> Iterator[list[Work]]:
        """The work of a step, or of one slot of it; spans without a gradient are left out."""
        for chunk in self.chunks if slot is None else self._chunks_of[slot.name]:
            work = []
            for span in chunk:
                gradient = span.slot.gradient(span.start, span.stop) if slot in (None, span.slot) else None
                if gradient is not None:
                    work.append((span, self.states[span.slot.name].part(span.start, span.stop), gradient))
            if work:
                yield work

    def tensors(self) -> dict[str, Tensor]:
        """The storage itself by key."""
        return {name + end: t for name, state in self.states.items() for end, t in state.tensors().items()}

    def planned(self) -> list[Planned]:
        """What a checkpoint writes."""
        return [Planned.of(key, tensor) for key, tensor in self.tensors().items()]

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take the values of a checkpoint, whose layout has been compared."""
        for key, tensor in self.tensors().items():
            for start in range(0, tensor.numel(), RESTORED_AT_ONCE):
                stop = min(start + RESTORED_AT_ONCE, tensor.numel())
                tensor[start:stop].copy_(part_of(saved, key, start, stop))

    def reset(self) -> None:
        """Every state as before the first step."""
        for state in self.states.values():
            state.reset()

    def close(self) -> None:
        """Nothing to remove."""


RESTORED_AT_ONCE = 1 << 24
