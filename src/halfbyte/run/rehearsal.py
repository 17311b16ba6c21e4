"""Before step 1: the worst that the run will do, once, and how long its micro-batches take. Then the run starts, from
untouched state.

    save            a checkpoint of the untouched run into a scratch folder, beside which there is room for it
    micro-batches   the longest of the run, then a median and a short one: each once to warm up and once timed
    optimizer       one step at learning rate 0
    evaluation      the longest batch of held-out rows
    restore         the checkpoint is read and checked, parameters and optimizer are put back from it, and the optimizer
                    is made new: not a bit of what follows depends on whether there was a rehearsal

What is found out is worth an hour: a full disk, rows that break the numbers, a checkpoint that cannot be read, a peak
over the budget (the run then steps down before it begins, and rehearses again). What was timed corrects the plan
(`plan.time.corrected`), and plan.json is written anew before the first step.
"""

import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch

from halfbyte.data import Example, plan_micro_batches
from halfbyte.errors import HalfbyteError
from halfbyte.heap import give_back
from halfbyte.plan.memory import Job
from halfbyte.plan.recommend import Plan
from halfbyte.plan.time import Counts, Probed
from halfbyte.run.config import RunConfig
from halfbyte.train import checkpoint
from halfbyte.train.budget import Shortage
from halfbyte.train.feed import Feed
from halfbyte.train.loop import load_trainable
from halfbyte.train.state import Stage
from halfbyte.train.update import FIRST_LOSS_SCALE, LossScale, backward, update_by_layer

MOST = 0.02
"""Share of the run that a rehearsal may take where nobody asked for one."""
PASSES = 2
"""Of each length: one that warms up, one that is timed."""
DIFFERENT = 0.8
"""Of the tokens of the next longer probe: more alike, another says nothing about time that this one does not."""
SCRATCH = ".rehearsal.partial"
"""Below the run's folder, so on its disk; `checkpoint.remove_leftovers` knows names of this kind."""


@dataclass(frozen=True)
class Evaluation:
    """How the run evaluates: `measure(rows, tokens)` reads these rows in chunks of so many tokens."""

    rows: Sequence[Example]
    tokens: int
    measure: Callable[[Sequence[Example], int], object]

    def longest(self) -> list[Example]:
        """The rows of the largest chunk."""
        return max(chunks(self.rows, self.tokens), key=lambda chunk: (sum(map(len, chunk)), -len(chunk)))

    def halved(self, times: int) -> Self:
        return replace(self, tokens=max(1, self.tokens >> times))


def chunks(rows: Sequence[Example], tokens: int) -> list[list[Example]]:
    """Rows as an evaluation reads them (`evaluate.evaluate.row_losses`)."""
    return [[rows[i] for i in piece] for piece in plan_micro_batches([len(e) for e in rows], 1, True, tokens)]


@dataclass(frozen=True)
class Measured:
    """What a rehearsal found out, for `plan.time.corrected`.

    counts          all training micro-batches of the run
    update_seconds  one optimizer step
    seconds         that all of it took
    """

    seconds: float
    probes: tuple[Probed, ...]
    counts: Counts
    update_seconds: float | None
    evaluation: Probed | None
    peak_memory_bytes: int


@dataclass(frozen=True)
class Rehearsal:
    """`TrainPlan.rehearse`: called once before the first step of a new run, and again in every layout below the plan's.

    tell    is given what was measured; plan.json is its business. What it returns is told with the event
    """

    feed: Feed
    total_steps: int
    evaluation: Evaluation | None
    tell: Callable[[Measured], Mapping[str, object] | None]

    def lowered(self, feed: Feed, evaluation_halvings: int) -> Self:
        """The same in another layout."""
        evaluation = None if self.evaluation is None else self.evaluation.halved(evaluation_halvings)
        return replace(self, feed=feed, evaluation=evaluation)

    def __call__(self, stage: Stage) -> Mapping[str, object]:
        """The fields of the `rehearsal` event. Shortage where it went over the budget."""
        started = _clock(stage)
        try:
            with _untouched(stage):
                probes = [self._timed(stage, members) for members in self.chosen()]
                update_seconds = _step(stage)
                evaluated = self._evaluated(stage)
        except HalfbyteError as error:
            raise type(error)(f"the rehearsal before step 1 failed: {error}") from error
        peak = stage.budget.memory()[1]
        measured = Measured(_clock(stage) - started, tuple(probes), self.counts, update_seconds, evaluated, peak)
        told = self.tell(measured) or {}
        return {
            "peak_memory_bytes": peak,
            "memory_limit_bytes": stage.plan.memory,
            "tried": ["save", "training", "optimizer step", *(["evaluation"] if evaluated else []), "restore"],
            "probes": [_as_dict(p) for p in probes],
            "optimizer_seconds": update_seconds,
            "evaluation": None if evaluated is None else _as_dict(evaluated),
            **told,
        }

    # -- which micro-batches ----------------------------------------------------------------------------------------

    @cached_property
    def _sizes(self) -> list[Counts]:
        """Every example by itself."""
        return [counts_of([example]) for example in self.feed.examples]

    @cached_property
    def _all(self) -> list[Counts]:
        """Every micro-batch of the run."""
        return [self._size(members) for members in self.feed.all_micro_batches(self.total_steps)]

    def _size(self, members: Sequence[int]) -> Counts:
        return sum_of([self._sizes[index] for index in members])

    @property
    def counts(self) -> Counts:
        """All micro-batches together."""
        return replace(sum_of(self._all), micro_batches=len(self._all))

    def chosen(self) -> list[list[int]]:
        """The longest micro-batch of the run, the median one and the shortest, as far as their tokens differ."""
        supervised = [size for size in self._all if size.supervised]
        if not supervised:
            raise HalfbyteError("nothing is supervised in any row of this run")
        longest = max(supervised, key=lambda size: (size.tokens, size.supervised, size.squares))
        tokens = [size.tokens for size in supervised]
        wanted = {longest.tokens: longest}
        for other in (statistics.median_low(tokens), min(tokens)):
            if other < DIFFERENT * min(wanted):
                wanted[other] = next(size for size in supervised if size.tokens == other)
        found: dict[int, list[int]] = {}
        for members, size in zip(self.feed.all_micro_batches(self.total_steps), self._all, strict=True):
            if wanted.get(size.tokens) == size:
                found.setdefault(size.tokens, members)
            if len(found) == len(wanted):
                break
        return [found[count] for count in wanted]

    # -- what is tried ----------------------------------------------------------------------------------------------

    def _timed(self, stage: Stage, members: Sequence[int]) -> Probed:
        """Forward and backward pass of a micro-batch, as an update of its own; the last of its passes is timed."""
        batch = self.feed.batch(members).to(stage.plan.device)
        seconds = math.inf
        for _ in range(PASSES):
            started = _clock(stage)
            _gradient(stage, batch)
            seconds = _clock(stage) - started
            _require_budget(stage)
            stage.optimizer.zero_grad()
            give_back()  # as after every update of the run, whose peak this is to show
        return Probed(self._size(members), seconds)

    def _evaluated(self, stage: Stage) -> Probed | None:
        """The longest batch of an evaluation."""
        if self.evaluation is None:
            return None
        rows = self.evaluation.longest()
        stage.budget.before("evaluate", self.evaluation.tokens)
        started = _clock(stage)
        self.evaluation.measure(rows, self.evaluation.tokens)
        seconds = _clock(stage) - started
        _require_budget(stage)
        return Probed(counts_of(rows), seconds)


