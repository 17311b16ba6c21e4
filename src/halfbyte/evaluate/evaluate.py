"""How good is the model on these rows: loss and perplexity, and by request what it says, base against tuned.

    loss           mean negative log-likelihood of a supervised token, in nats: what training minimizes
    perplexity     exp(loss)
    exact_match, token_f1, rouge_l, file.py:function      of the generated answer against the row's own
    accuracy       of the label that the model finds likeliest (`halfbyte.evaluate.labels`)
    pass@1         of generated programs, by their rows' tests (`halfbyte.evaluate.pass_at_1`)

Every figure comes with a 95 % interval over rows, and every row's answer is kept for reports.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from halfbyte.adapters import disabled
from halfbyte.data import Encoder, Example, LabelChoice, collate, plan_micro_batches
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluate.code_execution import PASSED
from halfbyte.evaluate.generate import Generation, Tokenizer, generate_batch
from halfbyte.evaluate.intervals import Interval, corpus_interval, mean_interval, ratio_interval
from halfbyte.evaluate.labels import score_labels
from halfbyte.evaluate.metrics import ACCURACY, BUILT_IN, PASS_AT_1, Metric, find_metrics
from halfbyte.evaluate.pass_at_1 import require_permission, require_real_tests, run_tests
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.evaluate.session import Model, inference
from halfbyte.ops.pool import release

SCHEMA_VERSION = 1
Progress = Callable[[str, int, int], None]
"""Hears (what is being done, rows done, rows in all)."""


class EvaluateOptions(GenerateOptions):
    """What is measured; answers are generated greedily by default."""

    metrics: tuple[str, ...] = Field(
        default=(),
        description=f"beside the loss: {', '.join(BUILT_IN)}, {ACCURACY} (the default for classification), "
        f"{PASS_AT_1} (code, with its rows' tests), or file.py:function",
    )
    allow_code_execution: bool = Field(
        default=False, description="let pass@1 run the programs that the model writes, on this machine and as you"
    )
    code_timeout: float = Field(
        default=10.0, gt=0, le=3600, description="seconds that a program of pass@1 may take, its tests included"
    )
    max_rows: int | None = Field(default=None, ge=1, description="use only the first rows")
    eval_batch_size: int = Field(default=32, ge=1, description="answers generated at once")
    eval_batch_tokens: int = Field(default=4096, ge=1, description="tokens of rows in one forward pass for the loss")


@dataclass(frozen=True)
class RowResult:
    """One row: where it came from, what was asked, what was expected, what came, and how it scored.

    prediction  the generated answer, or the chosen label; None where neither was asked for
    outcome     of pass@1: passed, or why not
    nll         summed negative log-likelihood of the row's supervised tokens; `tokens` is how many. Of a pair of
                answers its loss, and 1
    """

    row: str
    prompt: str | None
    reference: str | None
    nll: float
    tokens: int
    prediction: str | None = None
    scores: dict[str, float] = field(default_factory=dict)
    outcome: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields; `outcome` only where a program was run."""
        fields = asdict(self)
        return fields if self.outcome is not None else {k: v for k, v in fields.items() if k != "outcome"}


@dataclass(frozen=True)
class EvaluateResult:
    """The figures of one model on one set of rows. `metrics` and `intervals` are by name; rows in the data's order.

    of_tokens   whether the loss is one of tokens, and so has a perplexity; a preference loss is one of pairs
    """

    loss: float
    supervised_tokens: int
    metrics: dict[str, float]
    intervals: dict[str, Interval]
    rows: list[RowResult]
    of_tokens: bool = True

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # beyond, a float has no room, and the model no meaning

    def to_json(self, rows: bool = False) -> dict[str, Any]:
        """Loss, tokens and metrics at the top level; with `rows` every row too."""
        out: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "loss": self.loss,
            **({"perplexity": self.perplexity} if self.of_tokens else {}),
            "supervised_tokens": self.supervised_tokens,
            "evaluated_rows": len(self.rows),
            **self.metrics,
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
        }
        return out | ({"rows": [row.to_json() for row in self.rows]} if rows else {})


