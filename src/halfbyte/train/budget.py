"""A run kept within its memory: what stands is read, what a micro-batch takes beside it is learnt. Where the next one
would not fit, or an allocation fails, the run goes on in a layout that takes less instead of dying.

    Layout      the steps below what the plan chose: smaller micro-batches, then recomputed activations, and for
                evaluation smaller chunks. It is in every checkpoint, so that a resumed run goes on with it
    Budget      before(kind, tokens) raises Shortage where the work would not fit; settle() learns what it took
    Watched     the loop's model, whose every micro-batch passes by the budget

None of the steps changes an update: the rows, the effective batch and the weights of the terms stay the same.

The limit is the run's own budget (`--memory`), or what the machine and its control group have left where that is less.
On a GPU it is the card's memory, and what torch's allocator holds of it.
"""

import errno
import gc
import math
import sys
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from halfbyte.batch import Batch
from halfbyte.errors import DoesNotFit
from halfbyte.ops.pool import release
from halfbyte.plan.hardware import memory_available
from halfbyte.train.memory import data_left, process_memory
from halfbyte.train.update import Model

Kind = Literal["train", "evaluate"]
T = TypeVar("T")

FAILURES = (MemoryError, RuntimeError, OSError)
"""What a failed allocation is raised as; `is_shortage` tells it from the rest."""
_WORDS = ("can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc", "out of memory")
"""torch's allocators (c10/core/impl/alloc_cpu.cpp), the C library and the C++ one."""
STEP_ROOM = 64_000_000
"""What an optimizer's step and a save need beside what stands, at most: chunks and pieces of some MB."""
FARTHEST = 4
"""A need is foretold from micro-batches of at least a quarter of the tokens; what is fixed is most of smaller ones."""
FRESH = 0.1
"""Seconds for which a reading of the machine's free memory holds: it takes 0.4 ms, as much as a small micro-batch."""


class Shortage(MemoryError):
    """The work that comes next would not fit; nothing of it was begun.

    foretold    only by what the machine has left, which nobody promised to keep: it may well go on all the same
    """

    def __init__(self, message: str, foretold: bool = False) -> None:
        super().__init__(message)
        self.foretold = foretold


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


@dataclass(frozen=True)
class Layout:
    """Steps below the layout that the plan chose.

    halvings               micro-batches are cut in half so many times; accumulation grows with it
    recompute              activations are recomputed in the backward pass, also if the plan kept them
    evaluation_halvings    the same for the chunks of an evaluation
    """

    halvings: int = 0
    recompute: bool = False
    evaluation_halvings: int = 0

    def lower(self, lowest: "Layout", kind: Kind) -> "Layout | None":
        """The next step for what ran short, down to `lowest`; None where there is none."""
        if kind == "evaluate":
            if self.evaluation_halvings < lowest.evaluation_halvings:
                return replace(self, evaluation_halvings=self.evaluation_halvings + 1)
            return None
        if self.halvings < lowest.halvings:
            return replace(self, halvings=self.halvings + 1)
        return replace(self, recompute=True) if lowest.recompute and not self.recompute else None

    def change_from(self, before: "Layout") -> str:
        """The step in words."""
        if self.halvings != before.halvings:
            return (
                f"micro-batches are now 1/{2**self.halvings} of the planned ones, with accumulation to match: "
                "the updates are the same"
            )
        if self.recompute != before.recompute:
            return "activations are now recomputed in the backward pass: the updates are the same, and slower"
        return f"evaluation goes in chunks of 1/{2**self.evaluation_halvings} of the planned ones"


AS_PLANNED = Layout()


