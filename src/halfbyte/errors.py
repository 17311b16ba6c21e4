"""Errors meant for the user: one line that says what is wrong, where, and what to do.

The command line prints the message without a traceback and leaves with `exit_code`.
Anything else that escapes is a bug of ours and keeps its traceback.
"""

_LONGEST = 2000
"""Characters of a message: a damaged file's names can be of any length, and quotes of them are cut in the middle."""


class HalfbyteError(Exception):
    """The work failed (exit code 1).

    The message is one printable line whatever it quotes: a file that comes from others can have line breaks and a
    terminal's control sequences in its names, or halves of characters that cannot be written at all.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        text = " ".join(str(message).split("\n"))
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 4 :]}"
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


class UsageError(HalfbyteError):
    """A flag, a config key or an input file is wrong; nothing was started (exit code 2)."""

    exit_code = 2


class DoesNotFit(HalfbyteError):
    """The machine's memory or disk cannot hold the job (exit code 3)."""

    exit_code = 3


class Interrupted(HalfbyteError):
    """Stopped from outside with everything saved; `halfbyte resume` continues (exit code 4)."""

    exit_code = 4