@dataclass(frozen=True)
class BaseAndTuned:
    """Both on the same rows. `gains` are tuned minus base (a loss should fall, a score rise), paired by row."""

    base: EvaluateResult
    tuned: EvaluateResult
    gains: dict[str, float]
    gain_intervals: dict[str, Interval]

    def to_json(self, rows: bool = False) -> dict[str, Any]:
        """The tuned model's figures at the top level, the base's under `base`."""
        return self.tuned.to_json(rows) | {
            "base": self.base.to_json(rows),
            "gains": self.gains,
            "gain_intervals": {name: list(interval) for name, interval in self.gain_intervals.items()},
        }


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    options: EvaluateOptions | None = None,
    *,
    labels: Sequence[LabelChoice] = (),
    stop_ids: Collection[int] = (),
    on_progress: Progress | None = None,
    losses: Sequence[RowResult] | None = None,
) -> EvaluateResult:
    """Measure `model`, with whatever adapters are switched on, on `examples`.

    labels, stop_ids   of the `data.Prepared` that the examples come from; with labels and no metric asked for, the
                       metric is accuracy
    losses             `row_losses` of these examples where they are known already

    Of pairs of answers the better one is measured alone; `halfbyte.evaluate.preference` compares them.

    Raises UsageError where there are no rows or a metric cannot be computed on them, HalfbyteError for a loss that
    is not finite.
    """
    options = options or EvaluateOptions()
    if labels and not options.metrics:
        options = options.model_copy(update={"metrics": (ACCURACY,)})
    examples = [replace(e, rejected=None) for e in examples[: options.max_rows]]
    if not examples:
        raise UsageError("there are no rows to evaluate on: give --eval-data, or set eval_split above 0")
    metrics = find_metrics(options.metrics)
    answered = [i for i, example in enumerate(examples) if example.completion is not None and example.prompt_length]
    if metrics and not answered:
        raise UsageError(
            f"{metrics[0].name} compares answers, and these rows have none (plain text, {examples[0].origin}): "
            "only the loss can be measured on them"
        )
    progress = on_progress or (lambda what, done, total: None)
    programs = _programs(examples, options, progress)
    rows = list(losses or row_losses(model, examples, options.eval_batch_tokens, progress))
    scores: dict[str, float] = {}
    intervals: dict[str, Interval] = {}
    if ACCURACY in options.metrics or metrics or programs:
        release()  # what the loss needed is of other sizes than what is needed from here on
    if ACCURACY in options.metrics:
        rows = _choose_labels(model, examples, rows, labels, options, progress)
    if metrics or programs:
        needed = answered if metrics else programs
        rows = _generate_answers(model, tokenizer, examples, rows, needed, options, stop_ids, progress)
        rows = _run_programs(examples, rows, programs, options, progress)
        rows = _score(rows, answered, [metric for metric in metrics if not metric.corpus])
        for metric in (m for m in metrics if m.corpus):
            scores[metric.name], intervals[metric.name] = _score_corpus(metric, [rows[i] for i in answered])
    return summarize(rows, options.metrics, scores, intervals)


