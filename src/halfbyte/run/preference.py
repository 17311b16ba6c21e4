"""A run with `task: dpo`: what it has besides any other run. The reference, the loss of pairs, the held-out pairs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.data import Prepared
from halfbyte.errors import UsageError
from halfbyte.evaluate.evaluate import BaseAndTuned
from halfbyte.evaluate.preference import DpoOptions, preference_results, score_pairs
from halfbyte.evaluate.session import inference
from halfbyte.models.load import LoadedModel
from halfbyte.run.config import RunConfig
from halfbyte.train.dpo import PairedModel, evaluate_pairs, references
from halfbyte.train.feed import Feed
from halfbyte.train.state import TrainPlan

EVALUATION_TOKENS = 4096
"""Of a forward pass, as `EvaluateOptions.eval_batch_tokens`."""


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
    known = references(
        path, model, prepared.train, prepared.eval, feed.rows_of(plan.total_steps), feed.max_tokens, plan.identity,
        device, on_event,
    )  # fmt: skip
    objective = PairedModel(model, known.train, options)
    evaluate = partial(evaluate_pairs, model, prepared.eval, known.eval, options, feed.max_tokens, device)
    changed = replace(plan, figures=objective.figures, evaluate=evaluate if prepared.eval else None)
    return objective, changed, known.eval if prepared.eval else None


def scores(config: RunConfig, loaded: LoadedModel, prepared: Prepared, reference: Tensor) -> BaseAndTuned:
    """The trained model on the held-out pairs, against what the reference said of them."""
    model: Any = loaded.model
    with inference(model):
        tuned = score_pairs(model, prepared.eval, EVALUATION_TOKENS, torch.device(config.device))
    return preference_results(prepared.eval, tuned, reference, config.pick(DpoOptions))
