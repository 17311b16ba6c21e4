"""Does the exported model behave as trained, in the program that will serve it? The gate behind every export.

The same held-out rows go through the trained, unmerged model and through the served one:

    token ids      of the rendered prompts: identical, or the first difference (a second BOS, another template, …)
    divergence     KL(trained || served) and the drift of log-probabilities on the supervised tokens, perplexities
    adapter        how strong the adapter acts in the served model (1 is as trained), and whether it acts at all
    greedy         answers to the same token ids: how many are the same, and for how many tokens
    metric         the task's own, on both

Served quantized, a model is never the same; what may differ by how much is in `BOUNDS`, one row a kind of weights. The
result is a value with its failures in words: whoever asked decides what to do about them.

Shape letters: T compared tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from halfbyte.data import LabelChoice
from halfbyte.data.records import RowError
from halfbyte.evaluate.labels import distinct_parts
from halfbyte.evaluate.metrics import ACCURACY, Metric
from halfbyte.export.servers import NotServed, Prompt, Served, Tools, TrainedModel

SCHEMA_VERSION = 1
PARITY = "parity.json"
MAX_POSITIONS = 256
"""Most tokens of one row whose distributions are compared, its last ones: two [256, V] tensors are held."""
BASE_ROWS = 16
"""Rows on which the base without the adapter is asked too, to see the adapter's own effect."""
MOVED = 1e-3
"""Mean KL(trained || base), nats, below which an adapter has too little effect for its strength to be told."""

TIE = 0.1
"""Nats between two tokens' log-probabilities, in the trained model, below which either may be an answer's next: it is
rounding that decides, so the answer is compared up to there."""

Progress = Callable[[str, int, int], None]
"""Hears (what is being done, rows done, rows in all)."""


@dataclass(frozen=True)
class Bounds:
    """What may differ.

    kl        mean KL(trained || served), nats a supervised token
    loss      rise of the mean loss, nats a supervised token
    strength  distance of the adapter's measured strength from 1
    greedy    least share of the trained model's answer tokens that come before the first difference
    metric    largest fall of the task metric; one row more may always fall
    reason    where the figures come from
    """

    kl: float
    loss: float
    strength: float
    greedy: float
    metric: float
    reason: str


EXACT = Bounds(1e-4, 1e-3, 0.02, 0.98, 0.0, "the same numbers, summed in another order")
SIXTEEN = Bounds(
    5e-3, 0.01, 0.05, 0.85, 0.01, "weights and activations rounded to 16 bits, 8 to 11 of them significant"
)
EIGHT = Bounds(0.02, 0.02, 0.06, 0.7, 0.02, "8-bit blocks: llama.cpp rounds the activations to 8 bits too")
SIX = Bounds(0.05, 0.04, 0.1, 0.5, 0.03, "6-bit blocks")
FIVE = Bounds(0.1, 0.08, 0.15, 0.4, 0.05, "5-bit blocks")
FOUR = Bounds(0.25, 0.2, 0.2, 0.2, 0.1, "4-bit blocks; small models lose most")

BOUNDS: dict[str, Bounds] = {
    "f32": EXACT,
    "float32": EXACT,
    "f16": SIXTEEN,
    "float16": SIXTEEN,
    "bf16": SIXTEEN,
    "bfloat16": SIXTEEN,
    "q8_0": EIGHT,
    "adapter": EIGHT,
    "q6_k": SIX,
    "q5_k_m": FIVE,
    "q5_k_s": FIVE,
    "q5_k": FIVE,
    "q5_0": FIVE,
    "q5_1": FIVE,
    "q4_k_m": FOUR,
    "q4_k_s": FOUR,
    "q4_k": FOUR,
    "q4_0": FOUR,
    "q4_1": FOUR,
    "bnb-4bit": FOUR,
    "gptq": FOUR,
    "awq": FOUR,
}
"""By the kind of the served weights; `adapter`: an adapter beside the base that it was trained on."""