class Needs:
    """What some kind of work took beside what stands, by its tokens."""

    def __init__(self) -> None:
        self._taken: list[tuple[int, int]] = []  # (tokens, bytes), both rising

    def learn(self, tokens: int, taken: int) -> None:
        """Note one measurement; what took more with fewer tokens replaces what it contradicts."""
        if any(t <= tokens and b >= taken for t, b in self._taken):
            return
        self._taken = [(t, b) for t, b in self._taken if t < tokens or b > taken]
        insort(self._taken, (tokens, taken))

    def of(self, tokens: int) -> int | None:
        """Bytes that so many tokens will take; None where nothing comparable was seen.

        In proportion to the next larger one seen, or to the largest, and at least what fewer tokens took.
        """
        if not self._taken:
            return None
        seen, taken = next(((t, b) for t, b in self._taken if t >= tokens), self._taken[-1])
        if tokens > FARTHEST * seen:
            return None
        least = max((b for t, b in self._taken if t <= tokens), default=0)
        return max(least, taken * tokens // max(seen, 1))


@dataclass(frozen=True)
class _Begun:
    """Work that is under way: its kind and tokens, and the process's peak before it."""

    kind: Kind
    tokens: int
    peak: int


@dataclass(frozen=True)
class _Level:
    """The largest work of a kind that was seen last: its tokens, what stood after it, and its peak."""

    tokens: int
    after: int
    peak: int


class Budget:
    """Watches the memory of one run.

    limit     bytes that the run may take (the process, or on a GPU torch's part of the card); None: what there is
    kind      what is being done, for whom it is that must take less where an allocation fails
    standing  what is held when nothing is computed, as last measured; reached: what the last work went up to
    """

    def __init__(self, limit: int | None, device: torch.device) -> None:
        self.limit, self.device = limit, device
        self.kind: Kind = "train"
        self.needs: dict[Kind, Needs] = {"train": Needs(), "evaluate": Needs()}
        self._levels: dict[Kind, _Level] = {}
        self._begun: _Begun | None = None
        self._half_way = 0
        self._reachable, self._read_again = 0, 0.0
        self.standing = 0
        self.reached = 0
        self.tidy()

    # -- reading ----------------------------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        """(bytes now, peak so far): of the process, or on a GPU of torch's allocator."""
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device), torch.cuda.max_memory_reserved(self.device)
        return process_memory()

    def most(self, now: int) -> int:
        """Bytes that this run may have reached at most, from where it is now."""
        clock = time.perf_counter()
        if clock >= self._read_again:
            left = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else memory_available()
            self._reachable, self._read_again = now + left, clock + FRESH
        return self._reachable if self.limit is None else min(self.limit, self._reachable)

    def ignore_machine(self) -> None:
        """From here on only the run's own limit counts, and allocations that fail."""
        self._reachable, self._read_again = sys.maxsize, math.inf

    def tidy(self) -> int:
        """Give back what nobody uses, and return what then stands."""
        before = self.memory()[0]
        gc.collect()
        release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.standing = self.memory()[0]
        # What came since may stay; the same work reaches no more than it did beside that.
        for kind, level in self._levels.items():
            self._levels[kind] = _Level(level.tokens, self.standing, level.peak + max(0, before - level.after))
        return self.standing

    # -- around the work --------------------------------------------------------------------------------------------

    def before(self, kind: Kind, tokens: int) -> None:
        """Call it before work of so many tokens. Shortage if that would go over the limit."""
        self.settle()
        self.kind = kind
        now, peak = self.memory()
        need = self.needs[kind].of(tokens)
        if need is not None and not self._is_safe(kind, tokens, need, now):
            standing, need = self._tidied(kind, tokens, need)
            most = self.most(standing)
            if standing + need > most:
                raise Shortage(
                    f"{tokens:,} tokens need about {need / 1e9:.2f} GB beside the {standing / 1e9:.2f} GB that are "
                    f"held, and the limit is {most / 1e9:.2f} GB",
                    foretold=self.limit is None or standing + need <= self.limit,
                )
            peak = self.memory()[1]
        self._begun, self._half_way = _Begun(kind, tokens, peak), 0

    def _is_safe(self, kind: Kind, tokens: int, need: int, now: int) -> bool:
        """Whether it fits without tidying: beside all that is held, or as its like did, plus what came since."""
        most, level = self.most(now), self._levels.get(kind)
        if now + need <= most:
            return True
        return level is not None and tokens <= level.tokens and level.peak + max(0, now - level.after) <= most

    def _tidied(self, kind: Kind, tokens: int, need: int) -> tuple[int, int]:
        """(what stands when all that is idle was given back, what the work takes beside that).

        Until then a need holds what was used for the first time too: code that was read, scratch that stays.
        """
        standing, level = self.tidy(), self._levels.get(kind)
        if level is not None and tokens <= level.tokens:
            need = min(need, max(0, level.peak - standing))
        return standing, need

    def half_way(self) -> None:
        """Call it where the most activations are held: after the forward pass."""
        self._half_way = self.memory()[0]

    def settle(self) -> None:
        """Learn what the work that was begun has taken; call it when that is done."""
        begun, self._begun = self._begun, None
        if begun is None:
            return
        now, peak = self.memory()
        # A peak that did not move says only that this one was not the largest.
        reached = peak if peak > begun.peak else max(self._half_way, now)
        self.reached, taken = reached, max(0, reached - self.standing)
        self.needs[begun.kind].learn(begun.tokens, taken)
        level = self._levels.get(begun.kind)
        if level is None or begun.tokens >= level.tokens:
            self._levels[begun.kind] = _Level(begun.tokens, now, self.standing + taken)

    def make_room(self) -> None:
        """Before an optimizer's step and a save, which must not fail half-way for want of some MB that lie idle."""
        self.settle()
        if self._lacks_room():
            release()
        if self._lacks_room():  # last, as collecting Python's garbage takes 0.1 s
            standing = self.standing
            self.tidy()
            self.standing = min(standing, self.standing)  # the gradients that stand here will not, afterwards

    def _lacks_room(self) -> bool:
        now, mappable = self.memory()[0], data_left()
        return now + STEP_ROOM > self.most(now) or (mappable is not None and mappable < STEP_ROOM)

    def forget(self) -> None:
        """The work that was begun came to nothing."""
        self._begun = None
        self._levels.clear()
        self.tidy()

    def relearn(self) -> None:
        """Activations are held in another way from here on: what training took says nothing of what it will."""
        self.needs["train"] = Needs()


