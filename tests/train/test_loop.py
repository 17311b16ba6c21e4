"""The loop on a tiny decoder with LoRA: accumulation, resume, evaluation, broken numbers, signals."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.batch import Batch
from halfbyte.errors import DoesNotFit, HalfbyteError, Interrupted, UsageError
from halfbyte.optim import learning_rate_at
from halfbyte.train import checkpoint
from halfbyte.train.events import read_events
from halfbyte.train.loop import train
from halfbyte.train.run_directory import RunDirectory
from halfbyte.train.state import environment
from halfbyte.train.update import NonFinite

from . import tiny


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(path / "events.jsonl") if event["event"] == "step"]


def kinds(path: Path) -> list[str]:
    return [event["event"] for event in read_events(path / "events.jsonl")]


def fresh(path: Path, model: Any, **options: Any) -> tuple[Any, Any]:
    return tiny.make_plan(model, **options), RunDirectory.create(path)


def test_it_learns_and_tells(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    result = tiny.run(tmp_path / "run", steps=30, listeners=(heard.append,), eval_steps=10)
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert events == heard
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 31))
    assert [e["step"] for e in events if e["event"] == "eval"] == [10, 20, 30]
    assert (events[0]["event"], events[-1]["event"]) == ("start", "end")
    assert events[0]["schema_version"] == 1
    needed = ["step", "seconds", "tokens", "supervised_tokens", "loss", "learning_rate", "grad_norm", "memory_bytes"]
    for event in events:
        if event["event"] == "step":
            assert all(isinstance(event[key], int | float) for key in needed)
            assert 0 < event["memory_bytes"] <= event["peak_memory_bytes"]
    assert result.status == "completed"
    assert result.final_loss is not None
    assert result.final_loss < events[1]["loss"] - 0.4
    assert result.tokens == sum(e["tokens"] for e in events if e["event"] == "step") == events[0]["total_tokens"]
    assert result.eval_loss == events[-1]["eval_loss"]
    assert result.checkpoint == tmp_path / "run" / "checkpoint-30"
    assert not (tmp_path / "run" / "run.lock").exists()


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_micro_batches_give_the_update_of_one_batch(tmp_path: Path, micro_batches: int) -> None:
    """Rows of unlike lengths, so that a mean of means would differ."""
    weights = []
    for pieces in (1, micro_batches):
        model = tiny.decoder()
        plan = tiny.make_plan(model, steps=1, save_steps=1)
        feed = plan.batches_for_update.__self__  # type: ignore[attr-defined]
        plan = replace(plan, batches_for_update=replace(feed, micro_batch=8 // pieces).batches_for_update)
        assert len(plan.batches_for_update(1)) == pieces
        with RunDirectory.create(tmp_path / str(pieces)) as run:
            train(model, plan, run)
        state = checkpoint.load(tmp_path / str(pieces) / "checkpoint-1")
        weights.append((state.trainable, state.optimizer, steps_of(tmp_path / str(pieces))[0]))
    (one, one_moments, one_event), (many, many_moments, many_event) = weights
    assert one_event["loss"] == pytest.approx(many_event["loss"], rel=1e-6)
    assert one_event["grad_norm"] == pytest.approx(many_event["grad_norm"], rel=1e-5)
    for name, tensor in one_moments.items():
        torch.testing.assert_close(many_moments[name], tensor, rtol=1e-4, atol=1e-7)
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-4, atol=1e-4)


def test_the_update_equals_torch_autograd_and_adamw(tmp_path: Path) -> None:
    """Three steps against the plainest possible loop: one loss, one mean, torch's clipping and AdamW."""
    ours, theirs = tiny.decoder(), tiny.decoder()
    plan = tiny.make_plan(ours, steps=3)
    with RunDirectory.create(tmp_path / "run") as run:
        train(ours, plan, run)
    parameters = tiny.trainable(theirs)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1.0, weight_decay=0.0)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        parts = [theirs.loss(batch) for batch in plan.batches_for_update(step)]
        (sum(nll for nll, _ in parts) / sum(n for _, n in parts)).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(parameters.values(), plan.optim.clip_norm)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, 3, plan.optim)
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(plan.trainable[name], parameter, rtol=1e-4, atol=2e-5)


