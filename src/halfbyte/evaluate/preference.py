"""What a model makes of pairs of answers: implicit rewards, the losses over them, and how often the better one wins.

Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290) reads a reward out of a policy and a reference:
beta times how much likelier the policy makes an answer than the reference does. Its loss is that of a logistic
regression on the difference of two such rewards, the margin.

An answer's log-probability is the sum over its supervised tokens: the answer's own, with the token that ends it.

    DpoOptions, pair_losses         the loss, which training minimizes too
    evaluate_preferences            base against tuned on held-out pairs: loss, margin, share of pairs that are won

Shape letters: P pairs, S supervised tokens of all documents. The last axis of [P, 2] is (chosen, rejected).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from halfbyte.adapters import disabled
from halfbyte.batch import IGNORE, Batch
from halfbyte.data import Example, collate, plan_micro_batches
from halfbyte.errors import HalfbyteError
from halfbyte.evaluate.evaluate import BaseAndTuned, EvaluateResult, RowResult, against
from halfbyte.evaluate.intervals import mean_interval, ratio_interval
from halfbyte.evaluate.session import Model, inference
from halfbyte.options import Options


class DpoOptions(Options):
    """The loss over pairs of answers, for `task: dpo`."""

    dpo_beta: float = Field(
        0.1,
        gt=0,
        allow_inf_nan=False,
        description="How close the model stays to where it began; larger is closer (task dpo)",
    )
    dpo_loss: Literal["sigmoid", "ipo", "hinge"] = Field(
        "sigmoid", description="Loss of a pair: sigmoid (DPO), ipo (squared error, log-ratios a token) or hinge (SLiC)"
    )
    dpo_label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of pairs that are taken to be the wrong way round (cDPO, with dpo_loss sigmoid)",
    )
    dpo_nll_weight: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the better answer's mean negative log-likelihood in its pair's loss (RPO; task dpo)",
    )

    @model_validator(mode="after")
    def _smoothing_has_an_effect(self) -> Self:
        if self.dpo_label_smoothing and self.dpo_loss != "sigmoid":
            raise ValueError(f"dpo_label_smoothing is for dpo_loss sigmoid, and {self.dpo_loss} has none: leave it out")
        return self


class LogprobModel(Protocol):
    """What scoring asks of a model: `Decoder` and `Fallback` have it."""

    def token_logprobs(self, batch: Batch) -> Tensor: ...


class Pairs:
    """The answers' log-probabilities of some pairs, float64.

    logprobs  [P, 2], with a graph where the model's had one
    tokens    [P, 2], how many each is a sum of
    """

    def __init__(self, logprobs: Tensor, tokens: Tensor) -> None:
        self.logprobs, self.tokens = logprobs, tokens

    @classmethod
    def of(cls, batch: Batch, token_logprobs: Tensor) -> "Pairs":
        """Sum what a model says of every supervised token, [S], over each document of a batch of pairs."""
        if not batch.paired:
            raise ValueError("a batch of pairs is needed")
        learned = (batch.targets != IGNORE).split(list(batch.lengths))
        counts = torch.stack([part.sum() for part in learned])
        # Piece by piece, not with index_add: on a GPU that adds in whatever order it comes.
        sums = [part.double().sum() for part in token_logprobs.split(counts.tolist())]
        return cls(torch.stack(sums).view(-1, 2), counts.view(-1, 2).double())


def rewards(logprobs: Tensor, reference: Tensor, options: DpoOptions) -> Tensor:
    """[P, 2]: beta (log pi(y | x) - log pi_ref(y | x))."""
    return options.dpo_beta * (logprobs - reference)


def pair_losses(pairs: Pairs, reference: Tensor, options: DpoOptions) -> Tensor:
    """The loss of each pair, float64 [P].

    With the margin m = beta h, h the difference of the two log-ratios against the reference, and smoothing e:
    sigmoid  -(1 - e) log sigmoid(m) - e log sigmoid(-m)      Rafailov et al. 2023, equation 7; e: cDPO
    hinge    max(0, 1 - m)                                    Zhao et al. 2023, arXiv 2305.10425
    ipo      (h' - 1 / (2 beta))^2                            Azar et al. 2023, arXiv 2310.12036, equation 17, of
             h', in which either log-ratio is divided by its answer's tokens, as the field's implementations do
    """
    ratios = pairs.logprobs - reference
    if options.dpo_loss == "ipo":
        ratios = ratios / pairs.tokens
    difference = ratios[:, 0] - ratios[:, 1]
    margin = options.dpo_beta * difference
    if options.dpo_loss == "ipo":
        losses = (difference - 1 / (2 * options.dpo_beta)) ** 2
    elif options.dpo_loss == "hinge":
        losses = torch.relu(1 - margin)
    else:
        smoothing = options.dpo_label_smoothing
        losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    if options.dpo_nll_weight:
        losses = losses - options.dpo_nll_weight * pairs.logprobs[:, 0] / pairs.tokens[:, 0]
    return losses


def wins(margins: Tensor) -> Tensor:
    """1 where the better answer has the larger reward, 0 where the worse one has, 0.5 where they are equal."""
    return (margins.sign() + 1) / 2


def figures(logprobs: Tensor, reference: Tensor, options: DpoOptions) -> dict[str, float]:
    """Means over pairs, under TRL's names, which dashboards know."""
    found = rewards(logprobs.detach(), reference, options)
    margins = found[:, 0] - found[:, 1]
    return {
        "rewards/chosen": float(found[:, 0].mean()),
        "rewards/rejected": float(found[:, 1].mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": float(wins(margins).mean()),
        "logps/chosen": float(logprobs.detach()[:, 0].mean()),
        "logps/rejected": float(logprobs.detach()[:, 1].mean()),
    }


@torch.no_grad()
def score_pairs(
    model: LogprobModel,
    examples: Sequence[Example],
    batch_tokens: int,
    device: torch.device,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Pairs:
    """What the model says of the examples' answers, in their order, without a graph; the model's mode is the caller's.

    Pairs share forward passes of about `batch_tokens` tokens; `on_batch` hears how many pairs each had, and may raise.
    """
    logprobs = torch.empty(len(examples), 2, dtype=torch.float64)
    tokens = torch.empty(len(examples), 2, dtype=torch.float64)
    for members in plan_micro_batches([len(example) for example in examples], 1, True, batch_tokens):
        batch = collate([examples[i] for i in members]).to(device)
        found = Pairs.of(batch, model.token_logprobs(batch))
        logprobs[members], tokens[members] = found.logprobs.cpu(), found.tokens.cpu()
        on_batch(len(members))
    return Pairs(logprobs, tokens)


# ---------------------------------------------------------------- held-out pairs

MARGINS, ACCURACIES = "rewards/margins", "rewards/accuracies"


def evaluate_preferences(
    model: Model,
    examples: Sequence[Example],
    options: DpoOptions,
    batch_tokens: int = 4096,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    reference: Tensor | None = None,
) -> BaseAndTuned:
    """Base against tuned on pairs; the base is the reference.

    reference  what it says, float64 [pairs, 2]; None: the model with its adapters switched off

    HalfbyteError for a log-probability that is not finite.
    """

    def score(name: str) -> Pairs:
        done = 0

        def count(rows: int) -> None:
            nonlocal done
            done += rows
            on_progress(f"{name}: pairs", done, len(examples))

        with inference(model):
            return score_pairs(model, examples, batch_tokens, model.device, count)

    if reference is None:
        with disabled(model):
            reference = score("base").logprobs
    return preference_results(examples, score("tuned"), reference, options)


def preference_results(
    examples: Sequence[Example], tuned: Pairs, reference: Tensor, options: DpoOptions
) -> BaseAndTuned:
    """The tuned model's figures beside those of the reference itself, whose every margin is 0: a draw each."""
    base = _result(examples, Pairs(reference, tuned.tokens), reference, options)
    return against(base, _result(examples, tuned, reference, options))


def _result(examples: Sequence[Example], pairs: Pairs, reference: Tensor, options: DpoOptions) -> EvaluateResult:
    losses = pair_losses(pairs, reference, options)
    found = rewards(pairs.logprobs, reference, options)
    margins = found[:, 0] - found[:, 1]
    rows = []
    for example, loss, margin, win in zip(examples, losses.tolist(), margins.tolist(), wins(margins), strict=True):
        if not math.isfinite(loss):
            raise HalfbyteError(
                f"{example.origin}: the loss of this pair is {loss}: the model or its adapter is damaged"
            )
        scores = {ACCURACIES: float(win), MARGINS: margin}
        rows.append(RowResult(str(example.origin), example.prompt, example.completion, loss, 1, scores=scores))
    columns = {"loss": losses.tolist()} | {name: [row.scores[name] for row in rows] for name in (ACCURACIES, MARGINS)}
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    intervals = {}
    if len(rows) > 1:  # a margin or a loss may happen to be 0 or 1 everywhere, and is no count of successes
        intervals = {name: ratio_interval(columns[name], [1.0] * len(rows)) for name in ("loss", MARGINS)}
        intervals[ACCURACIES] = mean_interval(columns[ACCURACIES])
    tokens = int(pairs.tokens.sum())
    return EvaluateResult(means.pop("loss"), tokens, means, intervals, rows, of_tokens=False)