def bounds_of(kind: str, exact_reference: bool = True) -> Bounds:
    """The bounds for a kind of weights. `exact_reference`: the trained model computes in float32, not in 16 bits."""
    bounds = BOUNDS[kind.lower()]
    return SIXTEEN if bounds is EXACT and not exact_reference else bounds


@dataclass(frozen=True)
class HeldOutRow:
    """A row that was not trained on, as plain values.

    prompt      a text or messages, up to where the (last) answer begins; None: plain text without a question
    input_ids   of the whole row as in training; `supervised`: which of them are answers
    answer      the right one, in words; label: its index for classification
    """

    name: str
    prompt: Prompt | None
    tools: Tools
    input_ids: Sequence[int]
    supervised: Sequence[bool]
    answer: str | None = None
    label: int | None = None


@dataclass(frozen=True)
class Question:
    """What is asked of both models beside the rows.

    stop_ids        end an answer
    labels          classification: the classes; then the metric is accuracy
    metrics         of an answer's text against the row's own
    max_new_tokens  most tokens of a greedy answer; 0: none are generated
    """

    stop_ids: Collection[int]
    labels: Sequence[LabelChoice] = ()
    metrics: Sequence[Metric] = ()
    max_new_tokens: int = 64


@dataclass(frozen=True)
class ParityReport:
    """What was found. Figures are 0 where there was nothing to compare; `skipped`: why nothing was compared.

    prompts, same_prompts        rendered by the served program, and those with the trained model's token ids
    difference                   the first difference of a prompt's ids, in words
    tokens                       supervised tokens whose distributions were compared
    mean_kl, max_kl              KL(trained || served), nats
    mean_drift, max_drift        |difference| of the supervised tokens' log-probabilities, nats
    base_kl, strength            KL(trained || base), and how strong the adapter acts; None where there is none
    answers, same_answers        greedy answers, and those that are identical
    agreement                    share of the trained model's answer tokens before the first difference (but see TIE)
    metrics                      name -> (trained, served)
    """

    program: str = ""
    kind: str = ""
    rows: int = 0
    prompts: int = 0
    same_prompts: int = 0
    difference: str = ""
    tokens: int = 0
    mean_kl: float = 0.0
    max_kl: float = 0.0
    mean_drift: float = 0.0
    max_drift: float = 0.0
    trained_loss: float = 0.0
    served_loss: float = 0.0
    base_kl: float | None = None
    strength: float | None = None
    answers: int = 0
    same_answers: int = 0
    agreement: float = 0.0
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    bounds: Bounds | None = None
    failures: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def passed(self) -> bool | None:
        """None where nothing was compared."""
        return None if self.skipped else not self.failures

    def to_json(self) -> dict[str, Any]:
        """JSON has no infinity: what is not finite is null."""
        metrics = {name: list(pair) for name, pair in self.metrics.items()}
        ours, theirs = _perplexity(self.trained_loss), _perplexity(self.served_loss)
        found = asdict(self) | {"metrics": metrics, "trained_perplexity": ours, "served_perplexity": theirs}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}
        return {"schema_version": SCHEMA_VERSION, "passed": self.passed, **finite}

    def lines(self) -> list[str]:
        """The result for people: the verdict first."""
        if self.skipped:
            return [f"not compared: {self.skipped}"]
        out = [f"{'passed' if self.passed else 'FAILED'}: compared with the trained model in {self.program}"]
        out += [f"  - {failure}" for failure in self.failures]
        if self.prompts:
            out.append(f"prompts: the same token ids on {self.same_prompts} of {self.prompts}")
        if self.tokens:
            ours, theirs = _perplexity(self.trained_loss), _perplexity(self.served_loss)
            out.append(
                f"answers' tokens: KL {self.mean_kl:.2g} nats (largest {self.max_kl:.2g}), log-probabilities off by "
                f"{self.mean_drift:.2g} (largest {self.max_drift:.2g}), perplexity {ours:.4g} as trained, "
                f"{theirs:.4g} served; {self.tokens:,} tokens of {self.rows} rows"
            )
        if self.strength is not None:
            out.append(f"adapter: {self.strength:.3f} times as strong as trained")
        if self.answers:
            out.append(
                f"greedy answers: {self.same_answers} of {self.answers} identical, {self.agreement:.0%} of the tokens "
                "before the first difference"
            )
        out += [f"{name}: {ours:.4f} as trained, {theirs:.4f} served" for name, (ours, theirs) in self.metrics.items()]
        return out


