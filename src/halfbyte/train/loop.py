"""The training loop: one function, top to bottom.

    train(model, plan, run, listeners) -> TrainResult

It takes a model with `.loss(batch)` and `.train()`, a `TrainPlan` of plain values and callables (see `train.state`),
and a `RunDirectory` whose lock this process holds. What it does is told as events (`train.events`), to the file and to
`listeners`; it prints nothing. If the folder holds checkpoints it goes on from the last whole one, otherwise it starts:
resuming is the same call. `halfbyte.run` composes the plan.

What is exact: the same plan on the same machine kind, thread count and versions gives the same weights, moments and
losses bit for bit, whether or not the run was killed and resumed in between. Rows, dropout and the learning rate are
functions of the step; everything else is in the checkpoint.

A save that finds the disk full is a warning as long as training goes on, and an error at the end.

Where memory runs short the run steps down (`train.budget`) and computes what failed again from its beginning.
"""

import contextlib
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from halfbyte.errors import HalfbyteError, Interrupted, UsageError
from halfbyte.files import require_free_space
from halfbyte.heap import give_back
from halfbyte.optim.adamw import AdamW, clip_factor
from halfbyte.optim.schedule import learning_rate_at
from halfbyte.tensorfile import layout_of, part_of
from halfbyte.train import checkpoint
from halfbyte.train.budget import (
    AS_PLANNED,
    FAILURES,
    Budget,
    Layout,
    OutOfMemory,
    Shortage,
    Watched,
    is_shortage,
    reason_of,
)
from halfbyte.train.events import SCHEMA_VERSION, EventLog, Listener, drop_after
from halfbyte.train.memory import process_memory
from halfbyte.train.run_directory import CONFIG, RunDirectory
from halfbyte.train.signals import StopRequest
from halfbyte.train.state import Stage, TrainPlan, TrainResult, TrainState, environment
from halfbyte.train.update import (
    FIRST_LOSS_SCALE,
    LossScale,
    Model,
    NonFinite,
    Stopped,
    backward,
    update_by_layer,
)

READ_AT_ONCE = 1 << 24
"""Elements of a checkpoint's tensor that are read at once."""


def train(model: Model, plan: TrainPlan, run: RunDirectory, listeners: Iterable[Listener] = ()) -> TrainResult:
    """Train until `plan.total_steps` (or no gain for `early_stopping_patience` evaluations); see the module.

    Raises Interrupted after SIGINT or SIGTERM with everything saved, NonFinite with the rows that broke the numbers,
    DoesNotFit if the disk cannot hold the checkpoints, or memory not even the smallest layout. The random state of
    torch is as before afterwards.
    """
    options, optim = plan.options, plan.optim
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.enter_context(_random_state_kept(plan.device))
        s = stack.enter_context(contextlib.closing(Session(run, plan, listeners)))
        optimizer = stack.enter_context(contextlib.closing(AdamW(plan.trainable, optim, run.path)))
        s.optimizer_bytes = optimizer.memory_nbytes
        budget = Budget(plan.memory, plan.device)
        model = Watched(model, budget)
        state = s.start(optimizer)
        scale = LossScale(state.loss_scale, state.loss_scale_good_updates, plan.loss_scaling)
        try:
            while True:
                plan = s.plan
                try:
                    s.rehearse_if_due(model, optimizer, budget, stop)
                    if plan.evaluation_is_due(state.step) and state.evaluated_step < state.step:
                        s.evaluate(stop, budget)
                    finished = state.step >= plan.total_steps or s.out_of_patience()
                    s.save_if_due(optimizer, budget, finished)
                    if finished:
                        break

                    started, step = time.perf_counter(), state.step + 1
                    batches = [batch.to(plan.device) for batch in plan.batches_for_update(step)]
                    model.train()
                    rate = learning_rate_at(step, plan.total_steps, optim)
                    if optim.by_layer:
                        update = update_by_layer(model, optimizer, batches, options.seed, step, rate, stop, plan.locate)
                    else:
                        update = backward(model, optimizer, batches, options.seed, step, scale, stop, plan.locate)
                        s.gradient_bytes = max(s.gradient_bytes, sum(g.nbytes for g in optimizer.gradients()))
                        budget.make_room()
                        optimizer.step(rate, update.unscale * clip_factor(update.grad_norm, optim.clip_norm))
                except FAILURES as error:
                    s.step_down(error, optimizer, budget)
                    continue
                budget.settle()
                optimizer.zero_grad()
                give_back()  # what one update left between live tensors would be on top of the next one's peak
                scale.grow()
                state.take_scale(scale)
                figures = plan.figures() if plan.figures is not None else {}
                state.add(update, time.perf_counter() - started, figures)
                if step % options.logging_steps == 0 or step == plan.total_steps:
                    s.log_step(rate, update.grad_norm)
        except Stopped:
            optimizer.zero_grad()
            s.save(optimizer, final=True)
            s.end("interrupted")
            raise Interrupted(
                f"stopped by {stop.signal_name} after step {state.step} of {plan.total_steps}; everything is saved: "
                f"go on with `halfbyte resume {run.path}`"
            ) from None
        except HalfbyteError as error:
            s.fail(optimizer, error)
            raise
        replaced = s.load_best_if_asked()
        return s.end("completed" if state.step >= plan.total_steps else "stopped_early", replaced=replaced)


