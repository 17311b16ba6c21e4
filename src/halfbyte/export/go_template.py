"""A chat template as a Go template, the language of Ollama's TEMPLATE.

A Jinja template cannot be translated in general, but nearly all of them print a conversation as the same few pieces:
something before and after each role's text, the system's text in a turn of its own or inside a user's turn, and the
beginning of the answer. Those pieces are read off what the template prints for a few conversations, and kept only if
they print the same as the template on others. A template that is not of this kind has no Go template, said as such.

Ollama's side (its template/template.go and docs/template.mdx): `.Messages` with `.Role` and `.Content`, system messages
among them and joined in `.System`; Go's own functions and no `trim`; BOS is added by the tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from halfbyte.data import ChatTemplate
from halfbyte.data.records import RowError
from halfbyte.data.templates import Messages

Place = Literal["turn", "first user", "last user"]
_SYSTEM, _USER, _ANSWER, _AGAIN = "qsystemq", "quserq", "qanswerq", "qagainq"


@dataclass(frozen=True)
class Shape:
    """A chat format in pieces: (before, after) each role's text.

    bos         printed first of all
    lead        printed after it where there is no system message (a default system message, a preamble)
    system      None: the template takes no system message
    place       the system's text is a turn of its own, or stands inside the first or the last user's turn
    generation  the beginning of the answer
    """

    bos: str
    lead: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation: str
    system: tuple[str, str] | None
    place: Place

    def render(self, messages: Messages) -> str:
        """A conversation and the beginning of its answer, as the Go template prints it."""
        texts = [str(m["content"]) for m in messages if m["role"] == "system"]
        users = [i for i, m in enumerate(messages) if m["role"] == "user"]
        inside = {"first user": users[0], "last user": users[-1]}.get(self.place) if self.system and texts else None
        out = self.bos + ("" if texts and self.system else self.lead)
        for i, message in enumerate(messages):
            text = str(message["content"])
            if message["role"] == "system":
                out += text.join(self.system) if self.system and self.place == "turn" else ""
            elif message["role"] == "user":
                own = "\n\n".join(texts).join(self.system) if i == inside and self.system else ""
                out += self.user[0] + own + text + self.user[1]
            else:
                out += text.join(self.assistant)
        return out + self.generation

    def go(self, adds_bos: bool) -> str:
        """The Go template. `adds_bos`: the tokenizer puts BOS first, so the template must not."""
        say = _literal
        out = "" if adds_bos else say(self.bos)
        if self.lead:
            out += f"{{{{ if not .System }}}}{say(self.lead)}{{{{ end }}}}" if self.system else say(self.lead)
        own, inside, before, after = "", "", "", ""
        if self.system is not None:
            first, last = (say(piece) for piece in self.system)
            if self.place == "turn":
                own = f'{{{{ if eq .Role "system" }}}}{first}{{{{ .Content }}}}{last}{{{{ else }}}}'
            elif self.place == "first user":
                before = "{{ $system := .System }}"
                inside = f'{{{{ if $system }}}}{first}{{{{ $system }}}}{last}{{{{ $system = "" }}}}{{{{ end }}}}'
            else:
                inside = f"{{{{ if and $.System (eq $i $last) }}}}{first}{{{{ $.System }}}}{last}{{{{ end }}}}"
                before = "{{ $last := 0 }}{{ range $i, $m := .Messages }}"
                before += '{{ if eq $m.Role "user" }}{{ $last = $i }}{{ end }}{{ end }}'
        over = "range $i, $m := .Messages" if self.place == "last user" and self.system else "range .Messages"
        user = f"{say(self.user[0])}{inside}{{{{ .Content }}}}{say(self.user[1])}"
        answer = f"{say(self.assistant[0])}{{{{ .Content }}}}{say(self.assistant[1])}"
        out += f'{before}{{{{ {over} }}}}{own}{{{{ if eq .Role "user" }}}}{user}'
        out += f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
        after = "{{ end }}" if own else ""
        return f"{out}{after}{{{{ end }}}}{say(self.generation)}"


def _literal(text: str) -> str:
    """Text as it stands in a Go template: only the opening braces of an action mean something."""
    return text.replace("{{", '{{ "{{" }}')


def go_template(template: ChatTemplate, adds_bos: bool) -> str | None:
    """The template in Go's language, or None where it is not of the kind that this module knows.

    adds_bos   whether the tokenizer puts BOS in front of a text
    """
    shape = shape_of(template)
    return None if shape is None else shape.go(adds_bos)


def shape_of(template: ChatTemplate) -> Shape | None:
    """The pieces that a template prints, None where no pieces print the same as it."""
    try:
        found = _read_pieces(template)
    except RowError:
        return None
    if found is None:
        return None
    places: tuple[Place, ...] = ("turn",) if found.place == "turn" else ("first user", "last user")
    for candidate in (replace(found, place=place) for place in places):
        if all(_same(candidate, template, messages) for messages in _probes(found.system is not None)):
            return candidate
    return None


def trims(template: ChatTemplate) -> bool:
    """Whether it drops white space around a user's text, which a Go template of Ollama's cannot."""
    spaced, bare = (template.render(_talk("user", text), prompt=True) for text in (f"  {_USER}\n\n", _USER))
    return spaced == bare


def _read_pieces(template: ChatTemplate) -> Shape | None:
    """The pieces, as a conversation with one system message shows them; `place` is "turn" or "first user"."""
    talk = _split(
        template.render(_talk("user", _USER, "assistant", _ANSWER, "user", _AGAIN), prompt=True),
        _USER, _ANSWER, _AGAIN,
    )  # fmt: skip
    asked = _split(template.render(_talk("user", _USER), prompt=True), _USER)
    unasked = _split(template.render(_talk("user", _USER)), _USER)
    answered = _split(template.render(_talk("user", _USER, "assistant", _ANSWER)), _USER, _ANSWER)
    if talk is None or asked is None or unasked is None or answered is None:
        return None
    first, to_answer, to_user, last = talk
    # Some templates end a conversation that asks for nothing with EOS, which is not part of the turn.
    eos = template.specials.get("eos_token", "")
    after_user = _without_end(unasked[1], to_answer, eos)
    end = _without_end(answered[2], to_user, eos)
    if asked != [first, last] or not (last.startswith(after_user) and to_answer.startswith(after_user)):
        return None
    # A template may leave out the line break behind the last turn: it then belongs to the turn before the next user's.
    before_user = to_user[len(end) :]
    if not first.endswith(before_user):
        before_user = before_user.lstrip()
    after_answer = to_user[: len(to_user) - len(before_user)]
    if not (to_user.startswith(end) and first.endswith(before_user)):
        return None
    lead = first[: len(first) - len(before_user)]
    bos = template.specials.get("bos_token", "")
    bos = bos if bos and lead.startswith(bos) else ""
    shape = Shape(
        bos=bos,
        lead=lead[len(bos) :],
        user=(before_user, after_user),
        assistant=(to_answer[len(after_user) :], after_answer),
        generation=last[len(after_user) :],
        system=None,
        place="turn",
    )
    return _with_system(shape, template)


def _with_system(shape: Shape, template: ChatTemplate) -> Shape | None:
    """The shape with what a system message does; as it is where the template refuses one."""
    try:
        text = template.render(_talk("system", _SYSTEM, "user", _USER), prompt=True)
    except RowError:
        return shape
    pieces = _split(text, _SYSTEM, _USER)
    if pieces is None or not pieces[0].startswith(shape.bos):
        return None
    before, between = pieces[0][len(shape.bos) :], pieces[1]
    user = shape.user[0]
    if between.endswith(user) and not (user and before.startswith(shape.lead + user)):
        return replace(shape, system=(before, between[: len(between) - len(user)]))
    if before.startswith(shape.lead + user) and not shape.lead:
        return replace(shape, system=(before[len(user) :], between), place="first user")
    return None


def _without_end(tail: str, following: str, eos: str) -> str:
    return tail.removesuffix(eos) if eos and not following.startswith(tail) else tail


def _split(text: str, *contents: str) -> list[str] | None:
    """What stands around the contents, None unless each is there once and in this order."""
    pieces = []
    for content in contents:
        before, found, text = text.partition(content)
        if not found or content in text:
            return None
        pieces.append(before)
    return [*pieces, text]


def _talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(turns[::2], turns[1::2], strict=True)]


def _probes(with_system: bool) -> Sequence[list[dict[str, str]]]:
    """Conversations on which pieces and template must agree."""
    short = _talk("user", "What is 2 + 2?")
    long = _talk("user", "Two\nlines {{ here }}", "assistant", "One\n\ntwo", "user", "three?", "assistant", "4",
                 "user", "five")  # fmt: skip
    system = _talk("system", "Be brief.\nAnswer in {{ words }}.")
    return [short, long, system + short, system + long] if with_system else [short, long]


def _same(shape: Shape, template: ChatTemplate, messages: list[dict[str, str]]) -> bool:
    try:
        return shape.render(messages) == template.render(messages, prompt=True)
    except RowError:
        return False
