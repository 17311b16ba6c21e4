"""The base of every options class.

A component declares its options once, beside its code; `run.RunConfig` inherits them all and so
is flat, and the command line derives its flags from the fields. Frozen, so that a run is a value.
"""

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Frozen fields, unknown keys refused. Give every field a `description`: it is the flag's help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
