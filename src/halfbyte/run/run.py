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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte import ops
from halfbyte.adapters import AttachReport, attach, load_adapter
from halfbyte.adapters.lora import LoraOptions, report
from halfbyte.adapters.peft_io import CONFIG as ADAPTER_CONFIG
from halfbyte.data import Prepared, collate, plan_micro_batches
from halfbyte.data.options import sources_of
from halfbyte.errors import HalfbyteError, Interrupted, UsageError
from halfbyte.evaluate.classify import evaluate_classifier
from halfbyte.evaluate.evaluate import BaseAndTuned, EvaluateResult, against, evaluate, evaluate_base_and_tuned
from halfbyte.files import write_atomic
from halfbyte.heap import give_back
from halfbyte.linear import segments
from halfbyte.models.classifier import Classifier, HeadOptions
from halfbyte.models.load import LoadedModel, load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.shifted_source import LinearBase, own_blocks
from halfbyte.models.source import ModelSource
from halfbyte.ops.pool import pool
from halfbyte.optim.options import OptimOptions
from halfbyte.plan.recommend import check_fits
from halfbyte.quant.options import QuantOptions
from halfbyte.run import folder, outputs, planning, preference, tasks
from halfbyte.run.config import RunConfig, to_yaml
from halfbyte.run.continued import with_adapter
from halfbyte.run.planning import Survey
from halfbyte.train.checkpoint import Damaged, list_checkpoints, step_of, verify
from halfbyte.train.dpo import lacking, read_references, references
from halfbyte.train.evaluation import evaluation_loss
from halfbyte.train.feed import Feed
from halfbyte.train.loop import train
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
    if config.output_dir is not None:
        require_output(config, config.output_dir, overwrite)
    require_sinks(config.report_to)
    found = planning.survey(with_adapter(config))
    tell_prepared(found, on_event)
    plan = planning.make(found)
    if plan is not None:
        check_fits(plan)
    resolved = planning.resolve(found, plan)
    assert resolved.output_dir is not None
    require_weights(found, resolved)
    require_output(resolved, resolved.output_dir, overwrite)
    record = folder.record_of(found)
    on_event({"event": "planned", "config": resolved, "plan": plan, "record": record})
    with RunDirectory.create(resolved.output_dir, overwrite) as directory, _discarded_unless_begun(directory):
        write_atomic(directory.path / CONFIG, to_yaml(resolved, record))
        if plan is not None:
            write_atomic(directory.path / PLAN, json.dumps(plan.as_dict(), indent=2) + "\n")
        return _interruptible(directory, partial(_train, directory, resolved, record, found, on_event))


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
    """Ctrl-C outside of the loop (which has its own handling): the folder is whole, and resume begins again."""
    try:
        return work()
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; go on with `halfbyte resume {directory.path}`") from None