def evaluate_base_and_tuned(
    model: Model,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    options: EvaluateOptions | None = None,
    *,
    labels: Sequence[LabelChoice] = (),
    stop_ids: Collection[int] = (),
    on_progress: Progress | None = None,
    tuned_losses: Sequence[RowResult] | None = None,
) -> BaseAndTuned:
    """`evaluate` with the adapters switched off and on: the same weights in memory, the same rows, the same prompts.

    tuned_losses   `row_losses` of the tuned model where they are known already
    """

    def measure(name: str, losses: Sequence[RowResult] | None = None) -> EvaluateResult:
        def progress(what: str, done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(f"{name}: {what}", done, total)

        return evaluate(
            model, tokenizer, examples, options, labels=labels, stop_ids=stop_ids, on_progress=progress, losses=losses
        )

    with disabled(model):
        base = measure("base")
    return against(base, measure("tuned", tuned_losses))


def against(base: EvaluateResult, tuned: EvaluateResult) -> BaseAndTuned:
    """Pair two results on the same rows."""
    if [row.row for row in base.rows] != [row.row for row in tuned.rows]:
        raise ValueError("base and tuned were measured on different rows")
    gains = {"loss": tuned.loss - base.loss}
    gains |= {name: tuned.metrics[name] - base.metrics[name] for name in tuned.metrics}
    intervals: dict[str, Interval] = {}
    pairs = list(zip(base.rows, tuned.rows, strict=True))
    if len(pairs) > 1:
        intervals["loss"] = ratio_interval([t.nll - b.nll for b, t in pairs], [float(t.tokens) for _, t in pairs])
        for name in tuned.metrics:
            differences = [t.scores[name] - b.scores[name] for b, t in pairs if name in t.scores]
            if len(differences) > 1:
                intervals[name] = ratio_interval(differences, [1.0] * len(differences))
    return BaseAndTuned(base, tuned, gains, intervals)


def row_losses(
    model: Model,
    examples: Sequence[Example],
    batch_tokens: int = 4096,
    on_progress: Progress | None = None,
    device: torch.device | None = None,
    *,
    finite: bool = True,
) -> list[RowResult]:
    """Each row's summed negative log-likelihood. Rows share forward passes of about `batch_tokens` tokens.

    device   where batches are put first; None: as they are, the model does it
    finite   HalfbyteError for a row whose loss is not finite
    """
    results: list[RowResult | None] = [None] * len(examples)
    done = 0
    with inference(model):
        for members in plan_micro_batches([len(e) for e in examples], 1, True, batch_tokens):
            batch = [examples[i] for i in members]
            counts = [example.supervised_tokens for example in batch]
            collated = collate(batch) if device is None else collate(batch).to(device)
            logprobs: Tensor = model.token_logprobs(collated).double().cpu()
            for i, part in zip(members, logprobs.split(counts), strict=True):
                results[i] = _row(examples[i], -float(part.sum()), part.numel(), finite)
            done += len(members)
            if on_progress is not None:
                on_progress("loss", done, len(examples))
    return [row for row in results if row is not None]


def _row(example: Example, nll: float, tokens: int, finite: bool) -> RowResult:
    if finite and not math.isfinite(nll):
        raise HalfbyteError(
            f"{example.origin}: the loss of this row is {nll}: the model's weights or adapter are damaged"
        )
    return RowResult(str(example.origin), example.prompt, example.completion, nll, tokens)


def _choose_labels(
    model: Model,
    examples: Sequence[Example],
    rows: list[RowResult],
    labels: Sequence[LabelChoice],
    options: EvaluateOptions,
    progress: Progress,
) -> list[RowResult]:
    classified = [i for i, example in enumerate(examples) if example.label is not None]
    if not labels or not classified:
        raise UsageError(
            f"accuracy is for classification rows (text or sentence, and label), and {examples[0].origin} is not one: "
            "use exact_match"
        )
    scores = score_labels(
        model,
        [examples[i].prompt_ids.tolist() for i in classified],
        [label.input_ids for label in labels],
        options.eval_batch_size,
        lambda done: progress("labels", done, len(classified)),
    )
    out = list(rows)
    for i, chosen in zip(classified, scores.argmax(1).tolist(), strict=True):
        right = float(chosen == examples[i].label)
        out[i] = replace(rows[i], prediction=labels[chosen].word, scores=rows[i].scores | {ACCURACY: right})
    return out


def _generate_answers(
    model: Model,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    rows: list[RowResult],
    answered: Sequence[int],
    options: EvaluateOptions,
    stop_ids: Collection[int],
    progress: Progress,
) -> list[RowResult]:
    done = 0

    def count(_: int, __: Generation) -> None:
        nonlocal done
        done += 1
        progress("answers", done, len(answered))

    prompts = [examples[i].prompt_ids.tolist() for i in answered]
    if any(examples[i].tests is not None and not examples[i].source_length for i in answered):
        # No special token is part of a program; a base model ends a document with one that is not always its EOS. An
        # encoder-decoder has no other end, and may begin with a special token.
        stop_ids = {*stop_ids, *Encoder(tokenizer).special_ids}
    answers = generate_batch(model, tokenizer, prompts, options, stop_ids, options.eval_batch_size, count)
    out = list(rows)
    for i, answer in zip(answered, answers, strict=True):
        # The indentation of the first line belongs to a program.
        text = answer.text.strip() if examples[i].tests is None else answer.text.rstrip()
        out[i] = replace(rows[i], prediction=text)
    return out


def _programs(examples: Sequence[Example], options: EvaluateOptions, progress: Progress) -> list[int]:
    """The rows whose answers pass@1 runs; UsageError where there are none, it is not allowed, or tests test nothing."""
    if PASS_AT_1 not in options.metrics:
        return []
    tested = [i for i, example in enumerate(examples) if example.tests is not None]
    if not tested:
        raise UsageError(
            f"pass@1 needs rows with tests, and {examples[0].origin} has none: a prompt with test and entry_point "
            "(HumanEval), test_list (MBPP) or tests"
        )
    require_permission(options.allow_code_execution, len(tested), str(examples[tested[0]].origin))
    for done, i in enumerate(tested, 1):
        tests = examples[i].tests
        assert tests is not None
        require_real_tests(tests, str(examples[i].origin), options.code_timeout)
        progress("tests", done, len(tested))
    return tested


def _run_programs(
    examples: Sequence[Example],
    rows: list[RowResult],
    programs: Sequence[int],
    options: EvaluateOptions,
    progress: Progress,
) -> list[RowResult]:
    out = list(rows)
    for done, i in enumerate(programs, 1):
        tests = examples[i].tests
        assert tests is not None
        outcome = run_tests(rows[i].prediction or "", tests, options.code_timeout)
        passed = float(outcome.status == PASSED)
        out[i] = replace(rows[i], scores=rows[i].scores | {PASS_AT_1: passed}, outcome=str(outcome))
        progress("programs", done, len(programs))
    return out


def _score(rows: list[RowResult], answered: Sequence[int], metrics: Sequence[Metric]) -> list[RowResult]:
    out = list(rows)
    for i in answered:
        row = rows[i]
        scores = {metric.name: metric.score(row.prediction or "", row.reference or "", row.row) for metric in metrics}
        out[i] = replace(row, scores=row.scores | scores)
    return out


def _score_corpus(metric: Metric, rows: Sequence[RowResult]) -> tuple[float, Interval]:
    predictions, references = [row.prediction or "" for row in rows], [row.reference or "" for row in rows]

    def on(indices: Sequence[int]) -> float:
        return metric.score_all([predictions[i] for i in indices], [references[i] for i in indices])

    return on(range(len(rows))), corpus_interval(on, len(rows))


def summarize(
    rows: list[RowResult], names: Sequence[str], metrics: dict[str, float], intervals: dict[str, Interval]
) -> EvaluateResult:
    """The result of rows that are scored; `names` are the metrics in order, `metrics` those of the whole set."""
    tokens = sum(row.tokens for row in rows)
    loss = sum(row.nll for row in rows) / tokens
    if len(rows) > 1:
        low, high = ratio_interval([row.nll for row in rows], [float(row.tokens) for row in rows])
        intervals = {"loss": (low, high), "perplexity": (math.exp(min(low, 700)), math.exp(min(high, 700)))} | intervals
    for name in dict.fromkeys(key for row in rows for key in row.scores):
        scores = [row.scores[name] for row in rows if name in row.scores]
        metrics = metrics | {name: sum(scores) / len(scores)}
        if len(scores) > 1:
            intervals = intervals | {name: mean_interval(scores)}
    order = dict.fromkeys(name.rpartition(":")[2] for name in names)  # a user's own goes by its function
    return EvaluateResult(loss, tokens, {name: metrics[name] for name in order}, intervals, rows)
