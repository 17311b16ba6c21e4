"""From one position's logits to the next token: greedy, or drawn after temperature, top-k, top-p and min-p.

The filters mean what they mean in transformers' `generate` and are applied in its order: repetition penalty,
temperature, top-k, top-p, min-p. One uniform number is drawn a token from a generator of the sequence's own, so a
text depends on its prompt and seed and not on what else was in the batch.

Shape letters: V vocabulary.
"""

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.options import Options


class GenerateOptions(Options):
    """How a text is continued. The defaults are greedy, so that the same prompt gives the same text."""

    max_new_tokens: int = Field(default=256, ge=1, description="stop after this many tokens")
    temperature: float = Field(
        default=0.0, ge=0, description="0 takes the likeliest token; 1 samples as the model says"
    )
    top_k: int = Field(default=0, ge=0, description="sample only among the k likeliest tokens; 0 is off")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample only among the likeliest tokens that together reach p"
    )
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="drop tokens less likely than this share of the likeliest one"
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="above 1, tokens already in the text become less likely"
    )
    seed: int = Field(default=42, ge=0, description="seed of the sampling")
    stop: tuple[str, ...] = Field(default=(), description="end before the first of these texts appears")


def sequence_rng(seed: int, index: int = 0) -> np.random.Generator:
    """The random stream of the `index`-th sequence; numpy promises that PCG64's stream stays the same."""
    return np.random.Generator(np.random.PCG64((seed, index)))


def next_token(logits_V: Tensor, options: GenerateOptions, seen: Tensor | None, rng: np.random.Generator) -> int:
    """The next token's id. `seen` holds the ids so far (prompt and answer), needed only for a repetition penalty.

    Raises HalfbyteError where the logits hold NaN or +inf, which no choice can repair.
    """
    logits_V = logits_V.float()
    if options.repetition_penalty != 1.0 and seen is not None:
        logits_V = penalize(logits_V, seen, options.repetition_penalty)
    if options.temperature == 0:
        best = int(logits_V.argmax())
        _require_finite(float(logits_V[best]))
        return best
    ids, probabilities = candidates(logits_V, options)
    cumulative = probabilities.double().cumsum(0).cpu()
    _require_finite(float(cumulative[-1]))
    drawn = torch.searchsorted(cumulative, torch.tensor(rng.random() * float(cumulative[-1])).double(), right=True)
    return int(ids[min(int(drawn), ids.numel() - 1)])


def penalize(logits_V: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1).

    Ids already seen have a positive logit divided by the penalty and a negative one multiplied by it.
    """
    ids = torch.unique(seen.to(logits_V.device))
    score = logits_V[ids]
    return logits_V.index_put((ids,), torch.where(score < 0, score * penalty, score / penalty))


def candidates(logits_V: Tensor, options: GenerateOptions) -> tuple[Tensor, Tensor]:
    """The ids that may be drawn, likeliest first, and their probabilities (not summing to 1 after top-p and min-p).

    Unlike transformers, exactly k ids survive top-k when several are tied at the border.
    """
    scaled = logits_V / options.temperature
    k = min(options.top_k, scaled.numel()) if options.top_k else scaled.numel()
    values, ids = scaled.topk(k) if options.top_k else scaled.sort(descending=True)
    probabilities = values.softmax(0)
    before = probabilities.cumsum(0) - probabilities
    # The ratio to the likeliest token does not change when top-p renormalizes, so both filters are one mask.
    keep = (before < options.top_p) & (probabilities >= options.min_p * probabilities[0])
    keep[0] = True
    return ids[keep], probabilities[keep]


def _require_finite(value: float) -> None:
    if not np.isfinite(value):
        raise HalfbyteError(
            "the model's logits are not finite: its weights or adapter are damaged, or its dtype overflows"
        )
