"""Several texts in the making: a model, its key-value cache, and the few things that are done with them.

Both kinds of model have the same cache interface; what is added here is that long prompts are read in pieces, and
that a session can branch: score a continuation and be as before.

Shape letters: T new tokens of all sequences end to end, B sequences, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from halfbyte.models.decoder import Decoder
from halfbyte.models.fallback import Fallback
from halfbyte.models.seq2seq import Seq2Seq

Model = Decoder | Fallback | Seq2Seq

PREFILL_TOKENS = 2048
"""Tokens of prompts in one forward: it bounds the activations, and larger pieces are no faster."""


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Dropout off and no graph; afterwards the model is in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def context_length(model: Model) -> int | None:
    """How many positions prompt and answer share; None where the configuration does not say, or they share none."""
    if isinstance(model, Decoder):
        return model.spec.max_position
    if isinstance(model, Seq2Seq):
        return None
    length = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


class Session:
    """`batch` sequences that grow, each to at most `capacity` tokens.

    Of an encoder-decoder, what is fed first is the source; what is fed then continues the answer.
    """

    def __init__(self, model: Model, capacity: int, batch: int = 1) -> None:
        self.model = model
        self.capacity = capacity
        # The union's two caches have the same methods and are only ever given back to their own model.
        self._cache = model.new_cache(capacity, batch)

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each sequence."""
        return list(self._cache.lengths)

    def feed(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Append at least one token to every sequence; float32 logits [B, V] after the last of each."""
        if not all(new):
            raise ValueError("every sequence needs at least one new token")
        # In equal parts of each, so that every sequence has a token in every piece; an encoder reads a source at once.
        total, shortest = sum(map(len, new)), min(map(len, new))
        pieces = 1 if isinstance(self.model, Seq2Seq) else min(-(-total // PREFILL_TOKENS), shortest)
        for k in range(pieces):
            part = [ids[len(ids) * k // pieces : len(ids) * (k + 1) // pieces] for ids in new]
            logits_BV = self._forward(part, last_only=True)
        return logits_BV

    def feed_all(self, new: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to every sequence; float32 logits [T, V] after each of them."""
        return self._forward(new, last_only=False)

    def keep(self, sequences: list[int]) -> None:
        """Drop all sequences but these."""
        self._cache.keep(sequences)

    def rewind(self, lengths: list[int]) -> None:
        """Forget the tokens behind `lengths`."""
        self._cache.truncate(lengths)

    @contextmanager
    def branch(self) -> Iterator[None]:
        """Inside, the sequences may grow; afterwards they are as they were."""
        before = self.lengths
        try:
            yield
        finally:
            self.rewind(before)

    def _forward(self, new: Sequence[Sequence[int]], last_only: bool) -> Tensor:
        ids = torch.tensor([token for sequence in new for token in sequence], dtype=torch.int64)
        lengths = tuple(len(sequence) for sequence in new)
        return self.model.logits(ids, lengths, self._cache, last_only=last_only)  # type: ignore[arg-type]
