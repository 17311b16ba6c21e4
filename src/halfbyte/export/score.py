"""How near is a merged model to the one that was trained? Measured on held-out rows, against the unmerged model.

    KL           mean over supervised positions of KL(unmerged || merged) of the next token's distribution, in nats
    same top     share of those positions with the same likeliest token
    perplexity   exp of the mean negative log-likelihood of the supervised tokens
    answers      greedy continuations of the rows' prompts: the share that is identical, and the share of tokens before
                 the first difference
    metrics      the task's: accuracy on classification rows, any of `evaluate` on request

One model is in memory at a time. What stays of the unmerged one are its hidden states at the supervised positions and
its output matrix, from which its logits are made again, a few rows at a time, beside the candidate's (of architectures
without a decoder of ours, the logits themselves: transformers' models do not part with their states). Logits are
computed in float32 from hidden states in the compute dtype: in bfloat16 their own rounding would be the largest part
of a small KL.

Shape letters: N supervised positions, D hidden size, V vocabulary, T tokens.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfbyte.batch import IGNORE
from halfbyte.data import Example, LabelChoice, collate
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.generate import Generation, Tokenizer, generate_batch
from halfbyte.evaluate.intervals import Interval, ratio_interval
from halfbyte.evaluate.labels import score_labels
from halfbyte.evaluate.metrics import ACCURACY, find_metrics
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.evaluate.session import Model, context_length, inference
from halfbyte.linear import linear_logits
from halfbyte.models.decoder import Decoder
from halfbyte.quant import Weight

MAX_TOKENS = 8192
"""Most tokens of all scored rows together, prompts included; one row is always scored."""
MAX_FALLBACK_TOKENS = 1024
"""The same for architectures without a decoder of ours, of which whole logits are kept: 0.6 GB for 150,000 words."""
_BATCH_TOKENS = 2048
_LOGITS = 1 << 24  # logits of one model in flight: 64 MB of float32
_OPENING = 32  # tokens of a plain text that are its prompt, where there is no prompt


@dataclass(frozen=True)
class HeldOut:
    """The rows that are scored.

    available   of how many they were chosen
    labels      classification: the choices, so that accuracy can be measured
    stop_ids    ids that end an answer
    """

    examples: tuple[Example, ...]
    available: int
    seed: int
    labels: tuple[LabelChoice, ...] = ()
    stop_ids: frozenset[int] = frozenset()

    @property
    def tokens(self) -> int:
        return sum(map(len, self.examples))

    @property
    def positions(self) -> int:
        return sum(example.supervised_tokens for example in self.examples)

    def __str__(self) -> str:
        chosen = "all" if len(self.examples) == self.available else f"{len(self.examples)} of"
        return (
            f"{chosen} {self.available:,} held-out rows (seed {self.seed}): {self.tokens:,} tokens, "
            f"{self.positions:,} supervised"
        )


def choose_rows(
    examples: Sequence[Example],
    rows: int,
    seed: int,
    labels: Sequence[LabelChoice] = (),
    stop_ids: frozenset[int] = frozenset(),
    max_tokens: int = MAX_TOKENS,
) -> HeldOut:
    """At most `rows` of the examples with something supervised, drawn by `seed`, in the data's order.

    Rows are taken as long as they fit `max_tokens` together; UsageError where none has a supervised token.
    """
    usable = [i for i, example in enumerate(examples) if example.supervised_tokens]
    if not usable:
        raise UsageError("no held-out row has a supervised token: there is nothing to score a merge on")
    drawn: list[int] = []
    tokens = 0
    for i in np.random.default_rng(seed).permutation(usable).tolist():
        if len(drawn) == rows:
            break
        if not drawn or tokens + len(examples[i]) <= max_tokens:
            drawn.append(i)
            tokens += len(examples[i])
    return HeldOut(tuple(examples[i] for i in sorted(drawn)), len(examples), seed, tuple(labels), stop_ids)


@dataclass(frozen=True)
class Said:
    """What one model says on the rows.

    states      its hidden states [N, D] before the output matrix `head`; without a head, the logits [N, V] themselves
    nll         negative log-likelihood of each supervised position, float64 [N]
    answers     greedy continuations, one a prompt
    """

    states: Tensor
    head: Weight | None
    softcap: float | None
    nll: Tensor
    answers: tuple[Generation, ...]
    metrics: Mapping[str, float]
    model_bytes: int
    seconds: float

    def logprobs(self, start: int, stop: int) -> Tensor:
        """Log-probabilities [n, V] of positions start to stop, float32."""
        return _logits(self.states[start:stop], self.head, self.softcap).log_softmax(-1)


@dataclass(frozen=True)
class Score:
    """One model against the unmerged one. Shares are None where the rows have no prompts to answer.

    kl_interval   95 %, over rows
    model_bytes   what its weights took in memory while it was measured
    seconds       making and measuring it
    """

    name: str
    kl: float
    kl_interval: Interval | None
    same_top: float
    perplexity: float
    same_answers: float | None
    same_tokens: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    model_bytes: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"metrics": dict(self.metrics)}


def listen(
    model: Model,
    tokenizer: Tokenizer,
    rows: HeldOut,
    answer_tokens: int = 32,
    metrics: Sequence[str] = (),
) -> Said:
    """Everything that is compared, from one model. `metrics` are names of `evaluate`; accuracy comes by itself.

    Raises HalfbyteError where the model's loss is not finite.
    """
    started = time.monotonic()
    scorers = find_metrics(metrics)
    with inference(model):
        states = torch.cat([_states(model, part) for part in _batches(rows.examples)])
    head, softcap = (model.head, model.spec.final_softcap) if isinstance(model, Decoder) else (None, None)
    nll = _nll(states, head, softcap, _targets(rows.examples).to(states.device))
    if not bool(torch.isfinite(nll).all()):
        raise HalfbyteError("the model's loss on the held-out rows is not finite: its weights or adapter are damaged")
    asked = _prompted(rows.examples, context_length(model))
    prompts = [_prompt(example) for example in asked]
    greedy = GenerateOptions(max_new_tokens=answer_tokens)
    answers = generate_batch(model, tokenizer, prompts, greedy, rows.stop_ids)
    found: dict[str, float] = {}
    if rows.labels:
        found[ACCURACY] = _accuracy(model, rows)
    if scorers:
        pairs = [(a.text.strip(), e) for a, e in zip(answers, asked, strict=True)]
        answered = [(text, e.completion, str(e.origin)) for text, e in pairs if e.completion is not None]
        if not answered:
            raise UsageError(f"{scorers[0].name} compares answers, and the held-out rows have none (plain text)")
        for metric in scorers:
            if metric.corpus:
                found[metric.name] = metric.score_all([t for t, _, _ in answered], [r for _, r, _ in answered])
            else:
                found[metric.name] = sum(metric.score(*one) for one in answered) / len(answered)
    return Said(states, head, softcap, nll, tuple(answers), found, _bytes_of(model), time.monotonic() - started)


def compare(name: str, said: Said, reference: Said, rows: HeldOut, seconds: float | None = None) -> Score:
    """`said` against the unmerged model's `reference`, on the same rows."""
    kl_N, same_N = _divergence(reference, said)
    counts = [example.supervised_tokens for example in rows.examples]
    by_row = [float(part.sum()) for part in kl_N.split(counts)]
    finite = bool(torch.isfinite(kl_N).all())
    pairs = list(zip(reference.answers, said.answers, strict=True))
    return Score(
        name=name,
        kl=float(kl_N.mean()) if finite else float("inf"),
        kl_interval=ratio_interval(by_row, [float(n) for n in counts]) if finite and len(counts) > 1 else None,
        same_top=float(same_N.float().mean()),
        perplexity=math.exp(min(float(said.nll.mean()), 700.0)),
        same_answers=sum(map(_identical, pairs)) / len(pairs) if pairs else None,
        same_tokens=_shared_tokens(pairs),
        metrics=dict(said.metrics),
        model_bytes=said.model_bytes,
        seconds=said.seconds if seconds is None else seconds,
    )