def test_recomputed_activations_change_nothing_with_dropout(tmp_path: Path) -> None:
    tiny.run(tmp_path / "kept", steps=5, dropout=0.3)
    tiny.run(tmp_path / "recomputed", steps=5, dropout=0.3, checkpointing=True)
    assert_same(tmp_path / "kept", tmp_path / "recomputed")


def test_logging_steps_sums_up(tmp_path: Path) -> None:
    tiny.run(tmp_path / "each", steps=7)
    tiny.run(tmp_path / "some", steps=7, logging_steps=3)
    each, some = steps_of(tmp_path / "each"), steps_of(tmp_path / "some")
    assert [event["step"] for event in some] == [3, 6, 7]
    for event, first, last in zip(some, (0, 3, 6), (3, 6, 7), strict=True):
        window = each[first:last]
        tokens = sum(e["supervised_tokens"] for e in window)
        assert event["supervised_tokens"] == tokens
        assert event["loss"] == pytest.approx(sum(e["loss"] * e["supervised_tokens"] for e in window) / tokens)
        assert event["grad_norm"] == window[-1]["grad_norm"]


def test_the_callers_random_state_stays(tmp_path: Path) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    tiny.run(tmp_path / "run", steps=1, dropout=0.5)
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------- evaluation


def losses(values: list[float]) -> Any:
    remaining = iter(values)
    return lambda stop: {"loss": next(remaining), "supervised_tokens": 10, "accuracy": 0.5}


