"""From a config and its data to a plan, and from a plan to a config with nothing left open.

Three steps, each a plain value: `survey` opens the model's headers and counts the rows' tokens; `make` asks
`halfbyte.plan` what fits; `resolve` writes its answers into the config, so that run.yaml gives the same run again.
"""

import datetime
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from halfbyte.adapters.lora import LoraOptions
from halfbyte.data import Example, Prepared, prepare
from halfbyte.data.builtin_templates import BUILTINS
from halfbyte.data.options import DataOptions, DataSource, sources_of
from halfbyte.errors import UsageError
from halfbyte.models.config_source import ConfigOnly
from halfbyte.models.foreign_spec import ForeignSpec
from halfbyte.models.load import check_pattern, resolve_device, resolve_dtype
from halfbyte.models.source import ModelSource, open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.optim.options import ADAPTER_LEARNING_RATE, FULL_LEARNING_RATE, OptimOptions
from halfbyte.plan import history
from halfbyte.plan.calibration import of
from halfbyte.plan.catalog import Machine, machines
from halfbyte.plan.change import Change
from halfbyte.plan.hardware import Hardware, Rates, detect, measure
from halfbyte.plan.opening import open_for_plan
from halfbyte.plan.price import Price
from halfbyte.plan.recommend import Candidate, DataShape, Plan, Request, Shape, least_peak, make_plan
from halfbyte.quant.options import QuantOptions
from halfbyte.run import tasks
from halfbyte.run.checks import check_options, check_task
from halfbyte.run.config import RunConfig
from halfbyte.run.continued import with_adapter
from halfbyte.run.variants import Variant, variants
from halfbyte.train.dpo import PREFERENCE_LEARNING_RATE
from halfbyte.train.options import EFFECTIVE_BATCH, TrainOptions, batch_rows, count_steps

ASSUMED_ROWS, ASSUMED_TOKENS = 1_000, 512
"""Stand-ins for `halfbyte plan` without data, said so in its answer."""
SCORING_LABELS = 4
"""Passes over the rows that follow training where answers are labels, each scored for base and tuned: 5 were
measured, of which the loss of the tuned model is known from the last evaluation."""
NO_FULL = "method full is built for the decoder's families only: use lora or qlora with this model"


