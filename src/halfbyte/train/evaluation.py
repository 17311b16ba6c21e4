"""The loss on held-out rows, as the loop's `evaluate` wants it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from halfbyte.batch import Batch
from halfbyte.train.update import Model


@dataclass(frozen=True)
class InChunks:
    """An evaluation whose forward passes take so many tokens; `measure` is called with them and the loop's `stop`."""

    measure: Callable[[int, Callable[[], bool]], Mapping[str, float] | None]
    tokens: int

    def __call__(self, stop: Callable[[], bool]) -> Mapping[str, float] | None:
        return self.measure(self.tokens, stop)

    def halved(self, times: int) -> Self:
        """The same in chunks that are cut in half so many times."""
        return replace(self, tokens=max(1, self.tokens >> times))


@torch.no_grad()
def evaluation_loss(
    model: Model, batches: Sequence[Batch], device: torch.device, stop: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Mean negative log-likelihood over all supervised tokens of `batches`, without dropout.

    Returns {"loss", "supervised_tokens"}, or None if `stop()` became true on the way. The model is left in evaluation
    mode; the loop turns training mode on before each update.
    """
    model.train(False)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        if stop():
            return None
        nll, supervised = model.loss(batch.to(device))
        total += nll.double().cpu()
        tokens += supervised
    return {"loss": float(total) / tokens if tokens else float("nan"), "supervised_tokens": tokens}
