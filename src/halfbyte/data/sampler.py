"""The order of training rows: a function of (sizes, weights, seed, epoch) and of nothing else.

There is no state to save or to restore: a run that resumes at row 12,345 asks for the rows from 12,345 on. The order
comes from sorting raw 64-bit outputs of the Philox counter generator, which numpy promises never to change (it does
not promise that of `permutation`).
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def _permutation(n: int, *key: int) -> Indices:
    """A permutation of range(n) that depends on n and the key only."""
    digest = hashlib.sha256(repr((n, *key)).encode()).digest()
    words = np.frombuffer(digest[:16], dtype="<u8")
    noise = np.random.Philox(key=words).random_raw(n) if n else np.empty(0, dtype=np.uint64)
    return np.argsort(noise, kind="stable").astype(np.int64)


class Sampler:
    """Rows 0 … n-1, shuffled anew in every epoch.

    With several sources, rows are numbered source by source (`sizes`, which sum to n). Without `weights` an epoch is
    every row once. With them an epoch still has n rows, of which source s gives the share weights[s] / sum(weights);
    it goes through its rows in turn, so that none is seen a (k+1)-th time before all were seen k times.
    """

    def __init__(
        self, n: int, seed: int, sizes: Sequence[int] | None = None, weights: Sequence[float] | None = None
    ) -> None:
        if n < 1:
            raise ValueError("a sampler needs at least one row")
        self.n = n
        self.seed = seed
        self.sizes = tuple(sizes) if sizes is not None else (n,)
        if sum(self.sizes) != n:
            raise ValueError(f"sizes {self.sizes} do not sum to {n}")
        self.counts = self.sizes if weights is None else _shares(n, self.sizes, weights)
        self.weighted = weights is not None
        self._cached = lru_cache(maxsize=2)(self._order)

    def order(self, epoch: int) -> Indices:
        """The row numbers of an epoch (from 0 on), int64 [n]."""
        return self._cached(epoch).copy()

    def _order(self, epoch: int) -> Indices:
        if not self.weighted:
            return _permutation(self.n, self.seed, epoch)
        parts: list[Indices] = []
        first = 0
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            parts.append(first + self._stretch(source, size, epoch * count, count))
            first += size
        rows = np.concatenate(parts)
        return rows[_permutation(self.n, self.seed, epoch)]

    def _stretch(self, source: int, size: int, start: int, count: int) -> Indices:
        """Rows start … start+count of a source's endless stream: permutation after permutation of its rows."""
        if count == 0:
            return np.empty(0, dtype=np.int64)
        passes = range(start // size, (start + count - 1) // size + 1)
        stream = np.concatenate([_permutation(size, self.seed, source, number) for number in passes])
        offset = start - passes.start * size
        return stream[offset : offset + count]

    def rows_for(self, position: int, count: int) -> list[int]:
        """The `count` rows from `position` on, counted over all epochs from the start of the run."""
        rows: list[int] = []
        while len(rows) < count:
            epoch, offset = divmod(position + len(rows), self.n)
            rows += self._cached(epoch)[offset : offset + count - len(rows)].tolist()
        return rows


def _shares(n: int, sizes: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """How many of n rows each source gives: the exact shares, rounded by largest remainder."""
    if len(weights) != len(sizes) or not all(w > 0 and np.isfinite(w) for w in weights):
        raise ValueError("every source needs a weight above 0")
    if any(size == 0 for size in sizes):
        raise ValueError("a weighted source has no rows")
    exact = [n * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda s: (counts[s] - exact[s], s))
    for source in by_remainder[: n - sum(counts)]:
        counts[source] += 1
    return tuple(counts)
