"""halfbyte's 4-bit kernels inside bitsandbytes: scripts on transformers, PEFT and bitsandbytes run them unchanged.

Off unless asked for: HALFBYTE_BNB=1 in the environment, which bitsandbytes' own discovery of backends (entry points of
the group `bitsandbytes.backends`) reads at import through `autoload`, or a call of `enable()`. `kernels.py` says which
operators are taken, for CPU tensors only.

Nothing of bitsandbytes is patched: its operators are overridden at torch's dispatcher, and `disable()` undoes that.
"""

import inspect
import os
import warnings
from typing import Any

import torch

from halfbyte.errors import UsageError

__all__ = ["autoload", "disable", "enable", "enabled"]

VARIABLE = "HALFBYTE_BNB"

# Dropping a torch.library.Library gives the operators back to whoever had them.
_registered: list[Any] = []


def autoload() -> None:
    """bitsandbytes calls this at its import: `enable()` if HALFBYTE_BNB=1. Raises UsageError for another value."""
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise UsageError(f"{VARIABLE}={asked} is neither 0 nor 1")
    if asked == "1":
        enable()


def enabled() -> bool:
    return bool(_registered)


def enable() -> None:
    """Take bitsandbytes' operators over for CPU tensors, at once and for the whole process. Again: no effect.

    Raises UsageError where halfbyte has no native kernels, and where bitsandbytes is missing or has other operators
    than those this was written for.
    """
    if _registered:
        return
    from halfbyte.bnb_backend import kernels
    from halfbyte.ops import backend

    if backend().name == "reference":
        raise UsageError(f"{VARIABLE}: halfbyte has nothing faster than bitsandbytes here: {backend()}")
    try:
        import bitsandbytes  # noqa: F401 - defines the operators; where this runs inside its import, it already has
    except ImportError as error:
        raise UsageError(f"{VARIABLE}: bitsandbytes cannot be imported: {error}") from error
    if _registered:  # by that import, through `autoload`
        return
    for name, kernel in kernels.KERNELS.items():
        _check(name, list(inspect.signature(kernel).parameters))
    kernels.remember_previous()
    library: Any = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        # What torch says of the first override in a process; this one was asked for.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name, kernel in kernels.KERNELS.items():
            library.impl(name, kernel, "CPU")
    _registered.append(library)


def disable() -> None:
    """Give the operators back to bitsandbytes."""
    _registered.clear()


def _check(operator: str, expected: list[str]) -> None:
    name, _, overload = operator.partition(".")
    try:
        schema = getattr(getattr(torch.ops.bitsandbytes, name), overload or "default")._schema
    except AttributeError:
        raise UsageError(f"{VARIABLE}: this version of bitsandbytes has no operator {operator}") from None
    found = [argument.name for argument in schema.arguments]
    if found != expected:
        raise UsageError(
            f"{VARIABLE}: this version of bitsandbytes has an operator {operator} with the arguments "
            f"{', '.join(found)}; {', '.join(expected)} is known (0.50.2)"
        )
