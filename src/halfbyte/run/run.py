"""A run from a config to a result: the seam that everything above calls.

    run(config)      survey → plan → resolve → run.yaml, plan.json → load → train → base against tuned → save
    resume(folder)   the same, from run.yaml and the last whole checkpoint; another base, data or template is refused

What is planned is on the disk before the first step, what happened is there after the last. Both print nothing: they
tell `on_event`, first dictionaries of their own (prepared, planned, loaded), then the events of `train.events`, then
`finished` with result.json's content.
"""

import contextlib
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.adapters import AttachReport, attach, load_adapter
from halfbyte.adapters.lora import LoraOptions, report
from halfbyte.adapters.peft_io import CONFIG as ADAPTER_CONFIG
from halfbyte.data import Example, Prepared
from halfbyte.data.options import sources_of
from halfbyte.errors import DoesNotFit, HalfbyteError, Interrupted, UsageError
from halfbyte.evaluate.classify import evaluate_classifier
from halfbyte.evaluate.evaluate import (
    BaseAndTuned,
    EvaluateOptions,
    EvaluateResult,
    RowResult,
    against,
    evaluate,
    evaluate_base_and_tuned,
)
from halfbyte.evaluate.preference import score_pairs
from halfbyte.evaluate.session import inference
from halfbyte.files import write_atomic
from halfbyte.linear import segments
from halfbyte.models.classifier import Classifier, HeadOptions
from halfbyte.models.load import LoadedModel, load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.shifted_source import LinearBase, own_blocks
from halfbyte.models.source import ModelSource
from halfbyte.ops.pool import release
from halfbyte.optim.options import OptimOptions
from halfbyte.plan.hardware import Rates
from halfbyte.plan.memory import EVALUATION_TOKENS
from halfbyte.plan.recommend import Plan, check_fits
from halfbyte.plan.time import corrected
from halfbyte.quant.options import QuantOptions
from halfbyte.run import components, folder, learning, outputs, planning, preference, rehearsal, tasks
from halfbyte.run.config import RunConfig, to_yaml
from halfbyte.run.continued import with_adapter
from halfbyte.run.held_out import HeldOut
from halfbyte.run.planning import Survey
from halfbyte.run.rehearsal import Evaluation, Measured, Rehearsal
from halfbyte.train.budget import FAILURES, Layout, in_chunks, is_shortage, reason_of
from halfbyte.train.checkpoint import Damaged, list_checkpoints, step_of, verify
from halfbyte.train.dpo import lacking, read_references, references
from halfbyte.train.evaluation import InChunks
from halfbyte.train.feed import Feed
from halfbyte.train.loop import train
from halfbyte.train.memory import process_memory
from halfbyte.train.options import TrainOptions, count_steps
from halfbyte.train.run_directory import CONFIG, PLAN, RESULT, RunDirectory, is_run
from halfbyte.train.sinks import open_sinks
from halfbyte.train.state import TrainPlan

Event = dict[str, Any]
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener of those who do not listen."""


@dataclass(frozen=True)
class RunResult:
    """What a run left behind. `result` is result.json's content."""

    path: Path
    config: RunConfig
    result: dict[str, Any]

    @property
    def train_loss(self) -> float | None:
        return self.result["train_loss"]  # type: ignore[no-any-return]

    @property
    def eval_loss(self) -> float | None:
        return self.result["eval_loss"]  # type: ignore[no-any-return]


def run(config: RunConfig, on_event: Listener = silent, overwrite: bool = False) -> RunResult:
    """Train as `config` says. UsageError for what is wrong with it, DoesNotFit before anything is written.

    overwrite   replace a run that is in the folder already; otherwise that is a UsageError
    """
    alone = learning.untouched()
    if config.output_dir is not None:
        require_output(config, config.output_dir, overwrite)
    require_sinks(config.report_to)
    found = planning.survey(with_adapter(config))
    tell_prepared(found, on_event)
    plan = planning.make(found)
    check_fits(plan)
    resolved = planning.resolve(found, plan)
    assert resolved.output_dir is not None
    require_weights(found, resolved)
    require_output(resolved, resolved.output_dir, overwrite)
    record = folder.record_of(found)
    on_event({"event": "planned", "config": resolved, "plan": plan, "record": record})
    with RunDirectory.create(resolved.output_dir, overwrite) as directory, _discarded_unless_begun(directory):
        write_atomic(directory.path / CONFIG, to_yaml(resolved, record))
        write_atomic(directory.path / PLAN, json.dumps(plan.as_dict(), indent=2) + "\n")
        return _interruptible(directory, partial(_train, directory, resolved, record, found, on_event, plan, alone))