class Session:
    """The loop's dealings with its folder: where to start, what is told, what is saved."""

    def __init__(self, run: RunDirectory, plan: TrainPlan, listeners: Iterable[Listener]) -> None:
        if run.lock.owner is None:
            raise ValueError("train() needs a RunDirectory whose lock is held: RunDirectory.create() or .resume()")
        self.run, self.plan, self.listeners = run, plan, list(listeners)
        self.planned = plan
        self.state = TrainState()
        self.environment = environment(plan.device)
        self.saved_step: int | None = None
        self.last_checkpoint: Path | None = None
        self.last_save = time.monotonic()
        self.log: EventLog | None = None
        self.gradient_bytes = self.optimizer_bytes = 0

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def start(self, optimizer: AdamW) -> TrainState:
        """Restore the last whole checkpoint if there is one, open the log, tell how the run begins."""
        problems: list[str] = []
        found = checkpoint.load_latest(self.run.path, problems.append)
        if found is None:
            self.state.loss_scale = FIRST_LOSS_SCALE if self.plan.loss_scaling else 1.0
            # Those that are kept, the best one beside them, and the one that is written before the oldest goes.
            most = min(self.plan.options.save_total_limit + 2, self.plan.total_steps)
            room = most * checkpoint.bytes_needed(self.plan.trainable, optimizer.planned())
            require_free_space(self.run.path, room, "keeping this run's checkpoints")
        else:
            problems += self._restore(found, optimizer)
        self._rehearsed = found is not None
        self._lay_out(self.state.layout)
        dropped = drop_after(self.run.events, self.state.step)
        self.log = EventLog(self.run.events, self.listeners)
        self.log.emit(
            "start" if found is None else "resume",
            schema_version=SCHEMA_VERSION,
            step=self.state.step,
            total_steps=self.plan.total_steps,
            steps_per_epoch=self.plan.steps_per_epoch,
            total_tokens=self.plan.total_tokens,
            tokens=self.state.tokens,
            seconds=round(self.state.seconds, 3),
            dropped_events=dropped,
            trainable_parameters=sum(p.numel() for p in self.plan.trainable.values()),
            pid=self.run.lock.owner.pid if self.run.lock.owner else None,
            environment=self.environment,
            **self.plan.outlook(),
        )
        for problem in problems:
            self.warn(problem)
        return self.state

    def _restore(self, found: checkpoint.Checkpoint, optimizer: AdamW) -> list[str]:
        """Put a checkpoint into the parameters and the optimizer; returns what the user should know."""
        saved = found.state
        for key in sorted(self.plan.identity.keys() | saved["identity"].keys()):
            before, now = saved["identity"].get(key), self.plan.identity.get(key)
            if before != now:
                raise UsageError(f"{found.path} was trained with another {key} ({before}, now {now}): not the same run")
        load_trainable(self.plan, found)
        optimizer.load_state_dict(found.optimizer)
        self.state = TrainState.from_json(saved["train"])
        self.saved_step, self.last_checkpoint = self.state.step, found.path
        problems = []
        different = [k for k, v in self.environment.items() if saved["environment"].get(k) != v]
        if different:
            changes = ", ".join(f"{k}: {saved['environment'].get(k)} -> {self.environment[k]}" for k in different)
            problems.append(
                f"this is not where the run was started ({changes}): it goes on, but not bit for bit the same"
            )
        if saved["total_steps"] != self.plan.total_steps:
            problems.append(
                f"the run now ends at step {self.plan.total_steps} instead of {saved['total_steps']}: "
                "the learning rate follows the new length from here on"
            )
        return problems

    def _lay_out(self, layout: Layout) -> None:
        """Go on in a layout that takes less than the planned one (or, on resume, took less already)."""
        self.state.layout = layout
        if layout != AS_PLANNED and self.planned.lowered is not None:
            self.plan = self.planned.lowered(self.planned, layout)

    def step_down(self, error: BaseException, optimizer: AdamW, budget: Budget) -> None:
        """After a failed allocation, or work that would not fit: a layout that takes less, and say so.

        Raises `error` itself if it is anything else, and OutOfMemory if nothing is left to lower, with the last
        finished step saved, or if an update broke off when a part of the weights had it already. What is only foretold
        of the machine ends no run that has nothing left to lower.
        """
        if not is_shortage(error):
            raise error
        reason = reason_of(error)
        traceback.clear_frames(error.__traceback__)  # they hold what the work had computed
        if optimizer.updates != self.state.step:
            raise OutOfMemory(
                f"memory ran out in the middle of update {self.state.step + 1} ({reason}), and some weights have it "
                f"already: the last checkpoint counts; free some memory, then `halfbyte resume {self.run.path}`"
            ) from None
        optimizer.zero_grad()
        budget.forget()
        before = self.state.layout
        lower = before.lower(self.planned.lowest, budget.kind) if self.planned.lowered is not None else None
        if lower is None:
            self.save_if_possible(optimizer)
            told = f"memory ran short at step {self.state.step} ({reason}) and nothing is left to lower"
            if isinstance(error, Shortage) and error.foretold:
                budget.ignore_machine()
                self.warn(f"{told}: it goes on all the same, from here until an allocation fails; free some memory")
                return
            more = "" if self.plan.memory is None else f", or raise `memory` in {self.run.path / CONFIG}"
            raise OutOfMemory(
                f"{told}: free some memory{more}; go on from step {self.saved_step or 0} with `halfbyte resume "
                f"{self.run.path}`"
            ) from None
        if lower.recompute and not before.recompute:
            budget.relearn()
        self._lay_out(lower)
        self.warn(f"memory ran short at step {self.state.step} ({reason}): {lower.change_from(before)}")

    def rehearse_if_due(self, model: Model, optimizer: AdamW, budget: Budget, stop: StopRequest) -> None:
        """Once, before the first step of a new run, where the plan asks for it; again in each layout below."""
        if self._rehearsed or self.plan.rehearse is None:
            return
        started = time.perf_counter()
        told = self.plan.rehearse(Stage(self.plan, model, optimizer, budget, self.run.path, stop))
        self._rehearsed = True
        seconds = time.perf_counter() - started
        self.state.other_seconds += seconds
        self.emit("rehearsal", seconds=round(seconds, 3), **told)
        self.run.lock.touch()

    def emit(self, event: str, **fields: object) -> None:
        assert self.log is not None
        self.log.emit(event, step=self.state.step, **fields)

    def warn(self, message: str) -> None:
        self.emit("warning", message=message)

    def log_step(self, learning_rate: float, grad_norm: float) -> None:
        resident, peak = process_memory()
        fields: dict[str, object] = dict(self.state.take_window())
        fields |= {"learning_rate": learning_rate, "grad_norm": grad_norm}
        fields |= {"memory_bytes": resident, "peak_memory_bytes": peak}
        if self.plan.device.type == "cuda":
            fields["device_memory_bytes"] = torch.cuda.max_memory_allocated(self.plan.device)
        self.emit("step", **fields)
        self.run.lock.touch()

    def evaluate(self, stop: StopRequest, budget: Budget) -> None:
        """Evaluate and tell; Stopped if it was stopped on the way."""
        assert self.plan.evaluate is not None
        started = time.perf_counter()
        budget.before("evaluate", getattr(self.plan.evaluate, "tokens", 1))
        metrics = self.plan.evaluate(stop)
        budget.settle()
        if metrics is None:
            raise Stopped
        seconds = time.perf_counter() - started
        self.state.other_seconds += seconds
        best = self.state.take_evaluation(float(metrics["loss"]))
        self.emit("eval", **{**metrics, "seconds": round(seconds, 3), "best": best})
        self.run.lock.touch()

    def out_of_patience(self) -> bool:
        patience = self.plan.options.early_stopping_patience
        return patience is not None and self.state.evaluations_without_gain >= patience

    def save_if_due(self, optimizer: AdamW, budget: Budget, finished: bool) -> None:
        """By steps, by minutes, after the best evaluation so far, and at the end."""
        options, step = self.plan.options, self.state.step
        if step == 0 or step == self.saved_step:
            return
        by_steps = options.save_steps is not None and step % options.save_steps == 0
        minutes = (time.monotonic() - self.last_save) / 60
        by_minutes = options.save_minutes is not None and minutes >= options.save_minutes
        if finished or by_steps or by_minutes or self.state.best_step == step:
            budget.make_room()
            self.save(optimizer, final=finished)

    def save(self, optimizer: AdamW, final: bool) -> None:
        """Write a checkpoint unless this step's is there. Without room, a warning; `final` makes it an error."""
        if self.state.step in (0, self.saved_step):  # before the first step there is nothing that a new run lacks
            return
        assert self.log is not None
        started = time.perf_counter()
        self.log.sync()
        description = {
            "train": self.state.to_json(),
            "total_steps": self.plan.total_steps,
            "identity": dict(self.plan.identity),
            "environment": self.environment,
        }
        try:
            folder = checkpoint.save(
                self.run.path,
                self.state.step,
                self.plan.trainable,
                optimizer.planned(),
                description,
                self.plan.save_extras,
            )
        except HalfbyteError as error:
            if final:
                raise type(error)(f"the last checkpoint could not be written: {error}") from error
            self.warn(f"no checkpoint at step {self.state.step}, training goes on: {error}")
            self.last_save = time.monotonic()
            return
        self.saved_step, self.last_checkpoint, self.last_save = self.state.step, folder, time.monotonic()
        checkpoint.rotate(self.run.path, self.plan.options.save_total_limit, self.state.best_step)
        seconds = time.perf_counter() - started
        self.state.other_seconds += seconds
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        self.emit("checkpoint", seconds=round(seconds, 3), path=folder.name, bytes=size)

    def fail(self, optimizer: AdamW, error: HalfbyteError) -> None:
        """Tell why it ends; where the numbers broke, the weights of the update before are saved first."""
        optimizer.zero_grad()
        if isinstance(error, NonFinite) and error.worth_saving:
            self.save_if_possible(optimizer)
        with contextlib.suppress(HalfbyteError):
            self.end("failed", message=str(error))

    def save_if_possible(self, optimizer: AdamW) -> None:
        """The last finished step, before an end that is already sure."""
        if self.state.step:
            with contextlib.suppress(HalfbyteError, *FAILURES):
                self.save(optimizer, final=False)

    def load_best_if_asked(self) -> bool:
        """`load_best_model_at_end`, or a word if the last weights are not the best ones. Whether others are loaded."""
        best, best_loss = self.state.best_step, self.state.best_eval_loss
        if best is None or best == self.state.step:
            return False
        found = f"the best evaluation was at step {best}, with a loss of {best_loss:.4f}"
        if not self.plan.options.load_best_model_at_end:
            self.warn(f"{found}; the last weights are kept: load_best_model_at_end takes the best")
            return False
        try:
            load_trainable(self.plan, checkpoint.load(checkpoint.folder_of(self.run.path, best)))
        except checkpoint.Damaged as error:
            self.warn(f"{found}, but its checkpoint cannot be used and the last weights are kept: {error}")
            return False
        self.warn(f"{found}: these are the weights that the run ends with")
        return True

    def end(self, status: str, message: str | None = None, replaced: bool = False) -> TrainResult:
        """The last event, and what came out."""
        state, (_, peak) = self.state, process_memory()
        result = TrainResult(
            status=status,
            step=state.step,
            total_steps=self.plan.total_steps,
            seconds=state.seconds + state.other_seconds,
            update_seconds=state.seconds,
            tokens=state.tokens,
            supervised_tokens=state.supervised_tokens,
            tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
            train_loss=state.loss_sum / state.terms if state.terms else None,
            final_loss=state.last_loss,
            eval_loss=state.eval_loss,
            best_step=state.best_step,
            best_eval_loss=state.best_eval_loss,
            peak_memory_bytes=peak,
            checkpoint=self.last_checkpoint,
            layout=state.layout,
            evaluated=state.evaluated_step == state.step and not replaced,
            memory_by_component={"gradients": self.gradient_bytes, "optimizer": self.optimizer_bytes},
        )
        fields = {key: value for key, value in result.to_json().items() if key != "step"}
        self.emit("end", **fields, **({"message": message} if message else {}))
        return result


def load_trainable(plan: TrainPlan, found: checkpoint.Checkpoint) -> None:
    """Copy a checkpoint's tensors into the parameters; another set or shape of tensors is not this run."""
    mine, theirs = plan.trainable, found.trainable
    different = sorted(mine.keys() ^ theirs.keys())
    different += [n for n in mine.keys() & theirs.keys() if (mine[n].shape, mine[n].dtype) != layout_of(theirs, n)]
    if different:
        raise UsageError(
            f"{found.path} has other trained tensors than this run ({len(different)} differ, {different[0]} first): "
            "resume with the model and the adapter options it was started with"
        )
    with torch.no_grad():
        for name, parameter in mine.items():
            flat = parameter.detach().view(-1)
            for start in range(0, flat.numel(), READ_AT_ONCE):  # a large embedding is not held twice
                stop = min(start + READ_AT_ONCE, flat.numel())
                flat[start:stop] = part_of(theirs, name, start, stop)


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """The loop seeds torch's global generators; whoever called it gets them back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
