"""Peaks that others published, row by row (published.yaml), and what the arithmetic of their stacks gives for each.

Of each stack every second row, in the file's order, calibrates its one constant; the others are held out.

Units: bytes inside; a row is compared in the unit that it was published in.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path

from halfbyte.models.spec import ModelSpec
from halfbyte.plan import stacks
from halfbyte.plan.catalog import find_model
from halfbyte.plan.stacks import Setup, Stack
from halfbyte.yamlfile import read_yaml

FILE = Path(__file__).with_name("published.yaml")
GIB = 1 << 30
UNITS = {"GB": 10**9, "GiB": GIB}
FULL_TO_THE_BRIM = 512
"""Tokens: a card for which less is predicted counts as one on which nothing useful fits."""


@cache
def _spec(model: str) -> ModelSpec:
    return ModelSpec.from_config(find_model(model))


@dataclass(frozen=True)
class Row:
    """One published figure; published.yaml says what the fields are."""

    block: str
    name: str
    source: str
    stack: str
    model: str
    unit: str
    setup: Setup
    published: float | None
    at: str
    card: int = 0
    moment: str = "step"
    assumed: str = ""
    calibrates: bool = False

    @property
    def spec(self) -> ModelSpec:
        return _spec(self.model)

    @property
    def published_bytes(self) -> float:
        """The peak, or the card that the published context fills."""
        return self.card * GIB if self.unit == "tokens" else (self.published or 0) * UNITS[self.unit]


@dataclass(frozen=True)
class Result:
    """A row beside its prediction, in the row's unit; errors are shares of what was published.

    predicted_bytes  of the peak; for a context, of the peak at the published context
    """

    row: Row
    predicted: float
    predicted_bytes: float

    @property
    def error(self) -> float | None:
        return None if self.row.published is None else self.predicted / self.row.published - 1

    @property
    def bytes_error(self) -> float | None:
        return None if self.row.published is None else self.predicted_bytes / self.row.published_bytes - 1

    @property
    def agrees(self) -> bool:
        """Of a row without a figure: whether nothing useful is predicted to fit either."""
        return self.predicted < FULL_TO_THE_BRIM


@cache
def rows() -> tuple[Row, ...]:
    """Every published figure in the file's order, every second one of a stack marked as calibrating."""
    found: list[Row] = []
    seen: dict[str, int] = {}
    tokens = stacks.constants()["alpaca_tokens"]["value"]
    for block in read_yaml(FILE)["blocks"].value:
        for entry in block["rows"]:
            made = {**block["setup"], **entry.get("setup", {})}
            if made.get("length") == "alpaca_tokens":
                made["length"] = tokens
            order = seen.get(block["stack"], 0)
            # A row without a figure cannot calibrate; it does not move the others' turn either.
            seen[block["stack"]] = order + (entry["published"] is not None)
            own = {key: entry[key] for key in ("card", "moment", "assumed") if key in entry}
            found.append(
                Row(
                    block=block["id"],
                    name=entry["name"],
                    source=block["source"],
                    stack=block["stack"],
                    model=block["model"],
                    unit=block["unit"],
                    setup=Setup(**made),
                    published=entry["published"],
                    at=entry["at"],
                    calibrates=entry["published"] is not None and order % 2 == 1,
                    **own,
                )
            )
    return tuple(found)


def predict(row: Row, stack: Stack | None = None) -> Result:
    """What the arithmetic gives for a row."""
    stack = stack or stacks.find(row.stack)
    if row.unit == "tokens":
        longest = stacks.longest_context(row.spec, stack, row.setup, row.card * GIB)
        length = int(row.published or 1)
        return Result(row, longest, stacks.peak(row.spec, stack, replace(row.setup, length=length)).total)
    made = stacks.loading if row.moment == "load" else stacks.peak
    total = made(row.spec, stack, row.setup).total
    return Result(row, total / UNITS[row.unit], total)


@cache
def results() -> tuple[Result, ...]:
    """Every row with its prediction."""
    return tuple(predict(row) for row in rows())


def fit(name: str, among: Iterable[Row]) -> float:
    """The activation factor of a stack, to the hundredth, with the least sum of errors in bytes over its rows."""
    stack, own = stacks.find(name), [row for row in among if row.stack == name]
    low, high = stacks.constants()["activation_factor"]["range"]

    def misses(factor: float) -> float:
        tried = replace(stack, activation_factor=factor)
        return sum(abs(peak_bytes(row, tried) / row.published_bytes - 1) for row in own)

    return min((step / 100 for step in range(round(low * 100), round(high * 100) + 1)), key=misses)


def peak_bytes(row: Row, stack: Stack) -> int:
    """The predicted peak of a row; of a context, at the published one."""
    if row.moment == "load":
        return stacks.loading(row.spec, stack, row.setup).total
    setup = replace(row.setup, length=int(row.published or 1)) if row.unit == "tokens" else row.setup
    return stacks.peak(row.spec, stack, setup).total


# -- what the published rows say of themselves ---------------------------------------------------------------------


def line_through(points: Sequence[tuple[float, float]], most: float = 1.0) -> tuple[float, float] | None:
    """(slope, intercept) of the line through the first and the last point if no other is further off than `most`."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    slope = (y1 - y0) / (x1 - x0)
    off = max(abs(y - y0 - slope * (x - x0)) for x, y in points)
    return (slope, y0 - slope * x0) if off <= most else None


def crossing(points: Sequence[tuple[float, float]], rounding: float) -> tuple[tuple[float, float], ...] | None:
    """Two pairs of points, rounded to `rounding`, whose slopes exclude each other: no straight line goes through them.

    Returns the x of both pairs (steeper first), or None if some slope suits every pair.
    """
    spans = []
    for (x0, y0), (x1, y1) in combinations(points, 2):
        middle, slack = (y1 - y0) / (x1 - x0), rounding / (x1 - x0)
        spans.append((middle - slack, middle + slack, (x0, x1)))
    steepest, flattest = max(spans), min(spans, key=lambda span: span[1])
    return (steepest[2], flattest[2]) if steepest[0] > flattest[1] else None