def check(
    trained: TrainedModel,
    served: Served,
    rows: Sequence[HeldOutRow],
    question: Question,
    kind: str,
    bounds: Bounds | None = None,
    tuned: bool = True,
    on_progress: Progress | None = None,
) -> ParityReport:
    """Ask both models and judge.

    kind     of the served weights, a key of BOUNDS; `bounds` takes the place of its row
    tuned    whether the trained model has an adapter, so that its effect can be told
    """
    tell = on_progress or (lambda what, done, total: None)
    report = ParityReport(served.name, kind, len(rows), bounds=bounds or bounds_of(kind))
    if not rows:
        return replace(report, skipped="there are no held-out rows")
    report, prompts = _compare_prompts(report, trained, served, rows, tell)
    report = _compare_tokens(report, trained, served, rows, tuned, tell)
    if question.labels and any(row.label is not None for row in rows):
        report = _compare_labels(report, trained, served, rows, prompts, question.labels, tell)
    elif question.max_new_tokens:
        report = _compare_answers(report, trained, served, rows, prompts, question, tell)
    return replace(report, failures=tuple(_judge(report)))


def _compare_prompts(
    report: ParityReport, trained: TrainedModel, served: Served, rows: Sequence[HeldOutRow], tell: Progress
) -> tuple[ParityReport, dict[int, list[int]]]:
    """Each prompt's ids on both sides; (the report, row -> the trained model's ids)."""
    prompts: dict[int, list[int]] = {}
    same, difference = 0, ""
    for i, row in enumerate(rows):
        tell("prompts", i + 1, len(rows))
        if row.prompt is None:
            continue
        try:
            prompts[i] = trained.token_ids(row.prompt, row.tools)
        except RowError:  # the template that the run was trained with refuses a conversation that ends here
            continue
        try:
            found = served.token_ids(row.prompt, row.tools)
        except NotServed as error:
            difference = difference or f"{row.name}: {error}"
            continue
        same += found == prompts[i]
        if found != prompts[i] and not difference:
            difference = f"{row.name}: {describe_difference(prompts[i], found, trained.tokenizer)}"
    return replace(report, prompts=len(prompts), same_prompts=same, difference=difference), prompts


def describe_difference(ours: Sequence[int], theirs: Sequence[int], tokenizer: Any) -> str:
    """The first difference of a prompt's ids, with the usual reasons by name."""

    def shown(ids: Sequence[int]) -> str:
        return repr(tokenizer.decode(list(ids[:8]))) + ("…" if len(ids) > 8 else "")

    ours, theirs, bos = list(ours), list(theirs), tokenizer.bos_token_id
    if theirs == [bos, *ours] and ours[:1] == [bos]:
        return "the served prompt begins with BOS twice, the trained one once"
    if theirs == [bos, *ours]:
        return "the served prompt begins with BOS, the trained one does not"
    if [bos, *theirs] == ours:
        return "the trained prompt begins with BOS, the served one does not"
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if at == len(ours):
        return f"the served prompt goes on behind the trained one's end with {shown(theirs[at:])}"
    if at == len(theirs):
        return f"the served prompt lacks the trained one's end, {shown(ours[at:])}"
    if tokenizer.decode(ours) == tokenizer.decode(theirs):
        return f"the same text is tokenized otherwise from token {at} on: {shown(ours[at:])} is {theirs[at : at + 8]}"
    return f"another text from token {at} on: trained with {shown(ours[at:])}, served {shown(theirs[at:])}"


