"""What a user points at when they say `evaluate`, `generate`, `chat` or `merge`: a run, an adapter, or a model.

runs/2026-11-22-gemma-qlora     a run: its base as it was held in training, with its adapter (or its weights)
an adapter's folder             PEFT's files; the base is the one that they name, or `base`
anything else                   a model: a folder, a Hub id, a GGUF file
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from halfbyte.adapters import disabled, load_adapter, read_adapter_config
from halfbyte.adapters.heads import is_classifier
from halfbyte.adapters.peft_io import CONFIG as ADAPTER_CONFIG
from halfbyte.data import ChatTemplate, Encoder, Example, render_prompt, resolve_template
from halfbyte.errors import UsageError
from halfbyte.evaluate.chat import ChatSession
from halfbyte.evaluate.classify import Classified, Texts, classify, evaluate_classifier
from halfbyte.evaluate.evaluate import (
    BaseAndTuned,
    EvaluateOptions,
    EvaluateResult,
    Progress,
    evaluate,
    evaluate_base_and_tuned,
)
from halfbyte.evaluate.evaluate import against as pair
from halfbyte.evaluate.generate import Generation, end_ids, generate_batch
from halfbyte.evaluate.preference import DpoOptions, evaluate_preferences, score_pairs
from halfbyte.evaluate.rows_file import EvalRow, losses_of
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.evaluate.session import inference
from halfbyte.export.deltas import WeightedAdapter
from halfbyte.export.merge import MergeOptions, MergeReport, merge
from halfbyte.export.score import MAX_FALLBACK_TOKENS, MAX_TOKENS, HeldOut, choose_rows
from halfbyte.models.classifier import Classifier
from halfbyte.models.load import LoadedModel, load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.seq2seq import Seq2Seq
from halfbyte.models.shifted_source import LinearBase
from halfbyte.models.source import ModelSource, open_source
from halfbyte.quant.options import QuantOptions
from halfbyte.run import folder, planning, tasks
from halfbyte.run.config import QUANTIZED_ALONE, RunConfig, load_config, translate
from halfbyte.run.continued import adapter_folder
from halfbyte.run.outputs import TEMPLATE
from halfbyte.train.checkpoint import list_checkpoints
from halfbyte.train.dpo import read_references
from halfbyte.train.run_directory import CONFIG, RESULT
from halfbyte.yamlfile import Entry


@dataclass(frozen=True)
class Target:
    """Where a model is, before anything is loaded.

    config    how to load the base (its method decides whether it is quantized) and the rows
    adapter   a PEFT folder to put on it, or None
    run       the run's folder, or None
    asked     fields of the config that the user gave

    UsageError for an adapter with method full.
    """

    config: RunConfig
    adapter: Path | None
    run: Path | None
    asked: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.adapter is not None and self.config.method == "full":
            raise UsageError(
                f"{self.adapter} is an adapter, and method full has none: leave --method out, or give lora or qlora"
            )

    def opened_with(self, source: ModelSource) -> "Target":
        """The same with the task that its model is for, where that was open."""
        return replace(self, config=tasks.with_task(self.config, source))

    @property
    def quant(self) -> QuantOptions | None:
        """How the base is quantized; None: held in the compute dtype."""
        return self.config.pick(QuantOptions) if self.config.method == "qlora" else None


@dataclass(frozen=True)
class Opened:
    """A loaded target: model with adapter, tokenizer, template, and the ids that end an answer."""

    target: Target
    loaded: LoadedModel
    encoder: Encoder
    template: ChatTemplate
    end_ids: frozenset[int]

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def raw(self) -> bool:
        """Whether a prompt is text to continue: as the run's rows were, or the tokenizer knows no conversations."""
        if self.target.run is not None:
            _, record = folder.read_config(self.target.run)
            return record.get("chat_template", {}).get("name") is None
        return not getattr(self.loaded.tokenizer, "chat_template", None)

    @property
    def tuned(self) -> bool:
        """Whether there is an adapter, so that base and tuned can be told apart."""
        return self.target.adapter is not None


