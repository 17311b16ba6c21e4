"""What is going to be run, as a value: variants, each with its plan, and cells (variant × seed), each with its id.

All variants are held to the same work before anything is run: the same rows, in the same order for a seed, in the same
number of updates, hence the same supervised tokens. Variants differ in how an update is laid out in memory at most.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte.compare import identity
from halfbyte.compare.options import CompareOptions, Request
from halfbyte.compare.variants import Variant, variants_of
from halfbyte.data.options import DataOptions
from halfbyte.errors import DoesNotFit, HalfbyteError, UsageError
from halfbyte.evaluate.metrics import ACCURACY, MACRO_F1, PASS_AT_1, find_metrics
from halfbyte.models.options import ModelOptions
from halfbyte.plan.catalog import machines
from halfbyte.plan.recommend import Plan, check_fits
from halfbyte.run import folder, planning, tasks
from halfbyte.run.config import RunConfig
from halfbyte.run.planning import Ask, Survey
from halfbyte.train.feed import Feed
from halfbyte.train.options import TrainOptions, count_steps

EVALUATIONS = 5
"""Evaluations of a run where `eval_steps` is not given: a curve needs points, and each one takes time."""
LAYOUT = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "eval_batch_tokens",
    "dtype", "device",
)  # fmt: skip
"""What a plan may choose: decided once a comparison, so that a variant's cells are alike."""


@dataclass(frozen=True)
class Work:
    """What a run of a variant goes through: the same for all that are compared.

    data_tokens, data_supervised   of the training rows, once; tokens, supervised_tokens: of all updates together
    """

    data: str
    train_rows: int
    eval_rows: int
    data_tokens: int
    data_supervised: int
    rows_per_update: int
    steps: int
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True)
class PlannedVariant:
    """A variant with everything that is known before it runs.

    layout     fields that the plan chose (LAYOUT)
    hardware   machines of the catalogue that it would fit, by name
    plan       plan.json's content
    skipped    why it is not run; None: it is
    """

    variant: Variant
    config: RunConfig
    work: Work
    layout: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    record: Mapping[str, Any]
    pairs: bool
    skipped: str | None = None
    hardware: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return self.variant.key


@dataclass(frozen=True)
class Cell:
    """One run: a variant with a seed. `source` is the id of the cell whose adapter it goes on from.

    kind   "cell", or "tune" for a run of the learning-rate search
    """

    id: str
    variant: str
    seed: int
    config: RunConfig
    want: Mapping[str, Any]
    pairs: bool
    source: str | None = None
    kind: str = "cell"
    peak_p95: float = 0.0
    seconds_p50: float = 0.0


@dataclass(frozen=True)
class Design:
    """The comparison before it runs."""

    variants: tuple[PlannedVariant, ...]
    seeds: tuple[int, ...]
    model: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    def variant(self, key: str) -> PlannedVariant:
        return next(planned for planned in self.variants if planned.key == key)

    def cells(self, skipped: bool = False) -> list[Cell]:
        """Every cell that fits, seed by seed: a comparison that is stopped has every variant for the seeds it reached.

        A cell comes after the one that it goes on from. With `skipped` also those that are not run here.
        """
        made: list[Cell] = []
        for seed in self.seeds:
            by_variant: dict[str, Cell] = {}
            for planned in self.variants:
                source = planned.variant.continue_from
                if (skipped or planned.skipped is None) and (source is None or source in by_variant):
                    by_variant[planned.key] = cell_of(planned, seed, by_variant[source].id if source else None)
            made += by_variant.values()
        return made


def cell_of(planned: PlannedVariant, seed: int, source: str | None = None, kind: str = "cell", **changes: Any) -> Cell:
    """The cell of a variant and a seed; `changes` are fields of its config."""
    config = planned.config.replace(seed=seed, **changes)
    want = identity.wanted(config, identity.identity_of(planned.record), planned.pairs, source)
    predicted = planned.plan or {"peak_memory_bytes": {"p95": 0.0}, "seconds": {"p50": 0.0}}
    return Cell(
        identity.id_of(want), planned.key, seed, config.replace(**planned.layout), want, planned.pairs, source, kind,
        predicted["peak_memory_bytes"]["p95"], predicted["seconds"]["p50"],
    )  # fmt: skip


