"""The contract: what is refused, and that what passes is written back as it came."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from halfbyte.compare.schema import Report
from tests.compare.invented import five


def test_what_passes_comes_back_as_it_was() -> None:
    report = five()
    report["variants"][0]["figures"]["seconds"]["mean"] = 3
    again = json.loads(json.dumps(Report.model_validate(report).model_dump()))
    assert again == json.loads(json.dumps(report))
    assert isinstance(again["variants"][0]["figures"]["seconds"]["mean"], int)


def _set(report: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *way, last = path.split(".")
    at: Any = report
    for step in way:
        at = at[int(step)] if step.isdigit() else at[step]
    at[last] = value
    return report


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("colour", "red", "Extra inputs"),
        ("variants.0.colour", "red", "Extra inputs"),
        ("schema_version", 2, "should be 1"),
        ("variants.0.figures.seconds.mean", float("nan"), "write null"),
        ("variants.0.figures.seconds.mean", 1e19, "write null"),
        ("variants.0.figures.seconds.mean", "12", "should be a valid"),
        ("variants.0.figures.seconds.mean", True, "should be a valid"),
        ("variants.0.figures.seconds.n", -1, "greater than or equal to 0"),
        ("variants.0.figures.fun", {"mean": 1, "n": 1}, "no metric 'fun'"),
        ("variants.1.key", "full", "variant 'full' is there twice"),
        ("variants.1.predicted.joy", {"p50": 1, "p95": 2}, "Input should be"),
        ("comparisons.0.a", "other", "no variant 'other'"),
        ("comparisons.0.verdict", "a wins", "Input should be"),
        ("metrics.0.unit", "furlongs", "Input should be"),
        ("pareto.0.quality_metric", "fun", "no metric 'fun'"),
        ("cells.0.status", "lost", "Input should be"),
        ("cells.1.id", "full-0", "cell 'full-0' is there twice"),
        ("convergence.0.rows.0.variant", "other", "no variant 'other'"),
    ],
)
def test_what_is_wrong_is_refused(path: str, value: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Report.model_validate(_set(five(), path, value))
