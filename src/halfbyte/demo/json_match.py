"""The demo's metric, and an example of one's own: `halfbyte evaluate RUN --metrics json_match.py:json_match`.

A file of plain Python that needs nothing of halfbyte. Its function takes the model's answer and the row's own, and
returns a number; the mean over the rows is reported.
"""

import json
from typing import Any


def json_match(prediction: str, reference: str) -> bool:
    """Whether an answer is exactly the expected object: strict JSON, nothing around it but white space, equal values.

    The order of keys and the spaces between tokens do not count. Types do: 3 is not "3", 3.0 or true.
    """
    found = _strict_json(prediction)
    return found is not None and _canonical(found) == _canonical(json.loads(reference))


def _strict_json(text: str) -> Any:
    """The parsed value, or None: no text around it, no repeated key, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(dict(pairs)):
            raise ValueError("repeated key")
        return dict(pairs)

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