def test_early_stopping_best_checkpoint_and_its_weights(tmp_path: Path) -> None:
    model = tiny.decoder()
    options = {"eval_steps": 2, "early_stopping_patience": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    plan, run = fresh(tmp_path / "run", model, steps=20, **options)
    with run:
        result = train(model, replace(plan, evaluate=losses([3.0, 2.0, 2.5, 2.0, 1.0])), run)
    assert (result.status, result.step, result.best_step, result.best_eval_loss) == ("stopped_early", 8, 4, 2.0)
    kept = checkpoint.list_checkpoints(tmp_path / "run")
    assert [checkpoint.step_of(folder) for folder in kept] == [4, 8]
    best = checkpoint.load(kept[0]).trainable
    assert all(torch.equal(parameter, best[name]) for name, parameter in plan.trainable.items())
    evaluations = [e for e in read_events(run.events) if e["event"] == "eval"]
    assert [e["best"] for e in evaluations] == [True, True, False, False]
    assert evaluations[0]["accuracy"] == 0.5


def test_without_asking_the_last_weights_are_kept_and_it_is_said(tmp_path: Path) -> None:
    model = tiny.decoder()
    plan, run = fresh(tmp_path / "run", model, steps=4, eval_steps=2)
    with run:
        train(model, replace(plan, evaluate=losses([1.0, 2.0])), run)
    last = checkpoint.load(tmp_path / "run" / "checkpoint-4").trainable
    assert all(torch.equal(parameter, last[name]) for name, parameter in plan.trainable.items())
    assert any("best evaluation was at step 2" in e.get("message", "") for e in read_events(run.events))


def test_a_nan_evaluation_is_no_gain_and_no_crash(tmp_path: Path) -> None:
    model = tiny.decoder()
    plan, run = fresh(tmp_path / "run", model, steps=4, eval_steps=2)
    with run:
        result = train(model, replace(plan, evaluate=losses([math.nan, 2.0])), run)
    assert (result.best_step, result.best_eval_loss) == (4, 2.0)
    assert [e["loss"] for e in read_events(run.events) if e["event"] == "eval"] == [None, 2.0]


# ---------------------------------------------------------------- broken numbers


class Broken:
    """A real model whose loss goes wrong for rows that hold a certain token."""

    def __init__(self, model: Any, token: int, how: str) -> None:
        self.model, self.token, self.how = model, token, how

    def train(self, mode: bool = True) -> object:
        return self.model.train(mode)

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        nll, count = self.model.loss(batch)
        if self.token in batch.input_ids:
            if self.how == "loss":
                return nll + math.nan, count
            # sqrt at 0: a finite value with an infinite gradient
            return nll + (nll - nll.detach()).clamp_min(0).sqrt(), count
        return nll, count


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_non_finite_numbers_stop_before_the_update_and_name_the_row(tmp_path: Path, how: str) -> None:
    model = tiny.decoder()
    plan, run = fresh(tmp_path / "run", model, steps=20)
    rows = {row: row_step for row_step in range(4, 0, -1) for row in plan.batches_for_update.__self__.rows(row_step)}  # type: ignore[attr-defined]
    guilty = next(row for row, row_step in rows.items() if row_step == 3)
    poisoned = tiny.examples()
    poisoned[guilty].input_ids[1] = 0
    for example in poisoned:
        if example.index != guilty:
            example.input_ids[example.input_ids == 0] = 1
    feed = replace(plan.batches_for_update.__self__, examples=poisoned)  # type: ignore[attr-defined]
    plan = replace(plan, batches_for_update=feed.batches_for_update)
    with run, pytest.raises(NonFinite) as caught:
        train(Broken(model, 0, how), plan, run)
    message = str(caught.value)
    assert message.startswith(f"step 3: the {how} is not finite; stopped before the update")
    assert f"Caused by rows.jsonl:{guilty + 1}:" in message
    saved = checkpoint.load(tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(parameter, saved.trainable[name]) for name, parameter in plan.trainable.items())
    end = read_events(run.events)[-1]
    assert (end["event"], end["status"], end["message"]) == ("end", "failed", message)
    assert [event["step"] for event in steps_of(tmp_path / "run")] == [1, 2]


def test_broken_weights_are_not_blamed_on_rows(tmp_path: Path) -> None:
    model = tiny.decoder()
    plan, run = fresh(tmp_path / "run", model)
    name = next(iter(plan.trainable))
    plan.trainable[name].data[0, 0] = math.inf
    with run, pytest.raises(NonFinite, match=f"already were not finite, {name}"):
        train(model, plan, run)
    assert checkpoint.list_checkpoints(tmp_path / "run") == []


def test_every_row_broken_is_said_so(tmp_path: Path) -> None:
    model = tiny.decoder()
    plan, run = fresh(tmp_path / "run", model)

    class Always(Broken):
        def loss(self, batch: Batch) -> tuple[Tensor, int]:
            nll, count = self.model.loss(batch)
            return nll * math.inf, count

    with run, pytest.raises(NonFinite, match=r"Every row shows it \(rows.jsonl:\d+, .* and 3 more\)"):
        train(Always(model, 0, "loss"), plan, run)


def test_nothing_supervised_is_an_error_that_names_rows(tmp_path: Path) -> None:
    model = tiny.decoder()
    plan, run = fresh(tmp_path / "run", model)
    silent = [replace(batch, targets=torch.full_like(batch.targets, -100)) for batch in plan.batches_for_update(1)]
    with run, pytest.raises(HalfbyteError, match=r"step 1: nothing is supervised in rows.jsonl:"):
        train(model, replace(plan, batches_for_update=lambda step: silent), run)


def test_an_unsupervised_micro_batch_changes_nothing(tmp_path: Path) -> None:
    results = []
    for extra in (False, True):
        model = tiny.decoder()
        plan, run = fresh(tmp_path / str(extra), model, steps=2)
        original = plan.batches_for_update
        silent = [replace(b, targets=torch.full_like(b.targets, -100)) for b in original(1)[:1]]

        def batches(step: int, original: Any = original, silent: Any = silent if extra else []) -> list[Batch]:
            return [*original(step), *silent]

        with run:
            train(model, replace(plan, batches_for_update=batches), run)
        results.append({name: p.detach().clone() for name, p in plan.trainable.items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


class HalfRange:
    """fp16's range: a backward pass whose gradients overflow above 65504."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.overflows = 0

    def train(self, mode: bool = True) -> object:
        return self.model.train(mode)

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        nll, count = self.model.loss(batch)
        nll.register_hook(self._overflow)
        return nll, count

    def _overflow(self, gradient: Tensor) -> Tensor:
        if gradient.abs() * 1000 > 65504:
            self.overflows += 1
            return gradient * math.inf
        return gradient


def test_loss_scaling_loses_no_rows_and_changes_nothing(tmp_path: Path) -> None:
    plain, scaled = tiny.decoder(dropout=0.1), tiny.decoder(dropout=0.1)
    plan, run = fresh(tmp_path / "plain", plain, steps=5)
    with run:
        train(plain, plan, run)
    other, run = fresh(tmp_path / "scaled", scaled, steps=5)
    model = HalfRange(scaled)
    with run:
        train(model, replace(other, loss_scaling=True), run)
    assert model.overflows > 0
    for name, parameter in plan.trainable.items():
        torch.testing.assert_close(other.trainable[name], parameter, rtol=1e-3, atol=1e-4)
    state = checkpoint.load(tmp_path / "scaled" / "checkpoint-5").state["train"]
    assert 1 < state["loss_scale"] < 65536
    assert state["loss_scale_good_updates"] == 5
    assert len(steps_of(tmp_path / "scaled")) == 5


# ---------------------------------------------------------------- signals


def raise_signal(number: int, at_step: int) -> Any:
    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == at_step:
            os.kill(os.getpid(), number)

    return listen


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_exactly(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{signal.Signals(number).name} after step 5 of 20.*halfbyte resume"):
        tiny.run(tmp_path / "run", listeners=(raise_signal(number, 5),))
    assert signal.getsignal(number) is before
    assert read_events(tmp_path / "run" / "events.jsonl")[-1]["status"] == "interrupted"
    assert not (tmp_path / "run" / "run.lock").exists()
    tiny.run(tmp_path / "run", resume=True)
    tiny.run(tmp_path / "straight")
    assert_same(tmp_path / "run", tmp_path / "straight")


def test_a_signal_within_an_update_throws_the_gradient_away(tmp_path: Path) -> None:
    model = tiny.decoder(dropout=0.1)
    plan, run = fresh(tmp_path / "run", model)
    calls = 0

    class Interrupting(Broken):
        def loss(self, batch: Batch) -> tuple[Tensor, int]:
            nonlocal calls
            calls += 1
            if calls == 2 * 3 + 1:
                os.kill(os.getpid(), signal.SIGINT)
            return self.model.loss(batch)

    with run, pytest.raises(Interrupted, match="after step 3"):
        train(Interrupting(model, 0, ""), plan, run)
    assert calls == 7
    tiny.run(tmp_path / "run", resume=True)
    tiny.run(tmp_path / "straight")
    assert_same(tmp_path / "run", tmp_path / "straight")


def test_a_signal_within_an_evaluation_resumes_with_it(tmp_path: Path) -> None:
    model = tiny.decoder(dropout=0.1)
    plan, run = fresh(tmp_path / "run", model)

    def evaluate(stop: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()

    with run, pytest.raises(Interrupted):
        train(model, replace(plan, evaluate=evaluate), run)
    tiny.run(tmp_path / "run", resume=True)
    tiny.run(tmp_path / "straight")
    assert_same(tmp_path / "run", tmp_path / "straight")


def test_a_second_signal_leaves_at_once_without_a_half_written_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_file

    def interrupted_write(*args: Any) -> None:
        write(*args)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoint, "write_file", interrupted_write)
    with pytest.raises(KeyboardInterrupt):
        tiny.run(tmp_path / "run", listeners=(raise_signal(signal.SIGINT, 5),))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["events.jsonl"]


# ---------------------------------------------------------------- resume


def assert_same(one: Path, other: Path) -> None:
    """Weights, moments, and the series of events of two finished runs are the same bit for bit."""
    last = [checkpoint.load(checkpoint.list_checkpoints(path)[-1]) for path in (one, other)]
    for kind in ("trainable", "optimizer"):
        first, second = (getattr(c, kind) for c in last)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    timeless = [
        [
            {k: v for k, v in event.items() if k not in ("time", "seconds") and "memory" not in k}
            for event in read_events(path / "events.jsonl")
            if event["event"] in ("step", "eval")
        ]
        for path in (one, other)
    ]
    assert timeless[0] == timeless[1]
    exact = ("step", "tokens", "supervised_tokens", "loss_sum", "last_loss", "best_step", "best_eval_loss", "eval_loss")
    assert all(last[0].state["train"][key] == last[1].state["train"][key] for key in exact)


def test_resuming_a_finished_run_changes_nothing_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    tiny.run(tmp_path / "run", steps=6)
    before = checkpoint.load(tmp_path / "run" / "checkpoint-6").trainable
    again = tiny.run(tmp_path / "run", steps=6, resume=True)
    assert (again.step, again.status) == (6, "completed")
    assert len(steps_of(tmp_path / "run")) == 6
    longer = tiny.run(tmp_path / "run", steps=9, resume=True)
    assert longer.step == 9
    after = checkpoint.load(tmp_path / "run" / "checkpoint-9").trainable
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert [event["step"] for event in steps_of(tmp_path / "run")] == list(range(1, 10))
    messages = [e["message"] for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "warning"]
    assert "the run now ends at step 9 instead of 6: the learning rate follows the new length from here on" in messages


def test_another_environment_is_said_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.run(tmp_path / "run", steps=2)
    now = environment(tiny.CPU) | {"torch": "9.9"}
    monkeypatch.setattr("halfbyte.train.loop.environment", lambda device: now)
    tiny.run(tmp_path / "run", steps=2, resume=True)
    (warning,) = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e["event"] == "warning"]
    assert "not bit for bit the same" in warning["message"]
    assert "-> 9.9" in warning["message"]


def test_another_run_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    tiny.run(tmp_path / "run", steps=3)
    content = (tmp_path / "run" / "events.jsonl").read_bytes()
    model = tiny.decoder()
    plan = tiny.make_plan(model, steps=5)
    for other, pattern in (
        (replace(plan, identity={"base": "tiny", "data": "other rows"}), "another data"),
        (replace(plan, trainable=dict(list(plan.trainable.items())[1:])), "other trained tensors"),
    ):
        with RunDirectory.resume(tmp_path / "run") as run, pytest.raises(UsageError, match=pattern):
            train(model, other, run)
        assert (tmp_path / "run" / "events.jsonl").read_bytes() == content


def test_the_lock_must_be_held_and_stay(tmp_path: Path) -> None:
    model = tiny.decoder()
    plan = tiny.make_plan(model)
    with pytest.raises(ValueError, match="lock is held"):
        train(model, plan, RunDirectory(tmp_path))

    def steal(event: dict[str, Any]) -> None:
        if event.get("step") == 2:
            run.lock.path.unlink(missing_ok=True)

    run = RunDirectory.create(tmp_path / "run")
    with run, pytest.raises(HalfbyteError, match="taken over"):
        train(model, plan, run, (steal,))


# ---------------------------------------------------------------- the disk


def test_a_disk_too_small_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, nbytes: int, what: str) -> None:
        raise DoesNotFit(f"{what}: no room")

    monkeypatch.setattr("halfbyte.train.loop.require_free_space", full)
    with pytest.raises(DoesNotFit, match="keeping this run's checkpoints"):
        tiny.run(tmp_path / "run")
    assert not (tmp_path / "run" / "events.jsonl").exists()


def test_a_disk_that_fills_up_warns_and_fails_only_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, nbytes: int, what: str) -> None:
        raise DoesNotFit(f"{what} needs more than there is")

    monkeypatch.setattr(checkpoint, "require_free_space", full)
    with pytest.raises(DoesNotFit, match="the last checkpoint could not be written"):
        tiny.run(tmp_path / "run", steps=6, save_steps=2)
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [e["step"] for e in events if e["event"] == "warning"] == [2, 4, 5]
    assert events[-1]["status"] == "failed"
    assert len(steps_of(tmp_path / "run")) == 6


def test_checkpoints_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 100_000, 60))
    monkeypatch.setattr("halfbyte.train.loop.time.monotonic", lambda: float(next(clock)))
    model = tiny.decoder()
    plan, run = fresh(tmp_path / "run", model, steps=9, save_minutes=3.0)
    with run:
        train(model, replace(plan, evaluate=None), run)
    saved = [e["step"] for e in read_events(run.events) if e["event"] == "checkpoint"]
    assert saved == [3, 6, 9]
