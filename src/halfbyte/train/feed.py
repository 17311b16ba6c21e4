"""Which rows an update sees: a function of the step and nothing else.

An epoch is the sampler's order of that epoch, cut into updates of `rows_per_update` rows (the epoch's last one takes
what is left), each divided into micro-batches. There is no iterator and so no position to save: a resumed run asks for
the step it continues with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from halfbyte.batch import Batch
from halfbyte.data.examples import Example
from halfbyte.data.packing import collate, plan_micro_batches
from halfbyte.data.sampler import Sampler


@dataclass(frozen=True)
class Feed:
    """Examples in, micro-batches out.

    micro_batch        rows computed at once, without packing
    rows_per_update    the effective batch
    packing            micro-batches by tokens instead of by rows: as many rows as fit into `max_tokens`
    """

    examples: Sequence[Example]
    sampler: Sampler
    rows_per_update: int
    micro_batch: int
    packing: bool = False
    max_tokens: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.rows_per_update)

    def rows(self, step: int) -> list[int]:
        """Indices of the examples of update `step`, which counts from 1."""
        epoch, update = divmod(step - 1, self.steps_per_epoch)
        start, rows = update * self.rows_per_update, len(self.examples)
        return self.sampler.rows_for(epoch * rows + start, min(self.rows_per_update, rows - start))

    def rows_of(self, total_steps: int) -> list[int]:
        """Indices of the examples that the first `total_steps` updates see, sorted."""
        epochs, updates = divmod(total_steps, self.steps_per_epoch)
        orders = [self.sampler.order(epoch) for epoch in range(epochs)]
        orders.append(self.sampler.order(epochs)[: updates * self.rows_per_update])
        return [int(index) for index in np.unique(np.concatenate(orders))]

    def batches_for_update(self, step: int) -> list[Batch]:
        """The micro-batches of update `step`."""
        return [self.batch(members) for members in self.micro_batches(step)]

    def micro_batches(self, step: int) -> list[list[int]]:
        """The same as indices of examples."""
        rows = self.rows(step)
        lengths = [len(self.examples[index]) for index in rows]
        pieces = plan_micro_batches(lengths, self.micro_batch, self.packing, self.max_tokens)
        return [[rows[index] for index in piece] for piece in pieces]

    def all_micro_batches(self, total_steps: int) -> Iterator[list[int]]:
        """Those of a whole run, one after the other."""
        for step in range(1, total_steps + 1):
            yield from self.micro_batches(step)

    def batch(self, members: Sequence[int]) -> Batch:
        """Some examples as one micro-batch."""
        return collate([self.examples[index] for index in members])

    @property
    def halvings(self) -> int:
        """How often `halved` leaves smaller micro-batches, until a row is one."""
        return self.micro_batch.bit_length() - 1

    def halved(self, times: int) -> Self:
        """The same rows and updates in micro-batches that are cut in half so many times: at least a row each."""
        micro_batch = max(1, self.micro_batch >> times)
        longest = self.max_tokens // self.micro_batch
        return replace(self, micro_batch=micro_batch, max_tokens=max(1, longest * micro_batch))

    def tokens(self, total_steps: int) -> int:
        """Tokens of the first `total_steps` updates, exactly."""
        lengths = np.array([len(example) for example in self.examples], dtype=np.int64)
        epochs, updates = divmod(total_steps, self.steps_per_epoch)
        whole = sum(int(lengths[self.sampler.order(epoch)].sum()) for epoch in range(epochs))
        begun = self.sampler.order(epochs)[: updates * self.rows_per_update]
        return whole + int(lengths[begun].sum())

    def locate(self, row: int) -> str:
        """file:line of an example, by its index."""
        origin = self.examples[row].origin
        return f"{origin.file}:{origin.line}"
