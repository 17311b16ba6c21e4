"""`report.json` of a comparison, version 1: what `compare` makes and what the pages and other programs read.

    Report.model_validate(data)       unknown keys, wrong types, NaN and names that nothing defines are refused

Numbers are plain JSON: bytes, seconds and shares (0.5 is 50 %) in their base unit. None is "unknown", and so is a key
of `figures` or `predicted` that is left out. Variants and metrics are named by their `key` everywhere.
"""

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictFloat, StrictInt, model_validator

SCHEMA_VERSION: Literal[1] = 1

Unit = Literal[
    "bytes", "seconds", "tokens/s", "loss", "share", "count", "money", "joules", "supervised tokens"
]  # fmt: skip


def _sensible(value: float) -> float:
    if not (math.isfinite(value) and abs(value) <= 1e18):
        raise ValueError("a number is finite and at most 1e18: write null where it is unknown")
    return value


Number = Annotated[StrictInt | StrictFloat, AfterValidator(_sensible)]
"""An integer stays one, so that what was validated is written back as it came."""
Count = Annotated[StrictInt, Field(ge=0, le=10**18)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Figure(_Part):
    """A mean over seeds. `low` and `high` are its 95 % interval, None with one seed; `values` has one value a seed."""

    mean: Number
    low: Number | None = None
    high: Number | None = None
    n: Count
    values: list[Number] = []


class Range(_Part):
    """What a plan said: the value that is as likely to be exceeded as not, and the one that holds 19 times of 20."""

    p50: Number
    p95: Number


class Model(_Part):
    name: str
    family: str | None = None
    parameters: Count | None = None
    dtype: str | None = None
    quantized_source: str | None = None
    """Set where the base came from a quantized file: the sentence that says so."""
    fingerprint: str | None = None


class Data(_Part):
    name: str
    fingerprint: str | None = None
    rows: Count | None = None
    eval_rows: Count | None = None
    tokens: Count | None = None
    supervised_tokens: Count | None = None


class Machine(_Part):
    processor: str | None = None
    cores: Count | None = None
    memory_bytes: Number | None = None
    gpu: str | None = None
    instruction_sets: list[str] = []
    system: str | None = None


class TuneLr(_Part):
    """The search for learning rates that every variant got: rates tried, the chosen one, and how long each try was."""

    grid: dict[str, list[Number]]
    chosen: dict[str, Number]
    steps: Count | None = None


class Settings(_Part):
    seeds: list[int]
    steps: Count | None = None
    supervised_tokens: Count | None = None
    tune_lr: TuneLr | None = None
    side_by_side: bool = False


class Metric(_Part):
    """Something that was measured. `quality` marks what a method is chosen for, beside memory and time."""

    key: str
    label: str
    better: Literal["lower", "higher"]
    unit: Unit
    quality: bool = False


class AgainstFull(_Part):
    """A variant's quality as a share of full fine-tuning's."""

    metric: str
    share: Figure


class Point(_Part):
    """A curve's mean over seeds at one time of the run, with its 95 % interval."""

    supervised_tokens: Number
    seconds: Number | None = None
    mean: Number
    low: Number | None = None
    high: Number | None = None


class Curves(_Part):
    train: list[Point] = []
    eval: list[Point] = []


class Variant(_Part):
    key: str
    label: str
    method_name: str
    fields: dict[str, Any] = {}
    precision: str | None = None
    quant_type: str | None = None
    blocksize: Count | None = None
    double_quant: bool | None = None
    paged: bool | None = None
    optim: str | None = None
    lora_r: Count | None = None
    target_modules: str | list[str] | None = None
    learning_rate: Number | None = None
    hardware: list[str] = []
    """Names of machines that it would fit."""
    command: str
    """The `train` command of its first seed."""
    figures: dict[str, Figure | None] = {}
    against_full: AgainstFull | None = None
    components: dict[str, Number] = {}
    """Bytes by component at the peak: counted in the runs, or the plan's for the phase `peak_phase`."""
    components_measured: bool = False
    peak_phase: str | None = None
    predicted: dict[Literal["peak_memory_bytes", "seconds"], Range | None] = {}
    curves: Curves = Curves()
    cells: list[str] = []
    notes: list[str] = []


class Baseline(_Part):
    """What the untrained model, and always saying the commonest answer, reach on a metric."""

    base: Number | None = None
    majority: Number | None = None


class Interval(_Part):
    mean: Number
    low: Number | None = None
    high: Number | None = None


class Comparison(_Part):
    """`difference` is a minus b. `detectable`: the smallest difference that these runs could have shown."""

    a: str
    b: str
    metric: str
    difference: Interval
    detectable: Number | None = None
    verdict: Literal["a better", "b better", "no difference found"]
    paired_by: Literal["seed", "seed and row"]
    sentence: str


class Reached(_Part):
    """Of all seeds of a variant, how many came down to a loss, and after how much. `at_first`: how many of them were
    below it at their first evaluation, which counts for them: they may have been sooner."""

    variant: str
    reached: Count
    at_first: Count = 0
    supervised_tokens: Figure | None = None
    seconds: Figure | None = None


class Convergence(_Part):
    loss: Number
    rows: list[Reached]


class ParetoPoint(_Part):
    variant: str
    quality: Number | None = None
    memory: Number | None = None
    seconds: Number | None = None
    on_front: bool = False


class Pareto(_Part):
    quality_metric: str
    points: list[ParetoPoint]


class Cost(_Part):
    amount: Number
    currency: str


class Plan(_Part):
    """What was shown before the first run; `without`: what is not in it."""

    seconds: Range | None = None
    cost: Cost | None = None
    without: list[str] = []


class Cell(_Part):
    """One run. `origin` is "this comparison", "an earlier run" or "another machine: NAME"; `others_share`: how much of
    the processor other work took meanwhile."""

    id: str
    variant: str
    seed: int
    path: str | None = None
    status: Literal["done", "failed", "missing"]
    origin: str = "this comparison"
    seconds: Number | None = None
    others_share: Number | None = None
    message: str | None = None


class Report(_Part):
    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    command: str
    title: str
    sentence: str
    """One or two sentences for who decides: which to use here, and what it costs."""
    model: Model
    data: list[Data] = []
    machine: Machine = Machine()
    versions: dict[str, str | None] = {}
    settings: Settings
    metrics: list[Metric] = []
    variants: list[Variant] = []
    baselines: dict[str, Baseline] = {}
    comparisons: list[Comparison] = []
    convergence: list[Convergence] = []
    pareto: list[Pareto] = []
    plan: Plan | None = None
    cells: list[Cell] = []
    commands: list[str] = []
    notes: list[str] = []
    warnings: list[str] = []

    @model_validator(mode="after")
    def _names_are_defined(self) -> "Report":
        variants = _unique("variant", (variant.key for variant in self.variants))
        metrics = _unique("metric", (metric.key for metric in self.metrics))
        cells = _unique("cell", (cell.id for cell in self.cells))
        for variant in self.variants:
            _known(
                "metric", [*variant.figures, *([variant.against_full.metric] if variant.against_full else [])], metrics
            )
            _known("cell", variant.cells, cells)
        _known("metric", [*self.baselines, *(c.metric for c in self.comparisons)], metrics)
        _known("metric", [pareto.quality_metric for pareto in self.pareto], metrics)
        named = [name for c in self.comparisons for name in (c.a, c.b)]
        named += [row.variant for at in self.convergence for row in at.rows]
        named += [point.variant for pareto in self.pareto for point in pareto.points]
        _known("variant", [*named, *(cell.variant for cell in self.cells)], variants)
        return self

    def metric(self, key: str) -> Metric:
        return next(metric for metric in self.metrics if metric.key == key)

    def variant(self, key: str) -> Variant:
        return next(variant for variant in self.variants if variant.key == key)


def _unique(what: str, names: Iterable[str]) -> set[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"the {what} {name!r} is there twice")
        seen.add(name)
    return seen


def _known(what: str, names: Iterable[str], defined: set[str]) -> None:
    unknown = sorted(set(names) - defined)
    if unknown:
        raise ValueError(f"no {what} {unknown[0]!r} is defined, and something refers to it")
