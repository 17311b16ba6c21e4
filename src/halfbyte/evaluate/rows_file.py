"""eval_rows.jsonl: what a run did to each of its held-out rows, so that two runs can be compared row by row.

The first line is {"schema_version", "rows"}; then one object a row, in the data's order:

    row                 file name and line
    tokens              supervised tokens (1 of a class, or of a pair of answers)
    nll, base_nll       summed negative log-likelihood after and before; the loss is sum(nll) / sum(tokens)
    scores, base_scores by metric, where any was measured
    label               the right answer, where the metric is accuracy: what a majority is counted over

No text of the rows is in it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.data import Example
from halfbyte.errors import UsageError
from halfbyte.evaluate.evaluate import BaseAndTuned, EvaluateResult, RowResult
from halfbyte.evaluate.metrics import ACCURACY
from halfbyte.files import write_atomic

NAME = "eval_rows.jsonl"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EvalRow:
    """One line of the file."""

    row: str
    tokens: int
    nll: float
    base_nll: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    base_scores: dict[str, float] = field(default_factory=dict)
    label: str | None = None


def rows_of(scores: BaseAndTuned | EvaluateResult) -> list[EvalRow]:
    """The lines of a result; without a base where only the tuned model was measured."""
    if isinstance(scores, EvaluateResult):
        return [_row(row, None) for row in scores.rows]
    return [_row(tuned, base) for tuned, base in zip(scores.tuned.rows, scores.base.rows, strict=True)]


def losses_of(found: Sequence[EvalRow], examples: Sequence[Example]) -> list[RowResult] | None:
    """What `evaluate.row_losses` would find of the model that the lines are of; None where a row is not among them.

    found   lines of the same rows in the same order, or of more rows that begin with them. Those of pairs of answers
            have a loss of another kind
    """
    results = []
    for line, example in zip(found, examples, strict=False):
        if example.rejected is not None or (line.row, line.tokens) != (
            _name(str(example.origin)),
            example.supervised_tokens,
        ):
            return None
        results.append(RowResult(str(example.origin), example.prompt, example.completion, line.nll, line.tokens))
    return results if len(results) == len(examples) else None


def _name(row: str) -> str:
    file, _, line = row.rpartition(":")
    return f"{Path(file).name}:{line}"


def _row(tuned: RowResult, base: RowResult | None) -> EvalRow:
    return EvalRow(
        _name(tuned.row),
        tuned.tokens,
        tuned.nll,
        None if base is None else base.nll,
        tuned.scores,
        {} if base is None else base.scores,
        tuned.reference if ACCURACY in tuned.scores else None,
    )


def write_rows(path: Path, scores: BaseAndTuned | EvaluateResult) -> None:
    """Write the file at `path`, whole or not at all."""
    rows = rows_of(scores)
    head: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "rows": len(rows)}
    lines = [json.dumps(value, ensure_ascii=False) for value in (head, *map(asdict, rows))]
    write_atomic(path, "\n".join(lines) + "\n")


def read_rows(path: Path) -> list[EvalRow]:
    """The rows of a file. UsageError if it is not there or damaged."""
    try:
        head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = [EvalRow(**row) for row in rows]
        if head["schema_version"] > SCHEMA_VERSION or head["rows"] != len(found):
            raise ValueError("rows are missing, or it is of a newer halfbyte")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    return found
