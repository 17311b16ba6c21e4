"""Errors meant for the user: one line that says what is wrong, where, and what to do.

The command line prints the message without a traceback and leaves with `exit_code`.
Anything else that escapes is a bug of ours and keeps its traceback.
"""


class HalfbyteError(Exception):
    """The work failed (exit code 1)."""

    exit_code = 1


class UsageError(HalfbyteError):
    """A flag, a config key or an input file is wrong; nothing was started (exit code 2)."""

    exit_code = 2


class DoesNotFit(HalfbyteError):
    """The machine's memory or disk cannot hold the job (exit code 3)."""

    exit_code = 3


class Interrupted(HalfbyteError):
    """Stopped from outside with everything saved; `halfbyte resume` continues (exit code 4)."""

    exit_code = 4
