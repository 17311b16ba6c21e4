"""A run with `task: dpo`: what it has besides any other run. The reference, the loss of pairs, the held-out pairs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.data import Example, Prepared
from halfbyte.errors import UsageError
from halfbyte.evaluate.evaluate import BaseAndTuned
from halfbyte.evaluate.preference import DpoOptions, preference_results, score_pairs
from halfbyte.evaluate.session import inference
from halfbyte.models.load import LoadedModel
from halfbyte.run.config import RunConfig
from halfbyte.train.budget import in_chunks
from halfbyte.train.dpo import PairedModel, Reference, evaluate_pairs, references
from halfbyte.train.evaluation import InChunks
from halfbyte.train.feed import Feed
from halfbyte.train.state import TrainPlan


def paired(
    path: Path,
    config: RunConfig,
    loaded: LoadedModel,
    prepared: Prepared,
    plan: TrainPlan,
    feed: Feed,
    on_event: Callable[[dict[str, Any]], None],
) -> tuple[PairedModel, TrainPlan, Tensor | None]:
    """(the loop's model, its plan, what the reference says of the held-out pairs) from those of any other task.

    The reference is asked here, so the model must be as the run starts it; None without held-out pairs.
    """
    model: Any = loaded.model
    head = getattr(model, "head", None)
    if head is not None and head.trainable_tensor() is not None:
        raise UsageError(
            "task dpo weights every pair's tokens by themselves, which the trained output head's gradient cannot: do "
            "not train lm_head (or embeddings that are tied to it)"
        )
    options, device = config.pick(DpoOptions), torch.device(config.device)
    rows = feed.rows_of(plan.total_steps)

    def ask(tokens: int) -> Reference:
        return references(path, model, prepared.train, prepared.eval, rows, tokens, plan.identity, device, on_event)

    known = in_chunks(ask, feed.max_tokens, lambda message: on_event({"event": "warning", "message": message}))
    objective = PairedModel(model, known.train, options)
    measure = partial(_measure, model, prepared.eval, known.eval, options, device)
    evaluate = InChunks(measure, feed.max_tokens)
    changed = replace(plan, figures=objective.figures, evaluate=evaluate if prepared.eval else None)
    return objective, changed, known.eval if prepared.eval else None


def _measure(
    model: Any,
    rows: Sequence[Example],
    reference: Tensor,
    options: DpoOptions,
    device: torch.device,
    tokens: int,
    stop: Callable[[], bool],
) -> Mapping[str, float] | None:
    """`evaluate_pairs` in chunks of so many tokens."""
    return evaluate_pairs(model, rows, reference, options, tokens, device, stop)


def scores(config: RunConfig, loaded: LoadedModel, prepared: Prepared, reference: Tensor, tokens: int) -> BaseAndTuned:
    """The trained model on the held-out pairs, `tokens` of them at once, against what the reference said of them."""
    model: Any = loaded.model
    with inference(model):
        tuned = score_pairs(model, prepared.eval, tokens, torch.device(config.device))
    return preference_results(prepared.eval, tuned, reference, config.pick(DpoOptions))
