"""What several sections ask of a report: names, marks, and columns of figures in one unit and precision."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from halfbyte.compare.page.document import Cell
from halfbyte.compare.page.text import NOT_MEASURED, Scale, scale_for
from halfbyte.compare.schema import Figure, Metric, Report, Unit, Variant

MEMORY, SECONDS, STEP = "peak_memory_bytes", "seconds", "step_seconds"
SPEED, LOSS = "tokens_per_second", "eval_loss"


@dataclass(frozen=True)
class Scaled:
    """A unit and decimals, for everything that is printed below each other."""

    scale: Scale
    decimals: int

    def number(self, value: float) -> str:
        return self.scale.number(value, self.decimals)

    def text(self, value: float) -> str:
        return self.scale.text(value, self.decimals)

    def interval(self, low: float | None, high: float | None) -> str:
        return self.scale.interval(low, high, self.decimals)

    def optional(self, value: float | None) -> str:
        return NOT_MEASURED if value is None else self.number(value)

    def down(self, value: float | None) -> float | None:
        """In the unit, for a chart."""
        return None if value is None else value / self.scale.factor


@dataclass(frozen=True)
class View:
    report: Report

    @property
    def variants(self) -> Sequence[Variant]:
        return self.report.variants

    @property
    def currency(self) -> str:
        plan = self.report.plan
        return plan.cost.currency if plan is not None and plan.cost is not None else ""

    def mark(self, key: str) -> int:
        return next(i for i, variant in enumerate(self.variants) if variant.key == key)

    def label(self, key: str) -> str:
        return self.report.variant(key).label

    def metric(self, key: str) -> Metric | None:
        return next((metric for metric in self.report.metrics if metric.key == key), None)

    def quality(self) -> Metric | None:
        """What the methods are judged by first: the first metric of quality, else the held-out loss."""
        return next((metric for metric in self.report.metrics if metric.quality), self.metric(LOSS))

    def measured(self, keys: Iterable[str]) -> list[Metric]:
        """Those of these metrics that some variant has a figure of."""
        metrics = [metric for key in keys if (metric := self.metric(key)) is not None]
        return [metric for metric in metrics if any(variant.figures.get(metric.key) for variant in self.variants)]

    def scaled(self, unit: Unit, values: Iterable[Figure | float | None]) -> Scaled:
        known = [value for value in values if value is not None]
        means = [value.mean if isinstance(value, Figure) else value for value in known]
        scale = scale_for(unit, means, self.currency)
        return Scaled(scale, scale.digits(known))

    def column(self, metric: Metric) -> Scaled:
        return self.scaled(metric.unit, (variant.figures.get(metric.key) for variant in self.variants))

    def name(self, variant: Variant) -> Cell:
        """The cell that heads a variant's row."""
        return Cell(variant.label, mark=self.mark(variant.key))

    def cell(self, figure: Figure | None, scaled: Scaled) -> Cell:
        """A mean with its interval below it, and how many seeds where some are missing."""
        if figure is None:
            return Cell(NOT_MEASURED)
        return Cell(scaled.number(figure.mean), note=self.spread(figure, scaled))

    def spread(self, figure: Figure, scaled: Scaled) -> str:
        asked = len(self.report.settings.seeds)
        interval = scaled.interval(figure.low, figure.high)
        if figure.n != asked and interval:
            return f"{interval}; {figure.n} of {asked} seeds"
        if figure.n != asked:
            return f"{figure.n} of {asked} seeds"
        return interval