def _require_budget(stage: Stage) -> None:
    """Shortage if what was tried last went over the run's budget."""
    stage.budget.settle()
    limit, reached = stage.plan.memory, stage.budget.reached
    if limit is not None and reached > limit:
        raise Shortage(f"the rehearsal reached {reached / 1e9:.3f} GB of {limit / 1e9:.3f} GB")


def counts_of(rows: Sequence[Example]) -> Counts:
    """Some rows as one micro-batch."""
    squares = sum(len(document.input_ids) ** 2 for row in rows for document in row.documents)
    return Counts(1, sum(map(len, rows)), sum(row.supervised_tokens for row in rows), squares)


def sum_of(sizes: Sequence[Counts]) -> Counts:
    """Rows together, as one micro-batch."""
    return Counts(1, sum(s.tokens for s in sizes), sum(s.supervised for s in sizes), sum(s.squares for s in sizes))


def is_due(config: RunConfig, plan: Plan | None) -> bool:
    """Whether a run rehearses: as asked, or where the plan says that it costs under 2 % of the run.

    No plan, as on a resumed run: only if asked (and, the loop sees to that, if no step was made yet).
    """
    if config.rehearsal is not None or plan is None:
        return bool(config.rehearsal)
    chosen = plan.chosen
    seconds, job = chosen.seconds, chosen.job
    # The longest, a median and a short micro-batch are at most two and a half of the longest.
    trained = 2.5 * PASSES * job.micro_tokens / max(job.train_tokens, 1) * seconds.get("train", 0.0)
    read = evaluation_share(job) * seconds.get("evaluate", 0.0)
    return trained + read + 2 * seconds.get("save", 0.0) < MOST * chosen.total_seconds


def evaluation_share(job: Job) -> float:
    """The part of all evaluating that one batch is."""
    return min(1.0, job.eval_batch_tokens / max(job.eval_tokens, 1))


@contextmanager
def _untouched(stage: Stage) -> Iterator[None]:
    """Save the run as it stands, and afterwards, whatever happened in between, put it back from there."""
    scratch = stage.folder / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        optimizer, plan = stage.optimizer, stage.plan
        stage.budget.make_room()
        folder = checkpoint.save(scratch, 0, plan.trainable, optimizer.planned(), {}, plan.save_extras)
        try:
            yield
        finally:
            found = checkpoint.load(folder)
            load_trainable(plan, found)
            optimizer.zero_grad()
            optimizer.load_state_dict(found.optimizer)
            optimizer.reset()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _gradient(stage: Stage, batch: Any) -> None:
    """One micro-batch as an update: checked as in the loop, the rows named that break the numbers."""
    plan, model = stage.plan, stage.model
    model.train()
    if plan.optim.by_layer:
        update_by_layer(model, stage.optimizer, [batch], plan.options.seed, 0, 0.0, stage.stop, plan.locate)
        return
    scale = LossScale(FIRST_LOSS_SCALE if plan.loss_scaling else 1.0, enabled=plan.loss_scaling)
    backward(model, stage.optimizer, [batch], plan.options.seed, 0, scale, stage.stop, plan.locate)


def _step(stage: Stage) -> float | None:
    """Seconds of one optimizer step at learning rate 0; None where the backward pass is the step.

    The second one is timed: the first touches the state's memory, and chooses GaLore's projections.
    """
    if stage.plan.optim.by_layer:
        return None
    seconds = math.inf
    for _ in range(PASSES):
        stage.budget.make_room()
        started = _clock(stage)
        stage.optimizer.step(0.0)
        seconds = _clock(stage) - started
    return seconds


def _clock(stage: Stage) -> float:
    if stage.plan.device.type == "cuda":
        torch.cuda.synchronize(stage.plan.device)
    return time.perf_counter()


def _as_dict(probed: Probed) -> dict[str, object]:
    counts = probed.counts
    return {"tokens": counts.tokens, "supervised_tokens": counts.supervised, "seconds": round(probed.seconds, 4)}