def _train(directory: RunDirectory, config: RunConfig, record: Event, found: Survey, on_event: Listener) -> RunResult:
    """Everything between the first file of a run and its last."""
    clock = time.perf_counter
    started = clock()
    prepared = found.prepared
    assert prepared is not None
    begun = _begun(directory.path, config)
    if prepared.pairs and begun is not None:
        _complete_reference(directory.path, config, found, on_event)
    loaded = load(config, found.source, tasks.head_of(config, prepared))
    trainable, attached = make_trainable(loaded, config, begun)
    on_event(
        {
            "event": "loaded",
            "seconds": clock() - started,
            "trainable_parameters": attached.trainable_parameters,
            "total_parameters": attached.total_parameters,
            "formats": dict(Counter(s.weight.format for s in segments(loaded.model).values()).most_common()),
            "backend": ops.backend().name,
            "backend_reason": ops.backend().reason,
        }
    )
    base = _base_of_full(directory.path, config, loaded, prepared)
    plan = train_plan(config, loaded, trainable, prepared, planning.identity(found))
    model: Any = loaded.model
    reference: Tensor | None = None
    if prepared.pairs:
        feed = feed_of(config, prepared)
        model, plan, reference = preference.paired(directory.path, config, loaded, prepared, plan, feed, on_event)
    sinks = open_sinks(config.report_to, directory.path, config.model_dump(mode="json"))
    before = clock()
    try:
        trained = train(model, plan, directory, [on_event, *sinks])
    finally:
        for sink in sinks:
            sink.close()
    after = clock()
    if prepared.pairs:
        scores = None if reference is None else preference.scores(config, loaded, prepared, reference)
    else:
        scores = _scores(config, loaded, prepared, base)
    beside = (before - started) + (clock() - after)
    pool.clear()  # activations are done with: the tokenizer's files are made of as much garbage as a small model takes
    give_back()
    result = outputs.write(directory.path, config, record, found, loaded, trained, scores, beside)
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
) -> TrainPlan:
    """The loop's plan: rows of a step, steps in all, how to evaluate, what else to save."""
    options, model = config.pick(TrainOptions), loaded.model
    feed = feed_of(config, prepared)
    per_epoch, total = count_steps(len(prepared.train), feed.rows_per_update, options)
    device = torch.device(config.device)
    model.checkpointing = bool(config.gradient_checkpointing)  # type: ignore[assignment]
    pieces = plan_micro_batches([len(e) for e in prepared.eval], 1, True, feed.max_tokens)
    held_out = [collate([prepared.eval[i] for i in piece]) for piece in pieces]
    extras = None if config.method == "full" else partial(outputs.write_adapter, config=config, loaded=loaded)
    return TrainPlan(
        options=options,
        optim=config.pick(OptimOptions),
        total_steps=total,
        steps_per_epoch=per_epoch,
        batches_for_update=feed.batches_for_update,
        trainable=trainable,
        evaluate=partial(evaluation_loss, model, held_out, device) if held_out else None,  # type: ignore[arg-type]
        locate=feed.locate,
        save_extras=extras,
        identity=same,
        total_tokens=feed.tokens(total),
        device=device,
        loss_scaling=config.dtype == "float16",
    )


def feed_of(config: RunConfig, prepared: Prepared) -> Feed:
    """The rows of every update, in micro-batches."""
    micro_batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    assert micro_batch is not None
    assert accumulation is not None
    max_tokens = micro_batch * max(map(len, prepared.train))
    rows = micro_batch * accumulation
    return Feed(prepared.train, prepared.sampler(config.seed), rows, micro_batch, config.packing, max_tokens)


def _base_of_full(path: Path, config: RunConfig, loaded: LoadedModel, prepared: Prepared) -> EvaluateResult | None:
    """Full fine-tuning changes the base, so it is measured before the first step, and kept for a resumed run."""
    if config.method != "full" or not prepared.eval or config.task == tasks.CLASSIFICATION:
        return None  # a classifier's base has no head, and is compared with always the same answer
    kept = folder.read_base(path)
    if kept is None:
        kept = evaluate(loaded.model, loaded.tokenizer, prepared.eval, labels=prepared.labels)  # type: ignore[arg-type]
        folder.write_base(path, kept)
        pool.clear()  # what evaluation needed is of other sizes than what training will
        give_back()
    return kept


def _scores(
    config: RunConfig, loaded: LoadedModel, prepared: Prepared, base: EvaluateResult | None
) -> BaseAndTuned | None:
    """The loss (and the accuracy of labels) on the held-out rows, base against tuned; None without held-out rows."""
    if not prepared.eval:
        return None
    model, tokenizer, rows, labels = loaded.model, loaded.tokenizer, prepared.eval, prepared.labels
    if isinstance(model, Classifier):
        return evaluate_classifier(model, rows)
    if base is not None:
        return against(base, evaluate(model, tokenizer, rows, labels=labels))  # type: ignore[arg-type]
    return evaluate_base_and_tuned(model, tokenizer, rows, labels=labels)  # type: ignore[arg-type]
