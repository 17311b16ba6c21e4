"""A run whose memory falls short: it steps down, says so, and makes the updates of the smaller layout bit for bit."""

import gc
import mmap
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfbyte.data.examples import Example
from halfbyte.data.packing import collate
from halfbyte.data.records import Origin
from halfbyte.data.sampler import Sampler
from halfbyte.errors import DoesNotFit
from halfbyte.heap import give_back
from halfbyte.ops.pool import pool
from halfbyte.optim import OptimOptions
from halfbyte.train import checkpoint
from halfbyte.train.budget import AS_PLANNED, Budget, Layout, Needs, Shortage, in_chunks, is_shortage
from halfbyte.train.evaluation import InChunks, evaluation_loss
from halfbyte.train.events import Listener, read_events
from halfbyte.train.feed import Feed
from halfbyte.train.loop import train
from halfbyte.train.run_directory import RunDirectory
from halfbyte.train.state import CPU, TrainPlan, TrainResult
from tests.limits import data_bytes, in_new_process, limit_data

from . import tiny
from .test_loop import assert_same, steps_of

LENGTH, ROWS, MICRO_BATCH, STEPS, LAYERS = 1024, 16, 4, 3, 6
limited = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")


# ---------------------------------------------------------------- small parts


def test_layouts_go_down_one_step_at_a_time() -> None:
    lowest = Layout(2, True, 1)
    layout, seen = AS_PLANNED, []
    while (lower := layout.lower(lowest, "train")) is not None:
        seen.append(lower)
        layout = lower
    assert seen == [Layout(1), Layout(2), Layout(2, True)]
    assert layout.lower(lowest, "evaluate") == Layout(2, True, 1)
    assert Layout(2, True, 1).lower(lowest, "evaluate") is None
    assert AS_PLANNED.lower(AS_PLANNED, "train") is None
    assert len({lower.change_from(before) for before, lower in zip([AS_PLANNED, *seen], seen, strict=False)}) == 3


def test_needs_are_foretold_from_what_is_comparable() -> None:
    needs = Needs()
    assert needs.of(100) is None
    needs.learn(100, 1000)
    assert needs.of(100) == 1000
    assert needs.of(200) == 2000
    assert needs.of(50) == 500
    assert needs.of(401) is None, "most of a small micro-batch is fixed: it says nothing of one four times as long"
    needs.learn(50, 900)
    assert needs.of(60) == 900, "no less than fewer tokens took"
    needs.learn(100, 800)
    assert needs.of(100) == 1000, "one that took less says nothing new"


def allocations() -> list[Callable[[], Any]]:
    huge = 1 << 52
    return [
        lambda: torch.empty(huge),
        lambda: np.empty(huge),
        lambda: bytearray(huge),
        lambda: mmap.mmap(-1, huge),
        lambda: pool.take(huge),
    ]


@pytest.mark.parametrize("number", range(5))
def test_every_failed_allocation_is_a_shortage(number: int) -> None:
    with pytest.raises((MemoryError, RuntimeError, OSError)) as caught:
        allocations()[number]()
    assert is_shortage(caught.value)


def test_other_errors_are_not() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_shortage(caught.value)
    assert not is_shortage(FileNotFoundError(2, "no such file"))
    assert not is_shortage(ValueError("not enough memory"))


def test_what_would_not_fit_is_not_begun() -> None:
    budget = Budget(None, CPU)
    budget.before("train", 1000)
    held = np.ones(30_000_000, dtype=np.uint8)
    budget.settle()
    del held
    standing = budget.tidy()
    budget.limit = standing + 45_000_000
    budget.before("train", 1000)
    with pytest.raises(Shortage, match=r"2,000 tokens need about 0\.06 GB beside the .* held, and the limit is"):
        budget.before("train", 2000)
    budget.before("evaluate", 2000)  # of which nothing is known


def test_evaluation_goes_on_in_smaller_chunks() -> None:
    told: list[str] = []

    def work(tokens: int) -> str:
        if tokens > 1000:
            torch.empty(1 << 52)
        return f"done with {tokens}"

    assert in_chunks(work, 4096, told.append) == "done with 512"
    assert len(told) == 3
    assert "chunks of 2,048 tokens" in told[0]
    with pytest.raises(DoesNotFit, match="row by row"):
        in_chunks(lambda tokens: torch.empty(1 << 52), 4, told.append)
    with pytest.raises(RuntimeError, match="tensor"):
        in_chunks(lambda tokens: torch.zeros(2) @ torch.zeros(3), 4, told.append)