# -- distributions ----------------------------------------------------------------------------------------------------


def _states(model: Model, examples: Sequence[Example]) -> Tensor:
    """Hidden states [n, D] at the supervised positions of these examples; of the fallback the logits [n, V]."""
    batch = collate(examples)
    where = (batch.targets != IGNORE).nonzero()[:, 0].to(model.device)
    if isinstance(model, Decoder):
        return model.hidden(
            batch.input_ids.to(model.device), batch.position_ids.to(model.device), batch.lengths, rows=where
        )
    return model.logits(batch.input_ids, batch.lengths)[where]


def _logits(states: Tensor, head: Weight | None, softcap: float | None) -> Tensor:
    return states if head is None else linear_logits(states.float(), head, softcap)


def _nll(states: Tensor, head: Weight | None, softcap: float | None, targets_N: Tensor) -> Tensor:
    parts = []
    for start, stop in _chunks(states, head):
        logprobs = _logits(states[start:stop], head, softcap).log_softmax(-1)
        parts.append(-logprobs.gather(1, targets_N[start:stop, None])[:, 0].double())
    return torch.cat(parts).cpu()


def _divergence(p: Said, q: Said) -> tuple[Tensor, Tensor]:
    """(KL(p || q) [N] in nats, float64, and whether the likeliest tokens agree [N])."""
    kl, same = [], []
    for start, stop in _chunks(p.states, p.head):
        one, two = p.logprobs(start, stop), q.logprobs(start, stop)
        same.append(one.argmax(-1) == two.argmax(-1))
        # In float32 a position's KL is good to about 1e-6 nats; below zero it is that rounding.
        kl.append((one.exp() * (one - two)).sum(-1, dtype=torch.float64).clamp_min(0.0))
    return torch.cat(kl).cpu(), torch.cat(same).cpu()


