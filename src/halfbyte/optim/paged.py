"""The optimizer's state, and the gradients, in the pages of a file: a full fine-tune holds its weights and little else.

AdamW needs every element's state once a step, in any order. So the state lies in a file in the order of the step, in
pages of some MB: while one page is computed, a thread writes the page before back and reads the next one. Two pages of
memory are all that this takes; `budget` bytes more hold the first pages for good, which saves their reading and writing
(the same ones always: in a cycle, whatever else is kept would be thrown out just before it is wanted).

Gradients go the same way. A hook takes each one as the backward pass finishes it, adds it to what its pages hold in the
gradient's own type, as autograd would, and notes its norm. So a step still has the norm of the whole gradient, and
several micro-batches, before a weight moves, and gives the bits that it gives in memory; gradients are a fifth of the
file's traffic.

Reads and writes are pread and pwrite, no mapping: the file's pages are the system's cache, not this process's memory.
The file has no name: it is unlinked as soon as it is open, so a process that is killed leaves nothing.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from halfbyte import rawfile
from halfbyte.files import one_line, require_free_space
from halfbyte.optim.held import Work
from halfbyte.optim.moments import State
from halfbyte.optim.norm import norms_of
from halfbyte.optim.slots import Chunk, Slot, Span
from halfbyte.tensorfile import Planned, part_of

PAGE_ELEMENTS = 1 << 20
"""Parameters of a page: 13 MB with float32 moments, low bits and a bfloat16 gradient."""
_ALIGNED, _FILE_ALIGNED = 64, 4096


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a page is, in bytes from the page's start."""

    at: int
    dtype: torch.dtype
    count: int

    @property
    def end(self) -> int:
        return self.at + self.count * self.dtype.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        return buffer[self.at : self.end].view(self.dtype)


@dataclass
class _Page:
    """Some chunks' state, then their gradients; `state_end` bytes are written back after a step, all are read.

    new     nothing was written yet: the state is the one before the first step
    held    the page's memory, where it stays in memory
    """

    chunks: list[Chunk]
    offset: int
    state: dict[Span, dict[str, _Place]] = field(default_factory=dict)
    gradient: dict[Span, _Place] = field(default_factory=dict)
    state_end: int = 0
    nbytes: int = 0
    new: bool = True
    held: Tensor | None = None

    def lay_out(self, gradients: bool) -> None:
        at = 0

        def place(dtype: torch.dtype, count: int) -> _Place:
            nonlocal at
            made = _Place(at, dtype, count)
            at = _round_up(made.end, _ALIGNED)
            return made

        spans = [span for chunk in self.chunks for span in chunk]
        for span in spans:
            layout = span.slot.layout(span.stop - span.start)
            self.state[span] = {end: place(dtype, count) for end, (dtype, count) in layout.items()}
        self.state_end = at
        for span in spans if gradients else ():
            self.gradient[span] = place(span.slot.parameter.dtype, span.stop - span.start)
        self.nbytes = at

    def state_of(self, span: Span, buffer: Tensor) -> State:
        return State.over({end: place.of(buffer) for end, place in self.state[span].items()})