@dataclass(frozen=True)
class Survey:
    """What a run is made of, before any weight is read.

    `spec` is None for architectures that the fallback serves; `shape` is there for them all the same.
    """

    config: RunConfig
    source: ModelSource
    spec: ModelSpec | None
    tokenizer: Any
    prepared: Prepared | None
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def shape(self) -> Shape:
        """UsageError for an architecture that transformers does not know, either."""
        return self.spec or ForeignSpec.from_config(self.source.config)

    @cached_property
    def data(self) -> DataShape:
        if self.prepared is None:
            tokens = ASSUMED_ROWS * min(ASSUMED_TOKENS, self.config.max_seq_length)
            return DataShape(ASSUMED_ROWS, tokens, tokens // ASSUMED_ROWS, 0.5, eval_tokens=tokens // 20, assumed=True)
        return shape_of(self.prepared.train, self.prepared.eval)


def shape_of(train: Sequence[Example], held_out: Sequence[Example]) -> DataShape:
    """Counts over the examples; not one of them is copied."""
    lengths = [len(example) for example in train]
    tokens = sum(lengths)
    read = sum(example.source_length for example in train)
    return DataShape(
        rows=len(train),
        tokens=tokens,
        spread=statistics.pstdev(lengths),
        longest=max(map(len, (*train, *held_out))),
        supervised_share=sum(example.supervised_tokens for example in train) / tokens,
        eval_tokens=sum(map(len, held_out)),
        source_share=read / tokens if read else None,
    )


def survey(config: RunConfig, to_train: bool = True, adapter: Path | None = None) -> Survey:
    """Open the model's headers, load the tokenizer, prepare the rows. UsageError for what is wrong with any of them.

    to_train  rows and weights are needed; a plan does without, and then a name of the catalogue is a model, too
    adapter   the folder of the adapter that will be put on the model: a classifier's names its classes
    """
    if to_train and config.data is None:
        raise UsageError("no data: give --data with a file, a folder or a Hub data set")
    config = absolute(config)
    source = (open_source if to_train else open_for_plan)(config.model, config.revision)
    config = tasks.with_task(config, source)
    spec = ModelSpec.from_config(source.config) if ModelSpec.serves(source.config) else None
    if spec is not None and config.task == tasks.CLASSIFICATION:
        spec = spec.without_head()
    device = resolve_device(config.device)
    tokenizer = source.tokenizer() if config.data is not None else None
    prepared = None
    if config.data is not None:
        tasks.require_an_end(config, tokenizer)
        labels = tasks.known_labels(config, source, adapter)
        prepared = prepare(config.pick(DataOptions), tokenizer, config.seed, labels)
    return Survey(config, source, spec, tokenizer, prepared, device, resolve_dtype(config.dtype, device))


def identity(found: Survey) -> dict[str, str]:
    """What must be the same for a resumed run to be the same run."""
    assert found.prepared is not None
    return {
        "base model": found.source.fingerprint,
        "data": found.prepared.fingerprint,
        "chat template": found.prepared.template_hash,
    }


def absolute(config: RunConfig) -> RunConfig:
    """The config with absolute paths where they name something here, so that it means the same from any folder."""
    changes: dict[str, Any] = {}
    for name in ("model", "adapter_path", "chat_template"):
        value = getattr(config, name)
        word = name == "chat_template" and (value == "auto" or value in BUILTINS)
        if value is not None and not word and Path(value).expanduser().exists():
            changes[name] = str(Path(value).expanduser().resolve())
    if config.optim_offload_dir is not None:  # it is made where it is missing
        changes["optim_offload_dir"] = config.optim_offload_dir.expanduser().resolve()
    for name in ("data", "eval_data"):
        sources = tuple(_absolute_source(source) for source in sources_of(getattr(config, name)))
        if sources:
            plain = len(sources) == 1 and sources[0] == DataSource(path=sources[0].path)
            changes[name] = sources[0].path if plain else sources
    return config.replace(**changes)


def _absolute_source(source: DataSource) -> DataSource:
    path = Path(source.path).expanduser()
    return source.model_copy(update={"path": str(path.resolve())}) if path.exists() else source


@dataclass(frozen=True)
class Ask:
    """What a plan is asked beside the config.

    methods    names to compare (`run.methods`); none: full, LoRA, QLoRA and the config's own
    price      of the machine, by the hour
    deadline   seconds
    machine    another machine than this one
    advise     look for changes that make fit what does not
    """

    methods: tuple[str, ...] = ()
    price: Price | None = None
    deadline: float | None = None
    machine: Machine | None = None
    advise: bool = False


def make(found: Survey, rates: Rates | None = None, ask: Ask | None = None) -> Plan:
    """The plan of a survey, for this machine or another.

    UsageError for options that have no effect or contradict the data. What does not fit is for `check_fits` to refuse.
    """
    ask = ask or Ask()
    check_task(found.config, found.prepared)
    check_options(found.config, found.prepared)
    config, spec = found.config, found.spec
    if spec is not None and config.method in ("auto", "qlora"):
        check_pattern(config.pick(QuantOptions), spec)
    if spec is not None and config.adapter_path is None and config.method != "full":
        config.pick(LoraOptions).require_linears(linear.name for linear in spec.linears())
    machine = ask.machine
    hardware, found_rates = _machine(found, ask, rates)
    compared = variants(config, ask.methods, full=spec is not None or bool(ask.methods))
    if spec is None and any(variant.config.method == "full" for variant in compared):
        raise UsageError(NO_FULL)
    asked = request(config, found, ask.machine)
    candidates = [_candidate(variant, found, ask) for variant in compared]
    if asked.method == "auto" and not any(candidate.choosable for candidate in candidates):
        names = ", ".join(candidate.name for candidate in candidates)
        raise UsageError(f"--methods {names}: these rows or this adapter need another: add lora or qlora")
    budget, why = _budget(config.memory, machine)
    plan = make_plan(
        found.shape,
        asked,
        found.data,
        hardware,
        found_rates,
        budget,
        candidates,
        asked=None if asked.method == "auto" else config.replace(method=asked.method).method_name,
        budget_reason=why,
        price=ask.price or (machine.price if machine is not None else None),
        deadline=ask.deadline,
        advise=ask.advise,
        constants=history.constants_of(hardware, asked.device) if machine is None and spec is not None else None,
    )
    plan = replace(plan, machine=machine.name if machine else None, assumed=assumptions(found, hardware, ask))
    return _with_machines(plan, compared, found) if ask.advise else plan


def _budget(stated: int | None, machine: Machine | None) -> tuple[int | None, str | None]:
    """(bytes, whose they are); None for what `make_plan` decides. Another machine gives no more than it has."""
    if machine is None or (stated is not None and stated <= machine.usable):
        return stated, None
    return machine.usable, f"the memory of {machine.name}"


def _machine(found: Survey, ask: Ask, rates: Rates | None) -> tuple[Hardware, Rates]:
    if ask.machine is not None:
        return ask.machine.hardware(), ask.machine.rates()
    hardware = detect()
    if found.device.type == "cpu":
        hardware = replace(hardware, gpus=())
    return hardware, rates or measure(hardware)


def _candidate(variant: Variant, found: Survey, ask: Ask) -> Candidate:
    """`auto` does not take a method that what the user set, or these rows, do not go with."""
    whole = variant.config.method == "full"
    unfit = whole and (asks_reference(found) or found.config.adapter_path is not None)
    useless = bool(variant.lost) or _ignores(variant.config.method, found.config)
    return Candidate(
        variant.name,
        request(variant.config, found, ask.machine),
        choosable=not unfit and (variant.name in ask.methods or not useless),
    )


def _ignores(method: str, config: RunConfig) -> bool:
    """Whether a method has no use for a rank, a target or a format that the user chose."""
    if method == "full" and any(config.given(name) for name in LoraOptions.model_fields):
        return True
    return method != "qlora" and any(config.given(name) for name in QuantOptions.model_fields)


def _with_machines(plan: Plan, compared: Sequence[Variant], found: Survey) -> Plan:
    """With the smallest machine of the catalogue that would hold what does not fit."""
    # A GPU before a processor: whoever goes to another machine for memory goes there for speed, too.
    fleet = sorted(machines().values(), key=lambda machine: (machine.kind == "cpu", machine.usable, machine.name))
    configs = {variant.name: variant.config for variant in compared}
    changes = dict(plan.changes or {})
    for name in changes:
        least: dict[tuple[str, str], int] = {}
        for machine in fleet:
            asked = request(configs[name], found, machine)
            kind = (asked.device, asked.dtype)
            if kind not in least:
                made = plan.chosen.calibration if found.spec is None else of(asked.device)
                least[kind] = int(least_peak(found.shape, Candidate(name, asked), found.data, made))
            if least[kind] <= machine.usable and machine.name != plan.machine:
                note = machine.title if found.config.memory is None else f"{machine.title}, without --memory"
                changes[name] = (*changes[name], Change({"device": machine.name}, least[kind], note))
                break
    return replace(plan, changes=changes)


def assumptions(found: Survey, hardware: Hardware, ask: Ask) -> tuple[str, ...]:
    """What the figures take for granted, a sentence each."""
    data, said = found.data, []
    if data.assumed:
        said.append(
            f"no data was given: {data.rows:,} rows of {data.longest} tokens, half of them supervised, are assumed"
        )
    if isinstance(found.source, ConfigOnly) and found.source.config.get("quantization_config"):
        said.append(
            f"{found.source.name} is quantized, and only its config.json was read: it is planned as a 16-bit model and "
            "not with its own blocks"
        )
    if ask.machine is not None:
        said.append(
            f"machines of the catalogue: their vendors' rates at {ask.machine.reachable:.0%}, nothing else in their "
            "memory; nothing was measured"
        )
    if hardware.gpus and (ask.machine is not None or history.constants_of(hardware, "cuda").runs == 0):
        said.append("this engine's constants on GPUs are unmeasured: the interval is a guess")
    if found.spec is None:
        kind = found.source.config.get("model_type")
        said.append(f"{kind} is run by transformers' own code: an estimate, and the interval is a guess")
    if len(hardware.gpus) > 1:
        names = ", ".join(gpu.name for gpu in hardware.gpus)
        said.append(f"this version trains on one device: of {len(hardware.gpus)} ({names}) it takes the first")
    return tuple(said)


def scores_labels(found: Survey) -> bool:
    """Whether base and tuned are also asked which label they would say."""
    if found.prepared is None or found.config.task == tasks.CLASSIFICATION:
        return False
    return bool(found.prepared.labels) and bool(found.prepared.eval)


def _beside_training(found: Survey) -> int:
    """Passes over the held-out rows beside the loop's: the base's, and the tuned model's where the loop has another."""
    if scores_labels(found):
        return SCORING_LABELS
    return 2 if asks_reference(found) or found.config.task == tasks.CLASSIFICATION else 1


def asks_reference(found: Survey) -> bool:
    """Whether a reference is asked about the rows before the first step."""
    return found.prepared is not None and found.prepared.pairs


def plan_of(config: RunConfig, ask: Ask | None = None) -> Plan:
    """The plan of a config, with or without data: `halfbyte plan` and `hb.plan`. Reads no weights."""
    return make(survey(with_adapter(config), to_train=False), ask=ask)


def request(config: RunConfig, found: Survey, machine: Machine | None = None) -> Request:
    """What the config asks of the plan; on another machine, in the type that it computes in."""
    options = _training(config)
    # Per-layer updates have one micro-batch: fewer rows at once would be another update.
    sizes = (EFFECTIVE_BATCH,) if config.by_layer else range(EFFECTIVE_BATCH, 0, -1)
    batches = dict.fromkeys(batch_rows(options, fits) for fits in sizes)
    data = found.data
    rows_per_update = next(iter(batches))[0] * next(iter(batches))[1]
    per_epoch, steps = count_steps(data.rows, rows_per_update, options)
    # What starts from the losses of quantization has one way to hold its base.
    method = "qlora" if config.method == "auto" and config.init_lora_weights == "loftq" else config.method
    return Request(
        method=method,
        dtype=_dtype(found, machine),
        device=found.device.type if machine is None else machine.device,
        quant=config.pick(QuantOptions),
        lora=config.pick(LoraOptions),
        optim=config.optim,
        updates=config.pick(OptimOptions),
        batches=tuple(batches),
        checkpointing=config.gradient_checkpointing,
        epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        # Every epoch or `eval_steps`, then what is not known by the end.
        evaluations=_beside_training(found) + max(1, steps // (config.eval_steps or per_epoch)),
        forward_tokens=round(min(data.rows, steps * rows_per_update) * data.mean) if asks_reference(found) else 0,
        held=found.source.prequantized_bytes(),
        file_itemsize=max((t.dtype.itemsize for t in found.source.tensors().values() if len(t.shape) == 2), default=4),
        packing=config.packing,
        eval_tokens=config.eval_batch_tokens,
        checkpoints=config.save_total_limit,
        open_rank=found.config.method == "auto" and config.adapter_path is None and not config.given("lora_r"),
    )


def _dtype(found: Survey, machine: Machine | None) -> str:
    if machine is None or found.config.dtype != "auto":
        return str(found.dtype).removeprefix("torch.")
    return machine.dtype


def _training(config: RunConfig) -> TrainOptions:
    """The options of training; per-layer updates see one micro-batch an update, which then takes all its rows."""
    options: TrainOptions = config.pick(TrainOptions)
    return options.model_copy(update={"gradient_accumulation_steps": 1}) if config.by_layer else options


def resolve(found: Survey, plan: Plan, today: datetime.date | None = None) -> RunConfig:
    """The config with every default made explicit: what the plan chose, and what depends on it."""
    config = found.config
    method, job = plan.method, plan.chosen.job
    per_device, accumulation = plan.chosen.batch
    chosen = {}
    if config.method == "auto" and config.adapter_path is None and method != "full":
        chosen["lora_r"] = job.lora.lora_r
    rate = FULL_LEARNING_RATE if method == "full" else ADAPTER_LEARNING_RATE
    if config.galore:
        rate /= config.galore_scale  # what a projected step is multiplied with: matrices move as in full fine-tuning
    name = config.replace(method=method).method_name
    pairs = asks_reference(found)
    if pairs:
        rate = PREFERENCE_LEARNING_RATE
    return config.replace(
        task="dpo" if pairs else "causal" if config.task == "auto" else config.task,
        method=method,
        revision=found.source.revision or config.revision,
        dtype=str(found.dtype).removeprefix("torch."),
        device=found.device.type,
        learning_rate=rate if config.learning_rate is None else config.learning_rate,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=job.checkpointing,
        eval_batch_tokens=job.eval_batch_tokens,
        per_layer_updates=config.by_layer,
        max_grad_norm=config.clip_norm,
        **chosen,
        output_dir=config.output_dir or default_output(config.model, name, today or datetime.date.today()),
    )


def default_output(model: str, method: str, today: datetime.date) -> Path:
    """`runs/<date>-<model>-<method>`, the model by its last name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model.rstrip("/")).name.removesuffix(".gguf")).strip("-.")
    return Path("runs") / f"{today.isoformat()}-{name or 'model'}-{method}"