def find(name: str, adapter: str | None = None, **changes: Any) -> Target:
    """Tell what `name` is. `changes` are config fields that the user gave (dtype, device, method, …), in any spelling
    that a config may have; `adapter_path` among them is the adapter."""
    path = Path(name).expanduser()
    entries = translate({key: Entry(value, "argument") for key, value in changes.items()})
    changes = {key: entry.value for key, entry in entries.items()}
    asked = frozenset(changes)
    also = changes.pop("adapter_path", None)
    if None not in (also, adapter) and also != adapter:
        raise UsageError(f"adapter_path is {also}, and the adapter {adapter}: give one of them")
    adapter = adapter or also
    if (path / CONFIG).is_file():
        return _of_run(path, adapter, changes)
    if (path / ADAPTER_CONFIG).is_file():
        if adapter is not None:
            raise UsageError(f"{name} is an adapter itself: give the base model and --adapter, or only the adapter")
        around = _run_around(path)
        if around is not None:
            config, _ = folder.read_config(around)
            return Target(_changed(config, changes), path, around, asked)
        base = changes.pop("model", None) or read_adapter_config(path).get("base_model_name_or_path")
        changes = _task_of(path, changes)
        if not base:
            raise UsageError(
                f"{path / ADAPTER_CONFIG} does not name its base model: give the base and --adapter {name}"
            )
        config = load_config(model=str(base), method=changes.pop("method", "lora"), **changes)
        return Target(config, path, None, asked)
    folder_of_adapter = adapter_folder(Path(adapter).expanduser()) if adapter is not None else None
    if folder_of_adapter is not None:
        changes = _task_of(folder_of_adapter, changes)
    config = load_config(model=name, method=changes.pop("method", "lora"), **changes)
    target = Target(config, folder_of_adapter, None, asked)
    return target if folder_of_adapter is None else _held_as_trained(target, folder_of_adapter)


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """A run's config with the user's changes. Where the base is to be in 16 bits, how it was quantized is left out."""
    if changes.get("method") in ("lora", "full"):
        changes = {
            name: RunConfig.model_fields[name].get_default(call_default_factory=True) for name in QUANTIZED_ALONE
        } | changes
    return config.replace(**changes)


def _run_around(adapter: Path) -> Path | None:
    """The run that an adapter's folder is, or is a checkpoint of."""
    if (adapter / CONFIG).is_file():
        return adapter
    outer = adapter.resolve().parent
    return outer if (outer / CONFIG).is_file() and adapter.resolve() in list_checkpoints(outer) else None


def _held_as_trained(target: Target, *adapters: Path) -> Target:
    """The base quantized as in the adapters' own runs, where these are known and agree, and the user did not say
    otherwise."""
    known = [folder.read_config(run)[0] for run in map(_run_around, adapters) if run is not None]
    held = [config.pick(QuantOptions) if config.method == "qlora" else None for config in known]
    if not held or held[0] is None or any(other != held[0] for other in held):
        return target
    if "method" in target.asked and target.config.method != "qlora":
        return target
    own = {name: value for name, value in held[0].model_dump().items() if name not in target.asked}
    return replace(target, config=target.config.replace(method="qlora", **own))