def _chunks(states: Tensor, head: Weight | None) -> list[tuple[int, int]]:
    vocab = states.shape[1] if head is None else head.shape[0]
    step = max(1, _LOGITS // vocab)
    return [(start, min(start + step, len(states))) for start in range(0, len(states), step)]


def _targets(examples: Sequence[Example]) -> Tensor:
    targets = collate(examples).targets
    return targets[targets != IGNORE]


def _batches(examples: Sequence[Example]) -> list[list[Example]]:
    """Examples in their order, cut into forwards of about _BATCH_TOKENS tokens."""
    out: list[list[Example]] = [[]]
    for example in examples:
        if out[-1] and sum(map(len, out[-1])) + len(example) > _BATCH_TOKENS:
            out.append([])
        out[-1].append(example)
    return out


# -- answers ----------------------------------------------------------------------------------------------------------


def _prompted(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """The examples that have a prompt with room for an answer; of plain text, which has none, all."""
    asked = [e for e in examples if e.prompt_length and (limit is None or e.prompt_length < limit)]
    return asked or [e for e in examples if not e.prompt_length]


def _prompt(example: Example) -> list[int]:
    """What the model is given: the row's prompt, or the opening of a plain text."""
    length = example.prompt_length or min(_OPENING, len(example) - 1)
    return [int(i) for i in example.input_ids[:length]]


def _accuracy(model: Model, rows: HeldOut) -> float:
    labelled = [example for example in rows.examples if example.label is not None]
    if not labelled:
        raise UsageError("the held-out rows have no labels: accuracy cannot be measured on them")
    scores = score_labels(model, [e.prompt_ids.tolist() for e in labelled], [c.input_ids for c in rows.labels])
    return float(np.mean(scores.argmax(1) == np.asarray([e.label for e in labelled])))


def _identical(pair: tuple[Generation, Generation]) -> bool:
    one, two = pair
    return one.tokens == two.tokens and one.finish_reason == two.finish_reason


def _shared_tokens(pairs: Sequence[tuple[Generation, Generation]]) -> float | None:
    """Share of the answers' tokens before the first difference; the end of an answer counts as a token."""
    shared = total = 0
    for one, two in pairs:
        a, b = ((*g.tokens, -1) if g.finish_reason == "eos" else g.tokens for g in (one, two))
        total += max(len(a), len(b))
        shared += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return shared / total if total else None


def _bytes_of(model: Model) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
