"""The loss on held-out rows, as the loop's `evaluate` wants it."""

from collections.abc import Callable, Sequence

import torch

from halfbyte.batch import Batch
from halfbyte.train.update import Model


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
