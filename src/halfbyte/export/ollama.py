"""The Modelfile: what Ollama needs beside the weights to ask a model as it was trained.

    FROM ./model.gguf                           the merged model, or
    FROM qwen2.5:1.5b + ADAPTER ./adapter.gguf  the adapter over a model that Ollama already has
    TEMPLATE, PARAMETER stop, SYSTEM

Without a TEMPLATE Ollama (template/template.go, server/create.go) takes the one of its own list whose Jinja differs
from the file's by fewer than 100 characters, else it lets llama.cpp use the file's, in older versions none at all; so
one is written wherever a Go template prints the same (`export.go_template`), and where none does, that is said.

Quoting, as parser/parser.go reads it: a value in three quotes ends at the first line end that three quotes stand
before, nothing can be escaped, and characters that do not print are dropped. What cannot be written is left out, and
that is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.data import ChatTemplate
from halfbyte.export.go_template import go_template, trims

MODELFILE = "Modelfile"
RAW = "{{ .Prompt }}"
"""The template of a model that continues text."""


@dataclass(frozen=True)
class Modelfile:
    """`text` of the file, and `notes`: what Ollama will do otherwise than the trained model, for people to read."""

    text: str
    notes: tuple[str, ...]


def modelfile(
    base: str,
    template: ChatTemplate | None,
    adds_bos: bool,
    stop: Sequence[str] = (),
    system: str | None = None,
    adapter: str | None = None,
) -> Modelfile:
    """The Modelfile of an export.

    base       what stands after FROM: `./model.gguf`, or a model's name in Ollama
    template   the run's; None for one that was trained on plain text
    adds_bos   whether the tokenizer puts BOS in front of a text
    stop       texts at which an answer ends
    system     a system text to ask with where the user gives none
    adapter    what stands after ADAPTER, None for a merged model
    """
    lines, notes = [f"FROM {base}"], []
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    go = RAW if template is None else go_template(template, adds_bos)
    written = None if go is None else quoted(go)
    if written is not None:
        lines.append(f"TEMPLATE {written}")
    else:
        notes.append(_no_template(template.name if template else "", adapter is not None))
    if template is not None and written is not None and trims(template):
        notes.append("the chat template drops white space around a message and Ollama's copy of it cannot: send none")
    for text in dict.fromkeys(stop):
        one = quoted(text)
        if one is not None:
            lines.append(f"PARAMETER stop {one}")
        else:
            notes.append(f"the stop text {text!r} cannot be written in a Modelfile: it is left out")
    if system:
        one = quoted(system)
        if one is not None:
            lines.append(f"SYSTEM {one}")
        else:
            notes.append("the system text cannot be written in a Modelfile: send it with every conversation")
    comments = [f"# {line}" for note in notes for line in note.splitlines()]
    return Modelfile("\n".join([*comments, *lines]) + "\n", tuple(notes))


def quoted(text: str) -> str | None:
    """A value in quotes as Ollama's parser takes it back unchanged, None where it could not."""
    if any(not (c.isprintable() or c in "\n\t") for c in text):
        return None
    if "\n" not in text and '"' not in text:
        return f'"{text}"'
    value = f'"""{text}"""'
    ends = [i for i, c in enumerate(value) if c == "\n"]
    early = any(len(done) >= 6 and done.endswith('"""') for done in (value[:i].strip() for i in ends))
    return None if early else value


def _no_template(name: str, over_base: bool) -> str:
    if over_base:
        return f"the chat template {name!r} has no form in Go's template language: Ollama keeps the base model's own"
    return (
        f"the chat template {name!r} has no form in Go's template language: Ollama falls back to what it makes of the "
        "GGUF file's (it detects a few; newer versions use the file's own): see `ollama show --template`"
    )