# ---------------------------------------------------------------- runs


def long_plan(
    model: Any, micro_batch: int = MICRO_BATCH, optim: str = "adamw", length: int = LENGTH, **changes: Any
) -> TrainPlan:
    """Long rows, so that activations are most of what a step takes; as `run.train_plan` lays it out."""
    rng = np.random.default_rng(5)
    rows = [
        Example(rng.integers(1, tiny.VOCABULARY, length).astype(np.int32), np.ones(length, dtype=bool), Origin("r", i))
        for i in range(ROWS)
    ]
    rows = [replace(row, index=index) for index, row in enumerate(rows)]
    feed = Feed(rows, Sampler(ROWS, seed=3), rows_per_update=8, micro_batch=micro_batch)

    def measure(tokens: int, stop: Callable[[], bool]) -> Any:
        each = max(1, tokens // length)
        return evaluation_loss(model, [collate(rows[i : i + each]) for i in range(0, 8, each)], CPU, stop)

    def lowered(plan: TrainPlan, layout: Layout) -> TrainPlan:
        model.checkpointing = layout.recompute
        evaluate = plan.evaluate
        if isinstance(evaluate, InChunks):
            evaluate = evaluate.halved(layout.evaluation_halvings)
        return replace(plan, batches_for_update=feed.halved(layout.halvings).batches_for_update, evaluate=evaluate)

    plan = replace(
        tiny.make_plan(model, steps=STEPS, optim=optim, save_steps=1, save_total_limit=9),
        batches_for_update=feed.batches_for_update,
        evaluate=InChunks(measure, 2 * length),
        steps_per_epoch=None,
        lowered=lowered,
        lowest=Layout(feed.halvings, True, 1),
    )
    return replace(plan, **changes)


def long_run(
    path: Path, listeners: tuple[Listener, ...] = (), resume: bool = False, dropout: float = 0.1, **options: Any
) -> TrainResult:
    model = tiny.decoder(dropout, layers=LAYERS)
    plan = long_plan(model, **options)
    with RunDirectory.resume(path) if resume else RunDirectory.create(path) as directory:
        return train(model, plan, directory, listeners)


def need_of(micro_batch: int = MICRO_BATCH, recompute: bool = False, length: int = LENGTH) -> int:
    """What the activations of such a micro-batch take, to the byte."""
    model = tiny.decoder(0.1, layers=LAYERS)
    model.checkpointing = recompute
    batch = long_plan(model, micro_batch, length=length).batches_for_update(1)[0]
    for _ in range(2):  # the native engine's own scratch is there after the first one
        pool.clear()
        model.loss(batch)[0].backward()
    peak = pool.peak
    pool.clear()
    return peak


def starve(path: Path, share: float, at_step: int, options: dict[str, Any]) -> tuple[str, int]:
    """Run with room for a share of a micro-batch's activations, from the event of `at_step` on; what became of it."""
    room = int(share * need_of(options.get("micro_batch", MICRO_BATCH), length=options.get("length", LENGTH)))

    def listen(event: dict[str, Any]) -> None:
        if event["event"] in ("start", "step") and event["step"] == at_step:
            pool.clear()
            gc.collect()
            give_back()  # what the heap keeps would be room that nobody counted
            limit_data(data_bytes() + room)

    try:
        return long_run(path, (listen,), **options).status, 0
    except DoesNotFit as error:
        return str(error), error.exit_code


def warnings_of(path: Path) -> list[str]:
    return [event["message"] for event in read_events(path / "events.jsonl") if event["event"] == "warning"]


@limited
@pytest.mark.parametrize("optim", ["adamw", pytest.param("paged_adamw", marks=pytest.mark.slow)])
def test_half_the_micro_batch_and_the_same_update(tmp_path: Path, optim: str) -> None:
    """A process with less memory than its plan needs ends where one with half the micro-batch from the start does."""
    options = {"optim": optim}
    assert in_new_process(starve, tmp_path / "run", 0.65, 0, options) == ("completed", 0)
    (warning,) = [message for message in warnings_of(tmp_path / "run") if "memory ran short" in message]
    assert "at step 0" in warning
    assert "1/2 of the planned" in warning
    long_run(tmp_path / "small", micro_batch=MICRO_BATCH // 2, **options)
    assert [e["loss"] for e in steps_of(tmp_path / "run")] == [e["loss"] for e in steps_of(tmp_path / "small")]
    assert_same(tmp_path / "run", tmp_path / "small")


def test_the_gradient_of_a_lowered_layout_is_the_planned_ones() -> None:
    """Within rounding, without dropout, whose masks are drawn for each micro-batch."""
    gradients = []
    for layout in (AS_PLANNED, Layout(1), Layout(2, True)):
        model = tiny.decoder(layers=2)
        plan = long_plan(model)
        assert plan.lowered is not None
        plan = plan.lowered(plan, layout)
        batches = plan.batches_for_update(1)
        assert len(batches) == 8 // MICRO_BATCH * 2**layout.halvings
        for batch in batches:
            model.loss(batch)[0].backward()
        gradients.append({name: p.grad.clone() for name, p in plan.trainable.items() if p.grad is not None})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


@limited
def test_a_resumed_run_goes_on_in_the_lowered_layout(tmp_path: Path) -> None:
    """Short from the third update on; what follows, also in another process with all memory, is in small batches."""
    assert in_new_process(starve, tmp_path / "run", 0.75, 2, {}) == ("completed", 0)
    layouts = [checkpoint.load(tmp_path / "run" / f"checkpoint-{n}").state["train"]["layout"] for n in (2, 3)]
    assert [layout["halvings"] for layout in layouts] == [0, 1]
    result = long_run(tmp_path / "run", resume=True, total_steps=STEPS + 1)
    assert (result.status, result.layout) == ("completed", Layout(1))
    assert not [message for message in warnings_of(tmp_path / "run")[1:] if "memory ran short" in message]
    assert steps_of(tmp_path / "run")[-1]["step"] == STEPS + 1


def test_then_activations_are_recomputed(tmp_path: Path) -> None:
    """Where even a row at a time is too much, and the same bits as when they were recomputed from the start.

    The memory that one layout has and the next one lacks is no more than the holes of a heap in models as small as a
    test's, so an allocation that no machine can serve stands for it.
    """
    model = tiny.decoder(0.1, layers=2)

    def fail(*_: Any) -> None:
        if model.training and not model.checkpointing:
            torch.empty(1 << 52)

    model.norm.register_forward_pre_hook(fail)
    options: dict[str, Any] = {"micro_batch": 2, "length": 64}
    with RunDirectory.create(tmp_path / "run") as run:
        assert train(model, long_plan(model, **options), run, []).status == "completed"
    told = [message for message in warnings_of(tmp_path / "run") if "memory ran short" in message]
    assert len(told) == 2
    assert "1/2 of the planned" in told[0]
    assert "recomputed in the backward pass" in told[1]
    small = tiny.decoder(0.1, layers=2)
    small.checkpointing = True
    with RunDirectory.create(tmp_path / "small") as run:
        train(small, long_plan(small, **{**options, "micro_batch": 1}), run, [])
    assert [e["loss"] for e in steps_of(tmp_path / "run")] == [e["loss"] for e in steps_of(tmp_path / "small")]
    assert_same(tmp_path / "run", tmp_path / "small")


def test_with_nothing_left_to_lower_everything_is_saved_and_it_does_not_fit(tmp_path: Path) -> None:
    """Whatever the layout: a limit that leaves no room still leaves the heap's holes, at times enough for the last."""
    model = tiny.decoder(0.1, layers=LAYERS)
    steps: list[int] = []

    def fail(*_: Any) -> None:
        if model.training and steps[-1:] == [2]:
            torch.empty(1 << 52)

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            steps.append(event["step"])

    model.norm.register_forward_pre_hook(fail)
    with RunDirectory.create(tmp_path / "run") as run, pytest.raises(DoesNotFit) as caught:
        train(model, long_plan(model), run, [listen])
    message = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in message
    assert "nothing is left to lower" in message
    assert f"go on from step 2 with `halfbyte resume {tmp_path / 'run'}`" in message
    end = read_events(tmp_path / "run" / "events.jsonl")[-1]
    assert (end["event"], end["status"], end["step"]) == ("end", "failed", 2)
    result = long_run(tmp_path / "run", resume=True)  # where there is memory
    assert result.status == "completed"
    planned = long_run(tmp_path / "planned")
    assert result.final_loss == pytest.approx(planned.final_loss, rel=1e-3)


def test_an_update_that_broke_off_half_way_is_not_computed_again(tmp_path: Path) -> None:
    """Per-layer updates: the last layers have the update when an earlier one's memory runs out."""
    model = tiny.decoder()
    plan = replace(long_plan(model, micro_batch=8), optim=OptimOptions(learning_rate=1e-2, per_layer_updates=True))
    first = next(iter(plan.trainable.values()))

    def fail(gradient: torch.Tensor) -> None:
        if heard:
            torch.empty(1 << 52)

    heard: list[Any] = []
    first.register_hook(fail)
    with RunDirectory.create(tmp_path / "run") as run, pytest.raises(DoesNotFit, match="in the middle of update 2"):
        train(model, plan, run, [lambda event: heard.append(event) if event["event"] == "step" else None])
    assert [c.name for c in checkpoint.list_checkpoints(tmp_path / "run")] == ["checkpoint-1"]


def measured_need(model: Any, **options: Any) -> int:
    """What a planned micro-batch takes of this process, code and scratch that stay not counted."""
    batch = long_plan(model, **options).batches_for_update(1)[0]
    for _ in range(2):
        budget = Budget(None, CPU)
        budget.before("train", batch.tokens)
        nll, _ = model.loss(batch)
        budget.half_way()
        nll.backward()
        budget.settle()
    need = budget.needs["train"].of(batch.tokens)
    assert need is not None
    return need


def over_budget(path: Path, options: dict[str, Any]) -> str:
    """Run with a budget that is too small by a quarter of a micro-batch, and which nothing enforces."""
    need = measured_need(tiny.decoder(layers=LAYERS), **options)
    limit = Budget(None, CPU).standing + int(0.75 * need)
    return long_run(path, memory=limit, total_steps=1, dropout=0.0, **options).status


@limited
def test_a_budget_that_the_plan_had_wrong_is_kept_from_then_on(tmp_path: Path) -> None:
    """Nothing fails here: what the first micro-batch took is seen, and the next one is not begun."""
    assert in_new_process(over_budget, tmp_path / "run", {"length": 4096}) == "completed"
    told = [message for message in warnings_of(tmp_path / "run") if "memory ran short" in message]
    assert "tokens need about" in told[0]
    assert "1/2 of the planned" in told[0]


def between(path: Path, options: dict[str, Any]) -> str:
    """Run row by row with a budget for recomputed activations, which nothing enforces, and not for kept ones."""
    model = tiny.decoder(layers=LAYERS)
    model.checkpointing = True
    recomputed = measured_need(model, **options)
    kept = measured_need(tiny.decoder(layers=LAYERS), **options)
    assert kept - recomputed > 12_000_000, "or there is nothing to test"
    limit = Budget(None, CPU).standing + (kept + recomputed) // 2
    return long_run(path, memory=limit, total_steps=1, dropout=0.0, **options).status


@limited
def test_what_kept_activations_took_says_nothing_of_recomputed_ones(tmp_path: Path) -> None:
    """Of rows one by one: the step to recomputing must not be judged by what was measured before it."""
    assert in_new_process(between, tmp_path / "run", {"length": 4096, "micro_batch": 1}) == "completed"
    told = [message for message in warnings_of(tmp_path / "run") if "memory ran short" in message]
    assert "activations are now recomputed" in told[0]


def test_what_came_with_the_first_work_is_not_counted_twice() -> None:
    budget = Budget(None, CPU)
    budget.before("train", 1000)
    stays, goes = np.ones(40_000_000, dtype=np.uint8), np.ones(30_000_000, dtype=np.uint8)
    budget.settle()
    del goes
    standing = budget.tidy()
    budget.limit = standing + 50_000_000
    budget.before("train", 1000)  # 70 MB the first time, and 30 beside what stands now
    assert stays.size


class Failing:
    """A model whose call of some number finds no memory for what comes after a large tensor."""

    def __init__(self, model: Any, number: int) -> None:
        self.model, self.number, self.calls = model, number, 0
        self.held: list[weakref.ref[Any]] = []

    def loss(self, batch: Any) -> tuple[torch.Tensor, int]:
        self.calls += 1
        held = torch.ones(1000)
        self.held.append(weakref.ref(held))
        if self.calls == self.number:
            torch.empty(1 << 52)
        result: tuple[torch.Tensor, int] = self.model.loss(batch)
        return result

    def train(self, mode: bool = True) -> object:
        return self.model.train(mode)


def test_what_failed_holds_nothing_any_more_when_it_steps_down(tmp_path: Path) -> None:
    """Or the tidying would find nothing to give back, and take the graph that failed for what stands."""
    model = Failing(tiny.decoder(), 2)
    alive: list[bool] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "warning" and "memory ran short" in event["message"]:
            alive.append(model.held[-1]() is not None)

    with RunDirectory.create(tmp_path / "run") as run:
        train(model, long_plan(model.model, length=64), run, [listen])
    assert alive == [False]


def test_where_not_even_a_save_has_memory_the_run_still_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*arguments: Any) -> Path:
        torch.empty(1 << 52)
        return tmp_path

    monkeypatch.setattr(checkpoint, "save", save)
    model = tiny.decoder()
    plan = replace(long_plan(model, length=64), lowest=AS_PLANNED)
    with (
        RunDirectory.create(tmp_path / "run") as run,
        pytest.raises(DoesNotFit, match="nothing is left to lower: free some memory; go on from step 0"),
    ):
        train(model, plan, run)


def nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.train.budget.memory_available", lambda: -1_000_000_000)


def test_what_the_machine_seems_to_lack_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the memory. There is nothing to lower, and nothing failed."""
    monkeypatch.setattr("halfbyte.train.budget.FRESH", 0.0)  # what is left is read before each micro-batch
    model = tiny.decoder()
    plan = replace(long_plan(model, length=64), lowest=AS_PLANNED, evaluate=None)

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 1:
            nothing_left(monkeypatch)

    with RunDirectory.create(tmp_path / "run") as run:
        result = train(model, plan, run, [listen])
    assert (result.status, result.layout) == ("completed", AS_PLANNED)
    (told,) = [message for message in warnings_of(tmp_path / "run") if "memory ran short" in message]
    assert "it goes on all the same" in told


def test_a_budget_that_cannot_be_kept_ends_it_and_says_where_to_raise_it(tmp_path: Path) -> None:
    model = tiny.decoder()
    plan = replace(long_plan(model, length=64), lowest=AS_PLANNED, memory=1_000_000)
    with (
        RunDirectory.create(tmp_path / "run") as run,
        pytest.raises(DoesNotFit, match=r"raise `memory` in .*run\.yaml; go on from step 0"),
    ):
        train(model, plan, run)


def test_idle_memory_is_given_back_before_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "_lacks_room", lambda self: True)
    model = tiny.decoder(layers=LAYERS)
    idle: list[int] = []
    plan = replace(long_plan(model), save_extras=lambda folder: idle.append(pool.held - pool.used))
    with RunDirectory.create(tmp_path / "run") as run:
        train(model, plan, run)
    assert idle == [0] * STEPS


def test_a_save_that_found_no_memory_is_due_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, save = [0.0], checkpoint.save
    failures = [MemoryError("no memory")]

    def once(*arguments: Any) -> Path:
        if failures:
            raise failures.pop()
        return save(*arguments)

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 1:
            clock[0] += 61.0

    monkeypatch.setattr("halfbyte.train.loop.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(checkpoint, "save", once)
    model = tiny.decoder()
    options = tiny.make_plan(model, save_minutes=1.0).options
    with RunDirectory.create(tmp_path / "run") as run:
        train(model, replace(long_plan(model, length=64), options=options), run, [listen])
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-3"]
