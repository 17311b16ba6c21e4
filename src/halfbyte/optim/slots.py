"""One trained parameter as AdamW sees it, and the pieces in which it is updated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.errors import UsageError
from halfbyte.optim import moments
from halfbyte.optim.moments import SMALLEST_QUANTIZED, Layout


class Slot:
    """A parameter of which every element has moments of its own.

    rate       factor on the learning rate (LoRA+)
    decays     whether weight decay applies: to matrices, not to norms and biases
    in_bytes   whether its moments take one byte an element; half: whether it has bits below its own 16
    """

    def __init__(self, name: str, parameter: nn.Parameter, in_bytes: bool, rate: float = 1.0) -> None:
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise UsageError(f"{name} is {parameter.dtype}: trainable weights must be float32 or bfloat16")
        if not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous: AdamW works on flat views")
        self.name, self.parameter, self.rate = name, parameter, rate
        self.decays = parameter.ndim >= 2
        self.numel = parameter.numel()
        self.in_bytes = in_bytes and self.numel >= SMALLEST_QUANTIZED
        self.half = parameter.dtype == torch.bfloat16

    def layout(self, count: int | None = None) -> Layout:
        """The tensors that hold the state of `count` elements (all of them by default)."""
        return moments.layout(self.numel if count is None else count, self.in_bytes, self.half)

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    def weight(self, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened parameter, the storage itself."""
        return self.parameter.detach().view(-1)[start:stop]

    def gradient(self, start: int, stop: int) -> Tensor | None:
        """The same elements of the gradient in its own type; None where there is none."""
        gradient = self.parameter.grad
        return None if gradient is None else gradient.detach().reshape(-1)[start:stop]


@dataclass(frozen=True)
class Span:
    """Elements start..stop of one flattened parameter; `start` is a multiple of the moments' block."""

    slot: Slot
    start: int
    stop: int

    @property
    def weight(self) -> Tensor:
        return self.slot.weight(self.start, self.stop)


Chunk = list[Span]
"""Spans that are updated at once, all with the same factor on the learning rate and on one device."""


def chunks_of(slots: Sequence[Slot], limit: int) -> list[Chunk]:
    """Group parameters into chunks of at most `limit` elements. Where a span begins depends on its own slot alone."""
    chunks: list[Chunk] = []
    room, kind = 0, None
    for slot in sorted(slots, key=lambda slot: slot.rate):  # stable: otherwise in the order of the parameters
        for start in range(0, slot.numel, limit):
            span = Span(slot, start, min(slot.numel, start + limit))
            size = span.stop - span.start
            if size > room or kind != (slot.device, slot.rate):
                chunks.append([])
                room, kind = limit, (slot.device, slot.rate)
            chunks[-1].append(span)
            room -= size
    return chunks