def make_design(request: Request, known: Mapping[str, Mapping[str, Any]]) -> Design:
    """Survey, plan and check every variant. Reads no weights.

    known   layouts and plans of before, by the id of a variant's first cell: they are kept, so that a comparison that
            goes on has cells that are alike

    UsageError for variants that are not comparable, or that a run would refuse; a variant that does not fit is skipped.
    """
    variants = variants_of(request)
    seed = variants[0].config.seed
    if any(variant.config.seed != seed for variant in variants):
        raise UsageError("the first seed is the same for all variants: give seed once")
    surveys: dict[str, Survey] = {}
    made: dict[str, PlannedVariant] = {}
    ids: dict[str, str] = {}
    notes: list[str] = []
    for variant in variants:
        if variant.continue_from is not None and variant.continue_from not in made:
            raise UsageError(
                f"{variant.key}: continue_from {variant.continue_from}, which is the same run as another variant and "
                "is left out: name that one"
            )
        try:
            planned = _planned(variant, surveys, known, made)
        except HalfbyteError as error:
            raise type(error)(f"variant {variant.key}: {error}") from None
        source = variant.continue_from
        first = cell_of(planned, seed, cell_of(made[source], seed).id if source else None).id
        if ids.setdefault(first, variant.key) != variant.key:  # the rank of full fine-tuning, in a grid
            if made[ids[first]].variant.only_a_start and not variant.only_a_start:
                raise UsageError(
                    f"{variant.key} is the same run as {ids[first]}, which is only a start: leave {ids[first]} out, "
                    f"and let others continue_from {variant.key}"
                )
            notes.append(f"{variant.key} is the same run as {ids[first]} and is left out.")
            continue
        made[variant.key] = planned
    if sum(not planned.variant.only_a_start for planned in made.values()) < 2:
        raise UsageError(f"one variant is nothing to compare: {' '.join(notes)}")
    _require_measurable(next(iter(surveys.values())), request.options)
    if not request.options.unequal:
        _require_equal([planned for planned in made.values() if not planned.variant.only_a_start])
    seeds = tuple(range(seed, seed + request.options.seeds))
    return Design(tuple(made.values()), seeds, _model(next(iter(surveys.values()))), tuple(notes))


def _planned(
    variant: Variant,
    surveys: dict[str, Survey],
    known: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, PlannedVariant],
) -> PlannedVariant:
    config = variant.config
    if config.eval_data is None and config.eval_seed is None:
        config = config.replace(eval_seed=config.seed)  # the same rows held out for all seeds
    found = _survey(config, surveys)
    prepared = found.prepared
    assert prepared is not None
    if not prepared.eval:
        raise UsageError("no rows are held out, and a comparison needs some: give eval_data, or eval_split above 0")
    config = found.config
    rows = identity.rows_per_update(config)
    _, steps = count_steps(len(prepared.train), rows, config.pick(TrainOptions))
    if config.eval_steps is None:
        config = config.replace(eval_steps=math.ceil(steps / EVALUATIONS))
    found = replace(found, config=config)
    work = _work(found, rows, steps)
    source = before[variant.continue_from] if variant.continue_from else None
    if source is not None:
        added = {name: getattr(work, name) + getattr(source.work, name) for name in ("steps", "tokens")}
        work = replace(work, supervised_tokens=work.supervised_tokens + source.work.supervised_tokens, **added)
    record = folder.record_of(found)
    pairs = planning.asks_reference(found)
    planned = PlannedVariant(variant, config, work, {}, None, record, pairs)
    signature = cell_of(planned, config.seed).id
    kept = known.get(signature)
    if kept is not None:
        planned = replace(
            planned, layout=kept["layout"], plan=kept["plan"], skipped=kept["skipped"], hardware=tuple(kept["hardware"])
        )
    if kept is None or planned.skipped is not None:
        planned = _with_plan(planned, found)
    if source is not None and source.skipped is not None:
        planned = replace(planned, skipped=f"{source.key}, which it goes on from, is not run")
    return planned


def _with_plan(planned: PlannedVariant, found: Survey) -> PlannedVariant:
    made = planning.make(found)
    resolved = planning.resolve(found, made)
    layout = {name: getattr(resolved, name) for name in LAYOUT}
    rows = layout["per_device_train_batch_size"] * layout["gradient_accumulation_steps"]
    if rows != planned.work.rows_per_update:
        raise UsageError(
            f"memory allows {rows} rows an update and not {planned.work.rows_per_update}: give "
            "per_device_train_batch_size and gradient_accumulation_steps, so that all variants learn from the same"
        )
    return replace(
        planned, layout=layout, plan=made.as_dict(), skipped=_too_big(made), hardware=fitting_machines(found)
    )


def fitting_machines(found: Survey) -> tuple[str, ...]:
    """The catalogue's machines that the run would fit, by the names of their entries, the smallest first."""
    anywhere = replace(found, config=found.config.replace(memory=None))
    fitting = []
    for machine in sorted(machines().values(), key=lambda machine: (machine.usable, machine.name)):
        made = planning.make(anywhere, ask=Ask(machine=machine))
        if made.fits(made.chosen):
            fitting.append(machine.name)
    return tuple(fitting)