@dataclass
class _Sums:
    """Running sums over supervised tokens."""

    tokens: int = 0
    kl: float = 0.0
    max_kl: float = 0.0
    drift: float = 0.0
    max_drift: float = 0.0
    trained_nll: float = 0.0
    served_nll: float = 0.0
    base_tokens: int = 0
    base_kl: float = 0.0
    along: float = 0.0
    moved: float = 0.0

    def add(self, trained_TV: Tensor, served_TV: Tensor, targets_T: Tensor) -> None:
        kl_T = _kl(trained_TV, served_TV)
        ours_T, theirs_T = (x.gather(1, targets_T[:, None])[:, 0].double() for x in (trained_TV, served_TV))
        drift_T = (ours_T - theirs_T).abs()
        self.tokens += len(targets_T)
        self.kl += float(kl_T.sum())
        self.max_kl = max(self.max_kl, float(kl_T.max()))
        self.drift += float(drift_T.sum())
        self.max_drift = max(self.max_drift, float(drift_T.max()))
        self.trained_nll -= float(ours_T.sum())
        self.served_nll -= float(theirs_T.sum())

    def add_base(self, trained_TV: Tensor, served_TV: Tensor, base_TV: Tensor) -> None:
        """The adapter's strength is the slope of (served - base) over (trained - base), log-probabilities centred.

        What quantizing adds points elsewhere and drops out of the slope; a wrong scale does not.
        """
        self.base_tokens += len(base_TV)
        self.base_kl += float(_kl(trained_TV, base_TV).sum())
        wanted_TV, found_TV = trained_TV - base_TV, served_TV - base_TV
        wanted_TV = wanted_TV - wanted_TV.mean(1, keepdim=True)
        self.along += float((found_TV * wanted_TV).sum(1).double().sum())
        self.moved += float((wanted_TV * wanted_TV).sum(1).double().sum())