def resume(path: Path, on_event: Listener = silent, max_steps: int | None = None) -> RunResult:
    """Continue the run in `path`; with `max_steps`, up to that step (also a run that is complete).

    A run that is complete and not extended is returned as it is. UsageError if base, data or template are not the ones
    that it was started with.
    """
    config, record = folder.read_config(path)
    if max_steps is not None:
        done = max((step_of(checkpoint) for checkpoint in list_checkpoints(path)), default=0)
        if max_steps <= done:
            raise UsageError(f"{path} is already at step {done}: --max-steps must be more than that, not {max_steps}")
        config = config.replace(max_steps=max_steps)
    elif (path / RESULT).is_file():
        return RunResult(path, config, folder.read_json(path / RESULT))
    config = config.replace(output_dir=path)
    found = planning.survey(config, adapter=_begun(path, config))
    tell_prepared(found, on_event)
    now = folder.record_of(found)
    folder.require_same(path, record, now)
    with RunDirectory.resume(path) as directory:
        write_atomic(path / CONFIG, to_yaml(config, record))
        (path / RESULT).unlink(missing_ok=True)
        return _interruptible(directory, partial(_train, directory, config, record, found, on_event))


def require_sinks(names: Sequence[str]) -> None:
    """UsageError for a dashboard whose package is missing, before a run's folder is touched."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"report_to: {name} is not installed: pip install 'halfbyte[track]', or pip install {name}"
            )


def require_weights(found: Survey, config: RunConfig) -> None:
    """UsageError where initial values need the weights before quantization, and the model's file has none."""
    needed = config.init_lora_weights == "loftq" or config.pick(LoraOptions).shifts_base
    if needed and config.method == "qlora" and not config.requantize and found.source.prequantized_bytes():
        raise UsageError(own_blocks(found.source.name))


def require_output(config: RunConfig, path: Path, overwrite: bool) -> None:
    """UsageError where a run is in `path` already, or `overwrite` would delete there what this run reads."""
    if not overwrite:
        if is_run(path):
            raise UsageError(existing(path))
        return
    named = {name: getattr(config, name) for name in ("model", "adapter_path", "chat_template")}
    rows = {name: getattr(config, name) for name in ("data", "eval_data")}
    inputs = [(name, value) for name, value in named.items() if value is not None]
    inputs += [(name, source.path) for name, value in rows.items() for source in sources_of(value)]
    for name, value in inputs:
        given = Path(value).expanduser()
        if given.exists() and given.resolve().is_relative_to(path.resolve()):
            raise UsageError(f"--overwrite would delete {given}, which is this run's {name}: choose another output_dir")


def existing(path: Path) -> str:
    return (
        f"{path} already holds a run: continue it with `halfbyte resume {path}`, replace it with --overwrite, or "
        "choose another --output-dir"
    )


def tell_prepared(found: Survey, on_event: Listener) -> None:
    assert found.prepared is not None
    on_event({"event": "prepared", "audit": found.prepared.audit, "fingerprint": found.prepared.fingerprint})


@contextmanager
def _discarded_unless_begun(directory: RunDirectory) -> Iterator[None]:
    """A new run that is refused before its first event leaves nothing: the corrected command works as it is."""
    try:
        yield
    except Interrupted:
        raise
    except HalfbyteError:
        if not directory.events.exists():
            directory.discard()
        raise


def _interruptible(directory: RunDirectory, work: Callable[[], RunResult]) -> RunResult:
    """Ctrl-C, or no memory, outside of the loop (which has its own handling): the folder is whole: resume goes on."""
    try:
        return work()
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; go on with `halfbyte resume {directory.path}`") from None
    except FAILURES as error:
        if not is_shortage(error):
            raise
        onward = f"go on with `halfbyte resume {directory.path}`" if directory.events.exists() else "try again"
        raise DoesNotFit(f"memory ran out ({reason_of(error)}): free some memory, then {onward}") from None


