"""What a model says, on a terminal and in a pipe."""

import io
import sys

import pytest

from halfbyte.cli import screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_no_control_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    screen.write("red \x1b[31malert\x07\n\tü")
    assert out.getvalue() == "red \ufffd[31malert\ufffd\n\tü"


def test_a_pipe_gets_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    screen.write("red \x1b[31malert")
    assert out.getvalue() == "red \x1b[31malert"
