"""Which rows an update sees: a function of the step and nothing else.

An epoch is the sampler's order of that epoch, cut into updates of `rows_per_update` rows (the epoch's last one takes
what is left), each divided into micro-batches. There is no iterator and so no position to save: a resumed run asks for
the step it continues with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
        start = update * self.rows_per_update
        return [int(index) for index in self.sampler.order(epoch)[start : start + self.rows_per_update]]

    def rows_of(self, total_steps: int) -> list[int]:
        """Indices of the examples that the first `total_steps` updates see, sorted."""
        epochs, updates = divmod(total_steps, self.steps_per_epoch)
        orders = [self.sampler.order(epoch) for epoch in range(epochs)]
        orders.append(self.sampler.order(epochs)[: updates * self.rows_per_update])
        return [int(index) for index in np.unique(np.concatenate(orders))]

    def batches_for_update(self, step: int) -> list[Batch]:
        """The micro-batches of update `step`."""
        chosen = [self.examples[index] for index in self.rows(step)]
        pieces = plan_micro_batches([len(e) for e in chosen], self.micro_batch, self.packing, self.max_tokens)
        return [collate([chosen[index] for index in piece]) for piece in pieces]

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