def _kl(p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """KL(p || q) a row, from log-probabilities; not below 0, where rounding would put it."""
    return (p_TV.exp() * (p_TV - q_TV)).nan_to_num(nan=math.inf).sum(-1).clamp(min=0).double()


def _compare_tokens(
    report: ParityReport,
    trained: TrainedModel,
    served: Served,
    rows: Sequence[HeldOutRow],
    tuned: bool,
    tell: Progress,
) -> ParityReport:
    sums = _Sums()
    for i, row in enumerate(rows):
        ids, first, positions, targets_T = _window(row)
        if not positions:
            continue
        ours, theirs = (_at(model.logprobs(ids, first), positions) for model in (trained, served))
        width = min(ours.shape[1], theirs.shape[1])  # padding of the vocabulary, which no token has
        sums.add(ours[:, :width], theirs[:, :width], targets_T)
        if tuned and i < BASE_ROWS:
            sums.add_base(
                ours[:, :width], theirs[:, :width], _at(trained.base_logprobs(ids, first), positions)[:, :width]
            )
        tell("log-probabilities", i + 1, len(rows))
    if not sums.tokens:
        return report
    base_kl = sums.base_kl / sums.base_tokens if sums.base_tokens else None
    return replace(
        report,
        tokens=sums.tokens,
        mean_kl=sums.kl / sums.tokens,
        max_kl=sums.max_kl,
        mean_drift=sums.drift / sums.tokens,
        max_drift=sums.max_drift,
        trained_loss=sums.trained_nll / sums.tokens,
        served_loss=sums.served_nll / sums.tokens,
        base_kl=base_kl,
        strength=sums.along / sums.moved if base_kl is not None and base_kl > MOVED else None,
    )


def _window(row: HeldOutRow) -> tuple[list[int], int, list[int], Tensor]:
    """(ids to read, the first whose logits are wanted, the positions behind that which predict answers, their ids)."""
    ids = list(map(int, row.input_ids))
    learned = [i for i, on in enumerate(row.supervised) if on and i > 0][-MAX_POSITIONS:]
    learned = [i for i in learned if i >= learned[-1] - MAX_POSITIONS]
    if not learned:
        return [], 0, [], torch.tensor([])
    first = learned[0] - 1
    return ids[: learned[-1]], first, [i - 1 - first for i in learned], torch.tensor([ids[i] for i in learned])


def _at(logprobs_TV: Tensor, positions: Sequence[int]) -> Tensor:
    return logprobs_TV if len(positions) == len(logprobs_TV) else logprobs_TV[list(positions)]


def _compare_labels(
    report: ParityReport,
    trained: TrainedModel,
    served: Served,
    rows: Sequence[HeldOutRow],
    prompts: Mapping[int, list[int]],
    labels: Sequence[LabelChoice],
    tell: Progress,
) -> ParityReport:
    """Accuracy of the likeliest label, and whether both models choose the same one."""
    shared, endings = distinct_parts([label.input_ids for label in labels])
    right, same, done = [0, 0], 0, 0
    for i, ids in prompts.items():
        if rows[i].label is None:
            continue
        chosen = [_likeliest(model, [*ids, *shared], endings) for model in (trained, served)]
        right = [count + (one == rows[i].label) for count, one in zip(right, chosen, strict=True)]
        same += chosen[0] == chosen[1]
        done += 1
        tell("labels", i + 1, len(rows))
    if not done:
        return report
    pair = (right[0] / done, right[1] / done)
    return replace(report, answers=done, same_answers=same, agreement=same / done, metrics={ACCURACY: pair})


def _likeliest(model: Served, ids: Sequence[int], endings: Sequence[Sequence[int]]) -> int:
    if all(len(ending) == 1 for ending in endings):
        last_V = model.logprobs(ids, len(ids) - 1)[0]
        scores = [float(last_V[ending[0]]) for ending in endings]
    else:
        scores = []
        for ending in endings:
            found_LV = model.logprobs([*ids, *ending[:-1]], len(ids) - 1)
            scores.append(float(found_LV.gather(1, torch.tensor(ending)[:, None]).double().sum()))
    return scores.index(max(scores))


def _compare_answers(
    report: ParityReport,
    trained: TrainedModel,
    served: Served,
    rows: Sequence[HeldOutRow],
    prompts: Mapping[int, list[int]],
    question: Question,
    tell: Progress,
) -> ParityReport:
    """Greedy answers to the trained model's ids, and the metrics of their texts."""
    agreed, total, same = 0, 0, 0
    texts: list[tuple[HeldOutRow, str, str]] = []
    if not prompts:
        return report
    rooms = {i: _room(rows[i], question.max_new_tokens) for i in prompts}
    most = max(rooms.values())
    answered = dict(zip(prompts, trained.greedy_all(list(prompts.values()), most, question.stop_ids), strict=True))
    for i, ids in prompts.items():
        ours = answered[i][: rooms[i]]
        theirs = served.greedy(ids, rooms[i], question.stop_ids)
        common = next((k for k, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), None)
        common = min(len(ours), len(theirs)) if common is None else common
        # The end of an answer is a token too: stopping where the other goes on is a difference.
        agreed += common + (ours == theirs)
        tie = ours != theirs and _is_tie(trained, [*ids, *ours[:common]], ours, theirs, question.stop_ids)
        total += common if tie else len(ours) + 1
        same += ours == theirs
        a, b = (str(trained.tokenizer.decode(x, skip_special_tokens=True)).strip() for x in (ours, theirs))
        texts.append((rows[i], a, b))
        tell("answers", i + 1, len(rows))
    report = replace(report, answers=len(texts), same_answers=same, agreement=agreed / total if total else 1.0)
    return replace(report, metrics=_metrics(texts, question.metrics))


def _room(row: HeldOutRow, most: int) -> int:
    """Tokens that an answer may have: a few more than the right one, so that one that never ends costs little."""
    return min(most, (sum(map(bool, row.supervised)) or most) + 16)


def _is_tie(
    trained: TrainedModel, ids: Sequence[int], ours: Sequence[int], theirs: Sequence[int], stop_ids: Collection[int]
) -> bool:
    """Whether the trained model, too, holds the served one's first other token for about as likely as its own."""
    last_V = trained.logprobs(ids, len(ids) - 1)[0]
    at = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    ends = [int(i) for i in stop_ids if i < len(last_V)]
    other = [theirs[at]] if at < len(theirs) else ends
    return bool(other) and float(last_V.max() - last_V[other].max()) < TIE


def _metrics(texts: Sequence[tuple[HeldOutRow, str, str]], metrics: Sequence[Metric]) -> dict[str, tuple[float, float]]:
    known = [(row, a, b) for row, a, b in texts if row.answer is not None]
    found: dict[str, tuple[float, float]] = {}
    for metric in metrics if known else ():
        references = [row.answer or "" for row, _, _ in known]
        sides = ([a for _, a, _ in known], [b for _, _, b in known])
        scores = [_score(metric, side, references, [row.name for row, _, _ in known]) for side in sides]
        found[metric.name] = (scores[0], scores[1])
    return found


def _score(metric: Metric, answers: Sequence[str], references: Sequence[str], names: Sequence[str]) -> float:
    if metric.corpus:
        return metric.score_all(answers, references)
    return sum(metric.score(*each) for each in zip(answers, references, names, strict=True)) / len(answers)


def _judge(report: ParityReport) -> list[str]:
    """What is wrong, in words; nothing where the served model is as good as its kind of weights can be."""
    bounds, failures = report.bounds, []
    assert bounds is not None
    allowed = f"allowed for {report.kind}"
    if report.same_prompts < report.prompts:
        count = report.prompts - report.same_prompts
        failures.append(
            f"{count} of {report.prompts} prompts become other tokens than in training: {report.difference}"
        )
    rise = report.served_loss - report.trained_loss
    if not report.mean_kl <= bounds.kl:
        failures.append(
            f"the answers' tokens have a KL of {report.mean_kl:.3g} nats a token, {bounds.kl:g} are {allowed}"
        )
    if not rise <= bounds.loss:
        failures.append(f"the loss is {rise:.3g} nats a token higher than as trained, {bounds.loss:g} is {allowed}")
    if report.strength is not None and not abs(report.strength - 1) <= bounds.strength:
        failures.append(
            f"the adapter acts {report.strength:.2f} times as strong as trained, {bounds.strength:g} more or less is "
            f"{allowed}: {_why_weak(report)}"
        )
    if report.strength is not None and report.base_kl is not None and report.mean_kl >= report.base_kl:
        failures.append(
            f"the served model is as far from the trained one (KL {report.mean_kl:.3g}) as the base without the "
            f"adapter is ({report.base_kl:.3g}): these weights have lost what was learned"
        )
    if report.answers and not report.agreement >= bounds.greedy:
        failures.append(
            f"greedy answers agree on {report.agreement:.0%} of their tokens, {bounds.greedy:.0%} are {allowed}"
        )
    for name, (ours, theirs) in report.metrics.items():
        if ours - theirs > bounds.metric + 1 / max(report.answers, 1):
            failures.append(f"{name} falls from {ours:.4f} to {theirs:.4f}, more than {bounds.metric:g} and one row")
    return failures


def _why_weak(report: ParityReport) -> str:
    """What makes an adapter act otherwise than it was trained."""
    wrong = "its scale is wrong, or a part of it is missing"
    rounded = report.strength is not None and report.strength < 1 and BOUNDS[report.kind.lower()].kl > SIXTEEN.kl
    if not rounded or report.kind == "adapter":
        return wrong
    return (
        "quantizing has rounded a small update away (take more bits, or serve the adapter beside its base, --to "
        f"gguf-adapter), or {wrong}"
    )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf
