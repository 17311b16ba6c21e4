"""The base of every options class.

A component declares its options once, beside its code; `run.RunConfig` inherits them all and so
is flat, and the command line derives its flags from the fields. Frozen, so that a run is a value.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Options(BaseModel):
    """Frozen fields, unknown keys refused. Give every field a `description`: it is the flag's help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def nearest(wanted: str, names: Iterable[str]) -> str:
    """The end of a message about a module that a model has not: the name that was meant, or all that there are."""
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], leaves, 1)
    return f"did you mean {near[0]}?" if near else f"the model has {', '.join(leaves)}"


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(value: Any) -> Any:
    """Bytes of `6GiB`, `6GB` (10⁹ each), `800M` or a plain number. ValueError for anything else."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError("a size is a number and a unit, as in 6GiB, 6GB or 800MB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


Size = Annotated[int, BeforeValidator(parse_bytes)]
"""A field in bytes that people write with a unit."""