def _task_of(adapter: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The changes, with the task of a classifier's adapter."""
    return {"task": tasks.CLASSIFICATION} | changes if is_classifier(read_adapter_config(adapter)) else changes


def _of_run(path: Path, adapter: str | None, changes: dict[str, Any]) -> Target:
    config, _ = folder.read_config(path)
    if adapter is not None:
        raise UsageError(f"{path} is a run and has an adapter of its own: give its base model and --adapter instead")
    if config.method == "full":
        if not (path / RESULT).is_file():
            raise UsageError(f"{path} is not finished, so it has no weights yet: `halfbyte resume {path}`")
        changes = {"model": str(path.resolve()), "revision": None} | changes
        return Target(config.replace(**changes), None, path, frozenset(changes))
    return Target(_changed(config, changes), adapter_folder(path), path, frozenset(changes))


def open_target(target: Target, source: ModelSource | None = None) -> Opened:
    """Load the model (from `source`, where it is open already), put the adapter on, find the template."""
    source = source or open_source(target.config.model, target.config.revision)
    target = target.opened_with(source)
    config = target.config
    head = tasks.head_to_open(config, source, target.adapter)
    loaded = load_model(config.pick(ModelOptions), target.quant, source=source, head=head)
    if target.adapter is not None:
        load_adapter(loaded.model, target.adapter, LinearBase(loaded, target.quant))
    loaded.model.eval()
    encoder = Encoder(loaded.tokenizer)
    kept = target.run / TEMPLATE if target.run is not None else None
    option = str(kept) if kept is not None and kept.is_file() else config.chat_template
    template = resolve_template(option, encoder, config.chat_template_date)
    ends = end_ids(encoder, template, loaded.source.config, loaded.source.generation)
    return Opened(target, loaded, encoder, template, ends)


def load(name: str, adapter: str | None = None, trainable: bool = False, **changes: Any) -> nn.Module:
    """A model for one's own loop: an nn.Module, its tokenizer at `.tokenizer`.

    trainable   attach a fresh adapter (lora, qlora) or unfreeze every weight (full), as `method` says
    changes     any field of the config: method="qlora", lora_r=8, dtype="bfloat16", …
    """
    from halfbyte.run.run import make_trainable

    opened = open_target(find(name, adapter, **changes))
    model = opened.loaded.model
    if trainable:
        if opened.target.adapter is None:
            make_trainable(opened.loaded, opened.target.config)
        model.train()
    model.tokenizer = opened.loaded.tokenizer
    return model


def evaluate_tuned(
    target: Target, options: EvaluateOptions | None = None, known: Sequence[EvalRow] = ()
) -> EvaluateResult:
    """`evaluate_target` of the target as it is, without its base beside it."""
    result = evaluate_target(target, options, beside_base=False, known=known)
    return result.tuned if isinstance(result, BaseAndTuned) else result


def evaluate_target(
    target: Target,
    options: EvaluateOptions | None = None,
    on_progress: Progress | None = None,
    beside_base: bool = True,
    known: Sequence[EvalRow] = (),
) -> BaseAndTuned | EvaluateResult:
    """Loss and metrics on `config.eval_data`, or on a run's own held-out rows; base against tuned where both are there.

    A fully tuned run is measured against the base that it was trained from. Without `beside_base` a base is only
    measured where it costs nothing.

    known   what the run found of its held-out rows when it ended: where the rows are these, the tuned model's loss is
            not computed again
    """
    config = target.config
    if config.eval_data is None and config.data is None:
        raise UsageError("no rows to evaluate on: give --data with a file")
    found = planning.survey(config, adapter=target.adapter)
    assert found.prepared is not None
    if found.config.task == tasks.CLASSIFICATION:
        tasks.require_trained_head(found.source, target.adapter)
    options = options or EvaluateOptions()
    pairs = found.prepared.eval[: options.max_rows]
    if pairs and pairs[0].rejected is not None and target.adapter is not None and not options.metrics:
        return _evaluate_pairs(target, found, pairs, options, on_progress)
    opened = open_target(target, found.source)
    if isinstance(opened.model, Classifier):
        return evaluate_classifier(opened.model, found.prepared.eval, options, on_progress)
    rows, tokenizer, losses = found.prepared.eval, opened.loaded.tokenizer, losses_of(known, pairs)
    asked: dict[str, Any] = {
        "labels": found.prepared.labels,
        "stop_ids": opened.end_ids | set(found.prepared.stop_ids),
        "on_progress": on_progress,
    }
    if beside_base and opened.tuned:
        return evaluate_base_and_tuned(opened.model, tokenizer, rows, options, tuned_losses=losses, **asked)
    tuned = evaluate(opened.model, tokenizer, rows, options, losses=losses, **asked)
    if beside_base and target.run is not None and config.method == "full":
        base_config, _ = folder.read_config(target.run)
        base: Any = load_model(base_config.pick(ModelOptions).model_copy(update={"dtype": config.dtype})).model
        return pair(evaluate(base, tokenizer, rows, options, **asked), tuned)
    return tuned


def _evaluate_pairs(
    target: Target, found: planning.Survey, pairs: list[Example], options: EvaluateOptions, on_progress: Progress | None
) -> BaseAndTuned:
    """A tuned model on pairs, against the reference of its run: what the run kept of it, else as it was begun."""
    prepared, tell, reference = found.prepared, on_progress or (lambda what, done, total: None), None
    assert prepared is not None
    if target.run is not None:
        kept = read_references(target.run, planning.identity(found), prepared.train, prepared.eval).eval[: len(pairs)]
        reference = None if kept.isnan().any() else kept
    given = target.config.adapter_path
    if reference is None and given is not None:
        began = open_target(replace(target, adapter=Path(given)), found.source).model
        with inference(began):
            reference = score_pairs(began, pairs, options.eval_batch_tokens, began.device).logprobs
        del began
    opened = open_target(target, found.source)
    dpo = target.config.pick(DpoOptions)
    return evaluate_preferences(opened.model, pairs, dpo, options.eval_batch_tokens, tell, reference)


def rows_from(target: Target, data: str | None) -> Target:
    """The target with the rows of `data`, all of them, to evaluate on; without it those that the run held out."""
    if data is None:
        if target.config.data is None:
            raise UsageError("no rows to evaluate on: give --data with a file")
        return target
    trained_on = target.config.data or data
    return replace(target, config=target.config.replace(data=trained_on, eval_data=data))


def read_prompts(file: Path) -> list[str]:
    """A prompt a line; `-` is stdin."""
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None
    return [line for line in text.splitlines() if line.strip()]


def generate_texts(
    opened: Opened, prompts: list[str], options: GenerateOptions, raw: bool | None = None, base: bool = False
) -> list[Generation]:
    """An answer to each prompt, with `base` from the model without its adapter.

    raw   True: continue the text; False: answer it as the user's turn of a conversation; None: as the run's rows were,
          and for anything else as a conversation where the tokenizer has a chat template of its own
    """
    if not prompts:
        raise UsageError('nothing to answer: give a prompt, or --prompts with a file (halfbyte generate RUN "text")')
    tasks.require_language_model(opened.target.config, "generate", seq2seq=True)
    plain = opened.raw if raw is None else raw
    if isinstance(opened.model, Seq2Seq):
        ids = [opened.encoder.encode_whole(prompt) for prompt in prompts]
    else:
        ids = [
            render_prompt(opened.encoder, p if plain else [{"role": "user", "content": p}], opened.template)
            for p in prompts
        ]
    with disabled(opened.model) if base else nullcontext():
        return generate_batch(opened.model, opened.loaded.tokenizer, ids, options, opened.end_ids)


def classify_texts(opened: Opened, texts: Sequence[Texts]) -> list[Classified]:
    """The class of each text (or of each row of named texts). UsageError for a model that is no classifier."""
    if not isinstance(opened.model, Classifier):
        raise UsageError(f"{opened.target.config.model} is no classifier: train one with task: classification")
    tasks.require_trained_head(opened.loaded.source, opened.target.adapter)
    config = opened.target.config
    return classify(opened.model, opened.encoder, texts, config.max_seq_length, config.system_prompt)


def chat_session(opened: Opened, options: GenerateOptions, system: str | None = None) -> ChatSession:
    """A conversation with the opened model. UsageError for one that is not made for it."""
    tasks.require_language_model(opened.target.config, "chat")
    return ChatSession(opened.model, opened.encoder, opened.template, options, opened.end_ids, system)


def merge_target(
    target: Target,
    out: Path,
    options: MergeOptions,
    on_progress: Any = None,
    *,
    adapters: Sequence[WeightedAdapter] = (),
    data: str | None = None,
    on_event: Callable[[str], None] | None = None,
) -> MergeReport:
    """Write base and adapters as one model folder.

    adapters   further ones, beside the target's own
    data       rows to score on, all of them; None: those that the run held out
    on_event   hears what is being scored

    UsageError for a target without an adapter, and for adapters of different bases.
    """
    own = [] if target.adapter is None else [WeightedAdapter(target.adapter)]
    summed = [*own, *(WeightedAdapter(adapter_folder(one.folder), one.weight) for one in adapters)]
    if not summed:
        raise UsageError("there is nothing to merge: give a run or an adapter (a fully tuned run is a model already)")
    _require_one_base(summed)
    if target.adapter is None:
        target = _held_as_trained(target, *(one.folder for one in summed))
    needed = options.base == "auto" or options.requantized or data is not None
    rows, source, why = None, None, ""
    opened = open_source(target.config.model, target.config.revision)
    if target.opened_with(opened).config.task in (tasks.CLASSIFICATION, tasks.SEQ2SEQ):
        source, why = opened, "only decoders of text are scored on them"
        if needed:
            raise UsageError(f"--base auto, --requantized and --data score on held-out rows, and {why}: leave them out")
    elif needed or (options.base is None and target.quant is not None):
        try:
            rows, source, why = held_out_rows(target, data, options.rows)
        except UsageError as error:
            if needed:
                raise
            why = str(error)
    config = target.config.pick(ModelOptions)
    report = merge(config, summed, out, target.quant, options, on_progress, rows=rows, source=source, on_event=on_event)
    return replace(report, not_scored=report.not_scored or why)


def held_out_rows(target: Target, data: str | None, rows: int) -> tuple[HeldOut | None, ModelSource | None, str]:
    """(rows to score on, the base's open source, why there are no rows): of `data`, else those that a run held out.

    UsageError where the rows cannot be read.
    """
    if data is None and target.config.data is None:
        return None, None, "a model by itself has no held-out rows: give --data, or merge the run"
    found = planning.survey(rows_from(target, data).config)
    assert found.prepared is not None
    if not found.prepared.eval:
        return None, found.source, "the run held out no rows"
    encoder = Encoder(found.tokenizer)
    ends = end_ids(encoder, found.prepared.template, found.source.config, found.source.generation)
    stops = ends | frozenset(found.prepared.stop_ids)
    limit = MAX_TOKENS if found.spec is not None else MAX_FALLBACK_TOKENS
    chosen = choose_rows(found.prepared.eval, rows, target.config.seed, found.prepared.labels, stops, limit)
    return chosen, found.source, ""


def _require_one_base(adapters: Sequence[WeightedAdapter]) -> None:
    """UsageError where two adapters were trained on different bases.

    They are told apart by the weights' fingerprint where both recorded it, else by the base's name without its folder:
    a model may have moved.
    """
    first = adapters[0].folder
    fingerprint, name = _base_of(first)
    for other in (one.folder for one in adapters[1:]):
        their_fingerprint, their_name = _base_of(other)
        if fingerprint and their_fingerprint:
            same = fingerprint == their_fingerprint
        else:
            same = not (name and their_name) or _short(name) == _short(their_name)
        if not same:
            raise UsageError(
                f"the adapters are of different bases: {first} was trained on {name}, {other} on {their_name}"
                + (" (other weights)" if name == their_name else "")
            )


def _base_of(adapter: Path) -> tuple[str | None, str | None]:
    """(fingerprint, name) of the base that an adapter's folder records; of a checkpoint, the run's around it."""
    name = read_adapter_config(adapter).get("base_model_name_or_path")
    for path in (adapter, adapter.parent):
        if (path / CONFIG).is_file():
            _, record = folder.read_config(path)
            base = record.get("base_model", {})
            return base.get("fingerprint"), str(base.get("name") or name)
    return None, str(name) if name else None


def _short(name: str) -> str:
    return Path(name).name.removesuffix(".gguf")