def _train(
    directory: RunDirectory,
    config: RunConfig,
    record: Event,
    found: Survey,
    on_event: Listener,
    planned: Plan | None = None,
    alone: bool = False,
) -> RunResult:
    """Everything between the first file of a run and its last.

    planned, alone  of a new run: its plan, and whether nothing but it has had memory in this process
    """
    clock = time.perf_counter
    started = clock()
    prepared = found.prepared
    assert prepared is not None
    begun = _begun(directory.path, config)
    if prepared.pairs and begun is not None:
        _complete_reference(directory.path, config, found, on_event)
    release()  # preparing the rows leaves garbage, which the model's memory will be made of
    runtime, _ = process_memory()
    loaded = load(config, found.source, tasks.head_of(config, prepared))
    trainable, attached = make_trainable(loaded, config, begun)
    loading = clock() - started
    weights = components.of_model(loaded.model, trainable, config.method == "full")
    on_event(
        {
            "event": "loaded",
            "seconds": loading,
            "trainable_parameters": attached.trainable_parameters,
            "total_parameters": attached.total_parameters,
            "formats": dict(Counter(s.weight.format for s in segments(loaded.model).values()).most_common()),
            "backend": ops.backend().name,
            "backend_reason": ops.backend().reason,
        }
    )
    tokens = evaluation_tokens(config)

    def tell(message: str) -> None:
        on_event({"event": "warning", "message": message})

    base = in_chunks(partial(_base_of_full, directory.path, config, loaded, prepared), tokens, tell)
    held_out = HeldOut(loaded.model, prepared.eval, torch.device(config.device))
    plan = train_plan(config, loaded, trainable, prepared, planning.identity(found), held_out)
    if rehearsal.is_due(config, planned):
        correct = partial(_correct_plan, directory.path, found, planned, loaded, loading)
        plan = replace(plan, rehearse=rehearsal_of(config, held_out, prepared, plan.total_steps, correct))
    model: Any = loaded.model
    reference: Tensor | None = None
    if prepared.pairs:
        feed = feed_of(config, prepared)
        model, plan, reference = preference.paired(directory.path, config, loaded, prepared, plan, feed, on_event)
    sinks = open_sinks(config.report_to, directory.path, config.model_dump(mode="json"))
    plan = replace(plan, **learning.outlook(directory.path, config, prepared))
    before = clock()
    try:
        trained = train(model, plan, directory, [on_event, *sinks])
    finally:
        for sink in sinks:
            sink.close()
    after = clock()
    if prepared.pairs:
        score = partial(preference.scores, config, loaded, prepared, reference) if reference is not None else None
    else:
        rows = held_out.of_the_end(trained)
        score = partial(_scores, loaded, prepared, base, rows) if prepared.eval else None
    tokens = max(1, tokens >> trained.layout.evaluation_halvings)
    release()  # what training needed is of other sizes than what the last evaluation will
    scores = None if score is None else in_chunks(score, tokens, tell)
    beside = {"load": loading, "evaluate": (before - started - loading) + (clock() - after)}
    release()  # activations are done with: the tokenizer's files are made of as much garbage as a small model takes
    held = components.measured(runtime, weights, trained, plan.device) if alone else {}
    result = outputs.write(directory.path, config, record, found, loaded, trained, scores, beside, held)
    if (problem := learning.remember(directory.path, config, found, result, alone)) is not None:
        on_event({"event": "warning", "step": trained.step, "message": problem})
    on_event({"event": "finished", "path": directory.path, "result": result})
    return RunResult(directory.path, config, result)


def load(config: RunConfig, source: ModelSource | None = None, head: HeadOptions | None = None) -> LoadedModel:
    """The base model as the run's method holds it: quantized linears for QLoRA, the compute dtype for the others."""
    return load_model(config.pick(ModelOptions), quant_of(config), source=source, head=head)


def quant_of(config: RunConfig) -> QuantOptions | None:
    """How the run's method quantizes the base; None: it does not."""
    return config.pick(QuantOptions) if config.method == "qlora" else None


def make_trainable(
    loaded: LoadedModel, config: RunConfig, begun: Path | None = None
) -> tuple[dict[str, nn.Parameter], AttachReport]:
    """What the optimizer moves, by name: the adapters and `modules_to_save`, or under `full` every tensor.

    begun  the adapter of a checkpoint of this run, as `_begun` finds it. Where initial values had shifted the base,
           the shift is taken from this file: trained factors no longer say what it was
    """
    model = loaded.model
    if config.method == "full":
        return _unfreeze(model, config)
    options, base = config.pick(LoraOptions), LinearBase(loaded, quant_of(config))
    path = begun or config.adapter_path
    if path is None:
        attached = attach(model, options, config.seed, base)
    else:
        load_adapter(model, Path(path), base)
        adapters = {name: s.adapter for name, s in segments(model).items() if s.adapter is not None}
        for adapter in adapters.values():
            adapter.dropout = config.lora_dropout
        attached = report(model, tuple(adapters))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}, attached