class OutOfMemory(DoesNotFit):
    """Memory ran short and nothing is left to lower, or an update broke off half-way."""


class Watched:
    """The loop's model: `loss` asks the budget first."""

    def __init__(self, model: Model, budget: Budget) -> None:
        self.model, self.budget = model, budget

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """The model's own; Shortage, before anything is computed, where it would not fit."""
        self.budget.before("train", batch.tokens)
        result = self.model.loss(batch)
        self.budget.half_way()
        return result

    def train(self, mode: bool = True) -> object:
        return self.model.train(mode)


def in_chunks(work: Callable[[int], T], tokens: int, tell: Callable[[str], None]) -> T:
    """`work(tokens)`, an evaluation in chunks of so many tokens; in smaller ones where memory runs out.

    DoesNotFit where one row at a time is still too much.
    """
    while True:
        try:
            return work(tokens)
        except FAILURES as error:
            if not is_shortage(error):
                raise
            reason = reason_of(error)
        if tokens <= 1:
            raise DoesNotFit(f"evaluating does not fit, even row by row ({reason}): free some memory")
        tokens //= 2
        gc.collect()
        release()
        tell(f"memory ran short while evaluating ({reason}): it goes on in chunks of {tokens:,} tokens")


def reason_of(error: BaseException) -> str:
    """A failed allocation in a line; torch's own messages bring a trace of C++ calls."""
    first = next(iter(str(error).splitlines()), "").strip()
    return first.rpartition("DefaultCPUAllocator: ")[2] or "an allocation failed"
