"""How often is a classifier right, and what does it say of a text?

    loss        mean cross-entropy of a row, in nats
    accuracy    the share of rows whose likeliest class is their own
    macro_f1    F1 of each class that occurs among the rows or the answers, averaged with equal weight: a classifier
                that knows only the most frequent class cannot hide behind it

Its base is no model, for the head is new: it is the best that can be said without reading, the frequencies of the
classes among these very rows, which always answers the most frequent one.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from halfbyte.batch import IGNORE, Batch
from halfbyte.data import Encoder, Example, collate, plan_micro_batches
from halfbyte.data.examples import text_to_classify
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.evaluate import (
    BaseAndTuned,
    EvaluateOptions,
    EvaluateResult,
    Progress,
    RowResult,
    against,
    summarize,
)
from halfbyte.evaluate.intervals import corpus_interval
from halfbyte.evaluate.metrics import ACCURACY, MACRO_F1, macro_f1
from halfbyte.evaluate.session import inference
from halfbyte.models.classifier import Classifier

Texts = str | tuple[tuple[str, str], ...]
"""A text, or several with their names: (("premise", "It rains."), ("hypothesis", "It is dry."))."""
Logprobs = NDArray[np.float64]


@dataclass(frozen=True)
class Classified:
    """The likeliest class of a text, and every class's probability."""

    label: str
    probabilities: dict[str, float]


def evaluate_classifier(
    model: Classifier,
    examples: Sequence[Example],
    options: EvaluateOptions | None = None,
    on_progress: Progress | None = None,
) -> BaseAndTuned:
    """Loss, accuracy and macro-F1 of rows with classes, against always the same answer.

    UsageError for no rows and for metrics that compare texts; HalfbyteError for a loss that is not finite.
    """
    options = options or EvaluateOptions()
    other = [name for name in options.metrics if name not in (ACCURACY, MACRO_F1)]
    if other:
        raise UsageError(f"{other[0]} compares texts, and a classifier says none: it has {ACCURACY} and {MACRO_F1}")
    examples = list(examples)[: options.max_rows]
    if not examples:
        raise UsageError("there are no rows to evaluate on: give --eval-data, or set eval_split above 0")
    logprobs = _logprobs(model, examples, options.eval_batch_tokens, on_progress)
    return against(most_frequent(examples, model.labels), _result(examples, logprobs, model.labels))


def most_frequent(examples: Sequence[Example], labels: Sequence[str]) -> EvaluateResult:
    """The figures of the classes' own frequencies among these rows, as if they were a model's answer to each."""
    counts = Counter(example.target for example in examples)
    shares = np.array([counts[number] / len(examples) for number in range(len(labels))])
    with np.errstate(divide="ignore"):
        logprobs = np.tile(np.log(shares), (len(examples), 1))
    return _result(examples, logprobs, labels)


def classify(
    model: Classifier,
    encoder: Encoder,
    texts: Sequence[Texts],
    max_tokens: int,
    instruction: str | None = None,
    batch_tokens: int = 4096,
) -> list[Classified]:
    """The classes of texts, in their order. `max_tokens` and `instruction` as in training. UsageError for no text."""
    if isinstance(texts, str):
        raise UsageError("classify takes a list of texts, and this is one text: put it in a list")
    ids = []
    for number, text in enumerate(texts):
        parts = _parts(text, number)
        found = encoder.wrap(encoder.encode(text_to_classify(parts, instruction)), max_tokens)
        if not found or not all(isinstance(part, str) and part.strip() for _, part in parts):
            raise UsageError(f"text {number + 1} is empty: there is nothing to classify")
        ids.append(found)
    results: dict[int, Classified] = {}
    with inference(model):
        for members in plan_micro_batches([len(i) for i in ids], 1, True, batch_tokens):
            shares_BC = model.class_logits(_batch([ids[i] for i in members])).double().softmax(-1).cpu()
            for i, shares in zip(members, shares_BC.tolist(), strict=True):
                named = dict(zip(model.labels, shares, strict=True))
                results[i] = Classified(max(named, key=named.__getitem__), named)
    return [results[i] for i in range(len(ids))]


def _parts(text: Texts, number: int) -> tuple[tuple[str, str], ...]:
    """The named texts of a row; a text alone is the only one. UsageError for anything else."""
    if isinstance(text, str):
        return (("text", text),)
    if not isinstance(text, tuple | list) or not all(map(_is_named, text)):
        raise UsageError(
            f"text {number + 1} is {text!r:.60}: give a text, or for several in one row a (name, text) for each"
        )
    return tuple((name, part) for name, part in text)


def _is_named(part: object) -> bool:
    return isinstance(part, tuple | list) and len(part) == 2 and all(isinstance(value, str) for value in part)


def _batch(ids: Sequence[Sequence[int]]) -> Batch:
    """Texts without classes, end to end."""
    flat = torch.tensor([token for text in ids for token in text], dtype=torch.int64)
    positions = torch.cat([torch.arange(len(text)) for text in ids])
    return Batch(flat, positions, torch.full_like(flat, IGNORE), tuple(map(len, ids)))


def _logprobs(
    model: Classifier, examples: Sequence[Example], batch_tokens: int, on_progress: Progress | None
) -> Logprobs:
    """Log-probabilities float64 [rows, classes], in the rows' order."""
    found = np.zeros((len(examples), len(model.labels)))
    done = 0
    with inference(model):
        for members in plan_micro_batches([len(e) for e in examples], 1, True, batch_tokens):
            logits_BC = model.class_logits(collate([examples[i] for i in members]))
            found[members] = logits_BC.double().log_softmax(-1).cpu().numpy()
            done += len(members)
            if on_progress is not None:
                on_progress("classes", done, len(examples))
    return found


def _result(examples: Sequence[Example], logprobs: Logprobs, labels: Sequence[str]) -> EvaluateResult:
    rows, chosen = [], logprobs.argmax(1)
    for example, row, best in zip(examples, logprobs, chosen.tolist(), strict=True):
        assert example.target is not None
        nll = -float(row[example.target])
        if not math.isfinite(nll):
            raise HalfbyteError(
                f"{example.origin}: the loss of this row is {nll}: the model's weights or adapter are damaged"
            )
        right = {ACCURACY: float(best == example.target)}
        word, said = labels[example.target], labels[best]
        rows.append(RowResult(str(example.origin), example.prompt, word, nll, 1, said, right))
    references, predictions = [row.reference or "" for row in rows], [row.prediction or "" for row in rows]

    def on(indices: Sequence[int]) -> float:
        return macro_f1([predictions[i] for i in indices], [references[i] for i in indices])

    everything = list(range(len(rows)))
    intervals = {MACRO_F1: corpus_interval(on, len(rows))} if len(rows) > 1 else {}
    return summarize(rows, (ACCURACY, MACRO_F1), {MACRO_F1: on(everything)}, intervals)