def _unfreeze(model: nn.Module, config: RunConfig) -> tuple[dict[str, nn.Parameter], AttachReport]:
    if not hasattr(model, "unfreeze"):
        raise UsageError("method full is built for the decoder's families only: use lora or qlora with this model")
    parameters: dict[str, nn.Parameter] = model.unfreeze()  # type: ignore[operator]
    count = sum(p.numel() for p in parameters.values())
    return parameters, AttachReport((), count, count)


def _begun(run: Path, config: RunConfig) -> Path | None:
    """The newest whole checkpoint of a run, where its adapter says what the base or the original adapter was.

    None where nothing but the config is needed for that. A damaged checkpoint is passed over, as the loop will.
    """
    if config.method == "full" or not (config.pick(LoraOptions).shifts_base or config.adapter_path is not None):
        return None
    for checkpoint in reversed(list_checkpoints(run)):
        with contextlib.suppress(Damaged):
            verify(checkpoint)
            if (checkpoint / ADAPTER_CONFIG).is_file():
                return checkpoint
    return None


def _complete_reference(path: Path, config: RunConfig, found: Survey, on_event: Listener) -> None:
    """Ask the model as the run began about the pairs that its reference lacks (more steps, a lost file).

    The model that a resumed run goes on with has the last checkpoint's adapter, so this is another one, let go before
    that is loaded. UsageError where the adapter that the run began with is gone.
    """
    prepared = found.prepared
    assert prepared is not None
    feed = feed_of(config, prepared)
    _, steps = count_steps(len(prepared.train), feed.rows_per_update, config.pick(TrainOptions))
    rows, same = feed.rows_of(steps), planning.identity(found)
    if not any(lacking(read_references(path, same, prepared.train, prepared.eval), rows)):
        return
    began = load(config, found.source)
    make_trainable(began, config)
    references(
        path, began.model, prepared.train, prepared.eval, rows, feed.max_tokens, same, torch.device(config.device),
        on_event,
    )  # fmt: skip


def train_plan(
    config: RunConfig,
    loaded: LoadedModel,
    trainable: dict[str, nn.Parameter],
    prepared: Prepared,
    same: dict[str, str],
    held_out: HeldOut,
) -> TrainPlan:
    """The loop's plan: rows of a step, steps in all, how to evaluate, what else to save."""
    options, model = config.pick(TrainOptions), loaded.model
    feed = feed_of(config, prepared)
    per_epoch, total = count_steps(len(prepared.train), feed.rows_per_update, options)
    device = torch.device(config.device)
    model.checkpointing = bool(config.gradient_checkpointing)  # type: ignore[assignment]
    tokens = min(feed.max_tokens, evaluation_tokens(config))
    extras = None if config.method == "full" else partial(outputs.write_adapter, config=config, loaded=loaded)
    return TrainPlan(
        options=options,
        optim=config.pick(OptimOptions),
        total_steps=total,
        steps_per_epoch=per_epoch,
        batches_for_update=feed.batches_for_update,
        trainable=trainable,
        evaluate=InChunks(held_out.measure, tokens) if prepared.eval else None,
        locate=feed.locate,
        save_extras=extras,
        identity=same,
        total_tokens=feed.tokens(total),
        device=device,
        loss_scaling=config.dtype == "float16",
        memory=config.memory,
        lowered=partial(_lowered, model, feed),
        lowest=_lowest(config, model, feed, max(map(len, prepared.eval), default=1)),
    )