def _too_big(made: Plan) -> str | None:
    try:
        check_fits(made)
    except DoesNotFit as error:
        return str(error)
    return None


def _model(found: Survey) -> dict[str, Any]:
    """The base, as the report says it."""
    source = found.source
    stored = source.prequantized_bytes()
    blocks = {"gguf": "a GGUF file's own blocks", "gptq": "GPTQ's codes", "awq": "AWQ's codes"}
    said = None
    if stored:
        held = blocks.get(source.blocks or "", f"blocks of {source.blocks}")
        name = Path(source.name).name
        said = f"{name} has {held} in {len(stored)} tensors: the 16-bit weights were quantized once already"
    return {
        "name": Path(found.config.model).name,
        "family": source.config.get("model_type"),
        "parameters": None if found.spec is None else found.spec.total_parameters,
        "dtype": str(found.dtype).removeprefix("torch."),
        "quantized_source": said,
        "fingerprint": source.fingerprint,
    }


def _survey(config: RunConfig, surveys: dict[str, Survey]) -> Survey:
    """Model and rows; those that another variant has read already are not read again."""
    key = repr((config.pick(ModelOptions), config.pick(DataOptions), config.seed))
    if key not in surveys:
        surveys[key] = planning.survey(config)
    first = surveys[key]
    return replace(first, config=tasks.with_task(planning.absolute(config), first.source))


def _work(found: Survey, rows: int, steps: int) -> Work:
    prepared = found.prepared
    assert prepared is not None
    feed = Feed(prepared.train, prepared.sampler(found.config.seed), rows, rows)
    supervised = [example.supervised_tokens for example in prepared.train]
    return Work(
        data=prepared.fingerprint,
        train_rows=len(prepared.train),
        eval_rows=len(prepared.eval),
        data_tokens=sum(map(len, prepared.train)),
        data_supervised=sum(supervised),
        rows_per_update=rows,
        steps=steps,
        tokens=feed.tokens(steps),
        supervised_tokens=sum(supervised[row] for step in range(1, steps + 1) for row in feed.rows(step)),
    )


def _require_measurable(found: Survey, options: CompareOptions) -> None:
    """UsageError for metrics that are none, or that these rows do not allow: before hours of training, not after."""
    prepared, asked = found.prepared, options.metrics
    assert prepared is not None
    metrics = find_metrics([name for name in asked if name != MACRO_F1 or not prepared.labels])
    rows = prepared.eval[: options.metric_rows]
    if PASS_AT_1 in asked and not options.allow_code_execution:
        raise UsageError(
            "metrics: pass@1 runs the programs that the models write, on this machine and as you: allow it with "
            "--allow-code-execution, or leave it out"
        )
    if PASS_AT_1 in asked and not any(row.tests is not None for row in rows):
        raise UsageError("metrics: pass@1 needs held-out rows with tests, and these have none")
    if ACCURACY in asked and not prepared.labels:
        raise UsageError("metrics: accuracy is for rows with labels, and these have none: use exact_match")
    if metrics and not any(row.completion is not None and row.prompt_length for row in rows):
        raise UsageError(f"metrics: {metrics[0].name} compares answers, and these rows are plain text")
    known = ["eval_loss", *(name.rpartition(":")[2] for name in asked)]
    known += [ACCURACY, MACRO_F1] if prepared.labels else []
    known += ["rewards/accuracies"] if prepared.pairs else []
    if options.quality is not None and options.quality not in known:
        choices = ", ".join(dict.fromkeys(known))
        raise UsageError(f"quality: {options.quality} is not measured here: choose from {choices}")


def _require_equal(compared: Sequence[PlannedVariant]) -> None:
    """UsageError naming the first two variants that do not learn from the same."""
    first = compared[0]
    for other in compared[1:]:
        for name, what in (
            ("data", "other rows (data, template, max_seq_length or what is supervised)"),
            ("train_rows", "another number of training rows"),
            ("rows_per_update", "another number of rows an update"),
            ("supervised_tokens", "another number of supervised tokens"),
        ):
            mine, theirs = getattr(first.work, name), getattr(other.work, name)
            if mine != theirs:
                shown = "" if name == "data" else f" ({theirs:,} and {mine:,})"
                raise UsageError(
                    f"{other.key} learns from {what} than {first.key}{shown}: that is no comparison of methods; make "
                    "them equal, or allow it with --unequal"
                )