class PagedStates:
    """State and gradients in pages; the interface is `held.HeldStates`'s, and `take_gradient` beside it.

    folder       where the file is; DoesNotFit if its disk has no room for it
    budget       bytes of pages that stay in memory
    gradients    whether gradients are taken too; else they are the parameters' own
    """

    def __init__(self, chunks: Sequence[Chunk], folder: Path, budget: int, gradients: bool) -> None:
        self.gradients = gradients
        self.pages = _pages(chunks, gradients)
        self.taken: set[str] = set()
        self._pages_of: dict[str, list[_Page]] = {}
        for page in self.pages:
            for name in dict.fromkeys(span.slot.name for chunk in page.chunks for span in chunk):
                self._pages_of.setdefault(name, []).append(page)
        in_file = 0
        for page in self.pages:
            if page.nbytes <= budget:
                budget -= page.nbytes
                page.held = _memory(page.nbytes)
            else:
                page.offset = in_file
                in_file += _round_up(page.nbytes, _FILE_ALIGNED)
        largest = max((page.nbytes for page in self.pages if page.held is None), default=0)
        self._buffers = [_memory(largest), _memory(largest)] if largest else []
        self.folder, self.file_bytes = folder, in_file
        self._fd = _nameless_file(folder, in_file) if in_file else -1
        self._thread = ThreadPoolExecutor(1, "optimizer-pages")

    @property
    def memory_nbytes(self) -> int:
        """Bytes of pages in memory, and of the two that are on their way."""
        return sum(page.nbytes for page in self.pages if page.held is not None) + sum(b.nbytes for b in self._buffers)

    # -- a step -----------------------------------------------------------------------------------------------------

    def walk(self, slot: Slot | None = None) -> Iterator[list[Work]]:
        """The work of a step, or of one slot of it; spans without a gradient are left out.

        A page is written back when the caller asks for the work after it.
        """
        pages = self.pages if slot is None else self._pages_of[slot.name]
        pages = [page for page in pages if self._has_work(page, slot)]
        coming: Future[None] | None = None
        written: Future[None] | None = None
        at = 0  # the buffer of the next page that is read
        with one_line(self.folder):
            try:
                for i, page in enumerate(pages):
                    buffer = page.held
                    if buffer is None:
                        if coming is None:
                            coming = self._thread.submit(self._read, page, self._buffers[at])
                        coming.result()
                        coming, buffer, at = None, self._buffers[at], 1 - at
                    elif page.new:
                        self._reset(page, buffer)
                    # Reading ahead waits in the thread's queue for the other buffer to be written back.
                    following = next((p for p in pages[i + 1 :] if p.held is None), None)
                    if following is not None and coming is None:
                        coming = self._thread.submit(self._read, following, self._buffers[at])
                    yield from self._work(page, buffer, slot)
                    page.new = False
                    if page.held is None:
                        if written is not None:
                            written.result()
                        written = self._thread.submit(self._write, page, buffer)
                if written is not None:
                    written.result()
            finally:
                for left in (coming, written):
                    if left is not None:
                        left.exception()  # nobody may be writing to a buffer when the next walk begins

    def _has_work(self, page: _Page, slot: Slot | None) -> bool:
        return any(self._is_due(span, slot) for chunk in page.chunks for span in chunk)

    def _is_due(self, span: Span, slot: Slot | None) -> bool:
        has_gradient = span.slot.name in self.taken if self.gradients else span.slot.parameter.grad is not None
        return has_gradient and slot in (None, span.slot)

    def _work(self, page: _Page, buffer: Tensor, slot: Slot | None) -> Iterator[list[Work]]:
        for chunk in page.chunks:
            work = []
            for span in chunk:
                if self._is_due(span, slot):
                    held = page.gradient[span].of(buffer) if self.gradients else None
                    gradient = span.slot.gradient(span.start, span.stop) if held is None else held
                    assert gradient is not None
                    work.append((span, page.state_of(span, buffer), gradient))
            if work:
                yield work

    def _reset(self, page: _Page, buffer: Tensor) -> None:
        for span in page.state:
            page.state_of(span, buffer).reset()

    def _read(self, page: _Page, buffer: Tensor) -> None:
        if page.new:
            self._reset(page, buffer)
            rawfile.read_into(self._fd, buffer[page.state_end : page.nbytes], page.offset + page.state_end)
        else:
            rawfile.read_into(self._fd, buffer[: page.nbytes], page.offset)

    def _write(self, page: _Page, buffer: Tensor) -> None:
        rawfile.write_from(self._fd, buffer[: page.state_end], page.offset)

    # -- gradients --------------------------------------------------------------------------------------------------

    def take_gradient(self, slot: Slot) -> list[float]:
        """Move a parameter's gradient into its pages, added to what was taken since `forget_gradients`.

        Returns the norms of the whole sum; see `norms_of`.
        """
        gradient = slot.parameter.grad
        assert gradient is not None
        flat = gradient.detach().reshape(-1)
        with one_line(self.folder):
            for page, span in self._spans(slot):
                part = flat[span.start : span.stop]
                if slot.name in self.taken:
                    part += self._get(page, page.gradient[span])
                self._put(page, page.gradient[span], part)
        self.taken.add(slot.name)
        slot.parameter.grad = None
        return norms_of([flat])

    def forget_gradients(self) -> None:
        self.taken.clear()

    def _spans(self, slot: Slot) -> Iterator[tuple[_Page, Span]]:
        for page in self._pages_of[slot.name]:
            for chunk in page.chunks:
                for span in chunk:
                    if span.slot is slot:
                        yield page, span

    def _get(self, page: _Page, place: _Place) -> Tensor:
        """One tensor of a page; of one that stays in memory the tensor itself."""
        if page.held is not None:
            return place.of(page.held)
        found = torch.empty(place.count, dtype=place.dtype)
        rawfile.read_into(self._fd, found, page.offset + place.at)
        return found

    def _put(self, page: _Page, place: _Place, values: Tensor) -> None:
        if page.held is not None:
            place.of(page.held).copy_(values)
        else:
            rawfile.write_from(self._fd, values.contiguous(), page.offset + place.at)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def planned(self) -> list[Planned]:
        """What a checkpoint writes: the same tensors that `HeldStates` has, read from the pages piece by piece."""
        found = []
        for slot in self._slots():
            for end, (dtype, count) in slot.layout().items():
                found.append(Planned(slot.name + end, (count,), dtype, partial(self._pieces, slot, end)))
        return found

    def _pieces(self, slot: Slot, end: str) -> Iterator[Tensor]:
        with one_line(self.folder):
            for page, span in self._spans(slot):
                if page.new:
                    tensors = {e: torch.empty(p.count, dtype=p.dtype) for e, p in page.state[span].items()}
                    State.over(tensors).reset()
                    yield tensors[end]
                else:
                    yield self._get(page, page.state[span][end])

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take the values of a checkpoint, whose layout has been compared."""
        with one_line(self.folder):
            for slot in self._slots():
                for end in slot.layout():
                    at = 0
                    for page, span in self._spans(slot):
                        place = page.state[span][end]
                        self._put(page, place, part_of(saved, slot.name + end, at, at + place.count))
                        at += place.count
        for page in self.pages:
            page.new = False

    def reset(self) -> None:
        """Every page as before the first step: its state is made anew when it is next wanted."""
        self.forget_gradients()
        for page in self.pages:
            page.new = True

    def _slots(self) -> list[Slot]:
        slots = {span.slot.name: span.slot for page in self.pages for chunk in page.chunks for span in chunk}
        return list(slots.values())

    def close(self) -> None:
        """Stop the thread and give the file's room back."""
        self._thread.shutdown()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _pages(chunks: Sequence[Chunk], gradients: bool) -> list[_Page]:
    pages: list[_Page] = []
    room = 0
    for chunk in chunks:
        size = sum(span.stop - span.start for span in chunk)
        if size > room:
            pages.append(_Page([], 0))
            room = PAGE_ELEMENTS
        pages[-1].chunks.append(chunk)
        room -= size
    for page in pages:
        page.lay_out(gradients)
    return pages


def _memory(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def _nameless_file(folder: Path, nbytes: int) -> int:
    """A file with room for `nbytes` that goes away with its descriptor. Killed before that, it is a `.partial`."""
    require_free_space(folder, nbytes, "the file of the optimizer's state (optim: paged_…)")
    with one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=folder, prefix=".optimizer-pages.", suffix=".partial")
        try:
            Path(name).unlink()
            rawfile.reserve(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
    return fd


def _round_up(count: int, to: int) -> int:
    return -(-count // to) * to
