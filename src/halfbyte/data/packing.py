"""From examples to batches: rows laid end to end, never padded, and an update cut into micro-batches.

Packing changes the layout and never the update: the rows of an update are chosen by the sampler, and documents do not
see each other in a batch, so any division into micro-batches has the same gradient. A pair of answers is one row.
"""

from collections.abc import Sequence

import numpy as np
import torch

from halfbyte.batch import IGNORE, Batch
from halfbyte.data.examples import Example


def collate(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end. The target of a position is the next token of the same document, if it is supervised.

    A pair is two documents, side by side; pairs and other rows do not mix. Where a row has a class for a trained head,
    it is the target of the row's last position.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    documents = [document for example in examples for document in example.documents]
    if len(documents) not in (len(examples), 2 * len(examples)):
        raise ValueError("a batch holds pairs or other rows, not both")
    input_ids = np.concatenate([document.input_ids for document in documents]).astype(np.int64)
    positions = np.concatenate([np.arange(len(document.input_ids), dtype=np.int64) for document in documents])
    targets = np.full(len(input_ids), IGNORE, dtype=np.int64)
    start = 0
    for document in documents:
        end = start + len(document.input_ids)
        targets[start : end - 1] = np.where(document.supervised[1:], document.input_ids[1:], IGNORE)
        if document.target is not None:
            targets[end - 1] = document.target
        start = end
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        lengths=tuple(len(document.input_ids) for document in documents),
        rows=tuple(example.index for example in examples for _ in example.documents),
        paired=len(documents) > len(examples),
        sources=tuple(document.source_length for document in documents if document.source_length),
    )


def plan_micro_batches(
    lengths: Sequence[int], per_device_batch: int, packing: bool, max_tokens: int
) -> list[list[int]]:
    """Divide the rows of one update into micro-batches; returns lists of indices into `lengths`, each index once.

    Without packing: `per_device_batch` rows each, in order. With packing: as many rows as fit into `max_tokens`
    (first-fit by decreasing length), whatever their number; a row longer than that has a micro-batch of its own.
    """
    if per_device_batch < 1 or max_tokens < 1:
        raise ValueError("per_device_batch and max_tokens must be at least 1")
    if not packing:
        indices = list(range(len(lengths)))
        return [indices[start : start + per_device_batch] for start in range(0, len(indices), per_device_batch)]
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        chosen = next((b for b, free in enumerate(room) if lengths[index] <= free), None)
        if chosen is None:
            chosen = len(bins)
            bins.append([])
            room.append(max_tokens)
        bins[chosen].append(index)
        room[chosen] -= lengths[index]
    return sorted((sorted(members) for members in bins), key=lambda members: members[0])