def _lowest(config: RunConfig, model: nn.Module, feed: Feed, longest: int) -> Layout:
    """How far a run can step down: rows one by one, recomputed activations, held-out rows one by one.

    longest     tokens of a held-out row
    """
    tokens = max(feed.max_tokens, evaluation_tokens(config))  # of all evaluations, the rehearsal's and the last one too
    chunks = max(1, tokens // longest).bit_length() - 1
    recompute = not config.gradient_checkpointing and _can_recompute(model)
    return Layout(0 if config.by_layer else feed.halvings, recompute, chunks)


def _can_recompute(model: Any) -> bool:
    """Whether the architecture can; some that the fallback serves cannot."""
    before = model.checkpointing
    try:
        model.checkpointing = True
    except UsageError:
        return False
    model.checkpointing = before
    return True


def _lowered(model: Any, feed: Feed, plan: TrainPlan, layout: Layout) -> TrainPlan:
    """`plan` in a layout that takes less memory; the updates are the same."""
    cut = feed.halved(layout.halvings)
    if layout.recompute:
        model.checkpointing = True
    evaluate, rehearse = plan.evaluate, plan.rehearse
    if isinstance(evaluate, InChunks):
        evaluate = evaluate.halved(layout.evaluation_halvings)
    if isinstance(rehearse, Rehearsal):
        rehearse = rehearse.lowered(cut, layout.evaluation_halvings)
    return replace(plan, batches_for_update=cut.batches_for_update, evaluate=evaluate, rehearse=rehearse)


def evaluation_tokens(config: RunConfig) -> int:
    """Tokens of held-out rows in one forward pass, as planned."""
    return config.eval_batch_tokens or EVALUATION_TOKENS


def rehearsal_of(
    config: RunConfig, held_out: HeldOut, prepared: Prepared, steps: int, tell: Callable[[Measured], Event | None]
) -> Rehearsal:
    """What a run tries before its first step."""

    def measure(rows: Sequence[Example], tokens: int) -> object:
        if prepared.pairs:
            with inference(held_out.model):
                return score_pairs(held_out.model, rows, tokens, held_out.device)
        return held_out.of_some(rows, tokens)

    evaluation = Evaluation(prepared.eval, evaluation_tokens(config), measure) if prepared.eval else None
    return Rehearsal(feed_of(config, prepared), steps, evaluation, tell)


def _correct_plan(
    path: Path, found: Survey, plan: Plan | None, loaded: LoadedModel, loading: float, measured: Measured
) -> Event | None:
    """Write plan.json anew, with the seconds that loading and the probe of this very run took or lead to; the memory
    stays the plan's.

    Returns them for the time left, as fields of the rehearsal's event.
    """
    if plan is None or found.spec is None:
        return None
    job = replace(plan.chosen.job, checkpointing=bool(loaded.model.checkpointing))
    seconds = corrected(
        found.spec, job, Rates(**plan.rates), plan.chosen.seconds, measured.probes, measured.counts,
        measured.update_seconds, measured.evaluation,
    )  # fmt: skip
    before = plan.as_dict()
    better = plan.corrected(seconds | {"load": loading, "rehearsal": measured.seconds}).as_dict() | {
        "probed": True,
        "before_probe": {name: before[name] for name in ("seconds", "seconds_by_phase")},
    }
    write_atomic(path / PLAN, json.dumps(better, indent=2) + "\n")
    return {"predicted": learning.predicted(better)}


def feed_of(config: RunConfig, prepared: Prepared) -> Feed:
    """The rows of every update, in micro-batches."""
    micro_batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    assert micro_batch is not None
    assert accumulation is not None
    max_tokens = micro_batch * max(map(len, prepared.train))
    rows = micro_batch * accumulation
    return Feed(prepared.train, prepared.sampler(config.seed), rows, micro_batch, config.packing, max_tokens)


def _base_of_full(
    path: Path, config: RunConfig, loaded: LoadedModel, prepared: Prepared, tokens: int
) -> EvaluateResult | None:
    """Full fine-tuning changes the base, so it is measured before the first step, and kept for a resumed run."""
    if config.method != "full" or not prepared.eval or config.task == tasks.CLASSIFICATION:
        return None  # a classifier's base has no head, and is compared with always the same answer
    kept = folder.read_base(path)
    if kept is None:
        kept = evaluate(loaded.model, loaded.tokenizer, prepared.eval, _in_batches(tokens), labels=prepared.labels)  # type: ignore[arg-type]
        folder.write_base(path, kept)
        release()  # what evaluation needed is of other sizes than what training will
    return kept


def _in_batches(tokens: int) -> EvaluateOptions:
    """Forward passes of so many tokens; labels are scored after fewer prompts at once where that is few."""
    usual = EvaluateOptions()
    share = usual.eval_batch_size * tokens // usual.eval_batch_tokens
    return EvaluateOptions(eval_batch_tokens=tokens, eval_batch_size=max(1, min(usual.eval_batch_size, share)))


def _scores(
    loaded: LoadedModel,
    prepared: Prepared,
    base: EvaluateResult | None,
    losses: Sequence[RowResult] | None,
    tokens: int,
) -> BaseAndTuned:
    """The loss (and the accuracy of labels) on the held-out rows, `tokens` of them at once, base against tuned.

    losses  of the tuned model by row, where the loop's last evaluation found them
    """
    model: Any = loaded.model
    rows, labels, options = prepared.eval, prepared.labels, _in_batches(tokens)
    if isinstance(model, Classifier):
        return evaluate_classifier(model, rows, options)
    if base is not None:
        return against(base, evaluate(model, loaded.tokenizer, rows, options, labels=labels, losses=losses))
    return evaluate_base_and_tuned(model, loaded.tokenizer, rows, options, labels=labels, tuned_losses=losses)
