"""The held-out rows as the loop evaluates them, and what its last evaluation found of each.

A run's last evaluation and the figures that it ends with are of the same rows and the same weights: what the loop found
is kept, and not computed once more.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from halfbyte.data import Example, collate
from halfbyte.evaluate.evaluate import RowResult, row_losses
from halfbyte.models.classifier import Classifier
from halfbyte.run import rehearsal
from halfbyte.train.evaluation import evaluation_loss
from halfbyte.train.state import TrainResult


class _Stop(Exception):
    pass


class HeldOut:
    """`measure` is the loop's evaluation (`train.evaluation.InChunks`); `of_the_end` what it found of each row."""

    def __init__(self, model: nn.Module, rows: Sequence[Example], device: torch.device) -> None:
        self.model: Any = model
        self.rows, self.device = rows, device
        self._found: list[RowResult] | None = None

    def measure(self, tokens: int, stop: Callable[[], bool]) -> Mapping[str, float] | None:
        """{"loss", "supervised_tokens"} of all rows in chunks of so many tokens; None if `stop()` became true."""
        self._found = None
        if isinstance(self.model, Classifier):  # its figures are of labels, which are not asked for here
            batches = [collate(chunk) for chunk in rehearsal.chunks(self.rows, tokens)]
            return evaluation_loss(self.model, batches, self.device, stop)

        def go_on(*_: object) -> None:
            if stop():
                raise _Stop

        try:
            rows = row_losses(self.model, self.rows, tokens, go_on, self.device, finite=False)
        except _Stop:
            return None
        supervised = sum(row.tokens for row in rows)
        loss = sum(row.nll for row in rows) / supervised if supervised else math.nan
        if math.isfinite(loss):
            self._found = rows
        return {"loss": loss, "supervised_tokens": supervised}

    def of_some(self, rows: Sequence[Example], tokens: int) -> Mapping[str, float] | None:
        """The same of some rows, for a rehearsal; nothing is kept."""
        return HeldOut(self.model, rows, self.device).measure(tokens, lambda: False)

    def of_the_end(self, trained: TrainResult) -> list[RowResult] | None:
        """The rows with the weights that the run ended with; None where its last evaluation was not of these."""
        return self._found if trained.evaluated else None
