"""A conversation as text, and which of that text is the assistant's.

The assistant's turns are found from the structure of what the template prints, never by searching for marker strings:

1. A template with `{% generation %}` blocks says so itself.
2. Otherwise turn i begins where the prompt for it ends, i.e. at the length of the rendering of the messages before it
   with the generation prompt, and ends where the rendering of the messages up to it ends. Both hold only if these
   renderings are prefixes of the whole text, which is checked; so what is learned is exactly what the model will have
   to generate after the prompt it will be given (an empty thinking block that the template inserts included).
3. A template that prints a turn in another way once more turns follow (it drops old reasoning, say) fails that check
   for this turn. Then the turn is located with marker characters around its content, provided that the text without
   the markers equals the text rendered without them.
4. If that fails too, the row is unusable and the reason says so.

A turn ends with its end-of-turn token, if the template prints one there: that token is supervised. White space after it
is not, because no one generates it.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from halfbyte.data.builtin_templates import BUILTINS, DEFAULT
from halfbyte.data.encoding import Encoder
from halfbyte.data.jinja import MARK_BEGIN, MARK_END, compile_template, plain
from halfbyte.data.records import RowError
from halfbyte.errors import UsageError

Messages = Sequence[dict[str, Any]]
Span = tuple[int, int]

_DEFAULT_DATE = "2024-07-26"


@dataclass(frozen=True, slots=True)
class Turns:
    """A rendered conversation. `spans`: message index -> where in `text` that turn of the assistant stands.

    `exact`: the text before each span is what the model is given as the prompt when it has to generate that turn.
    """

    text: str
    spans: dict[int, Span]
    exact: bool


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with all that its output depends on.

    `origin` says where it came from, for messages. `specials`: bos_token, eos_token and the tokenizer's other names.
    """

    name: str
    source: str
    specials: dict[str, str] = field(repr=False)
    origin: str = ""
    date: str = _DEFAULT_DATE

    @property
    def hash(self) -> str:
        """SHA-256 over everything that its output depends on, in hex."""
        parts = [self.source, self.date, *(f"{name}={text}" for name, text in sorted(self.specials.items()))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def render(self, messages: Messages, tools: list[dict[str, Any]] | None = None, prompt: bool = False) -> str:
        """The conversation as text; `prompt` adds the beginning of the assistant's next turn. Raises RowError."""
        text = self._render(plain(messages), plain(tools), prompt)
        return _unmark(text)[0]

    def _render(self, messages: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
        template = compile_template(self.source, self.date)
        aliased = [_with_reasoning(message) for message in messages]
        try:
            return template.render(
                messages=aliased, tools=tools, documents=None, add_generation_prompt=prompt, **self.specials
            )
        except TemplateError as error:
            raise RowError(
                f"the chat template {self.name!r} refuses it: {error.message or type(error).__name__}"
            ) from None
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise RowError(f"the chat template {self.name!r} fails on it: {error}") from None

    def turns(
        self, messages: Messages, tools: list[dict[str, Any]] | None, encoder: Encoder, prompt: bool = False
    ) -> Turns:
        """The conversation as text, with the span of each turn of the assistant.

        `prompt` adds the beginning of the assistant's next turn. Raises RowError if the template does not tell which
        text is the assistant's.
        """
        rows = plain(messages)
        marked = self._render(rows, plain(tools), prompt)
        assistants = [index for index, message in enumerate(rows) if message["role"] == "assistant"]
        if MARK_BEGIN in marked:
            return self._generation_turns(rows, tools, marked, assistants)
        spans: dict[int, Span] = {}
        located: dict[int, Span] | None = None
        exact = True
        for index in assistants:
            begin, end = self._prefix_span(rows, tools, marked, index, prompt)
            if begin is None or end is None:
                if located is None:
                    located = self._locate_contents(rows, tools, marked, prompt)
                if index not in located:
                    raise RowError(
                        f"the chat template {self.name!r} prints earlier turns in another way later on, so that the "
                        f"assistant's part of messages[{index}] cannot be told: put it in {{% generation %}} blocks"
                    )
                exact = exact and begin is not None
                begin = located[index][0] if begin is None else begin
                end = _after_special(marked, located[index][1], encoder) if end is None else end
            spans[index] = (begin, _end_of_turn(marked, begin, end, encoder))
        return Turns(marked, spans, exact)

    def _generation_turns(self, messages: Messages, tools: Any, marked: str, assistants: list[int]) -> Turns:
        """Turns from the template's own `{% generation %}` blocks, the k-th for the k-th assistant message."""
        text, spans = _unmark(marked)
        if len(spans) != len(assistants):
            raise RowError(
                f"the chat template {self.name!r} has {len(spans)} {{% generation %}} blocks here "
                f"for {len(assistants)} messages of the assistant"
            )
        last = self._try_render(messages[: assistants[-1]], tools, prompt=True)
        exact = last is not None and _unmark(last)[0] == text[: spans[-1][0]]
        return Turns(text, dict(zip(assistants, spans, strict=True)), exact)

    def _prefix_span(
        self, messages: Messages, tools: Any, text: str, index: int, prompt: bool
    ) -> tuple[int | None, int | None]:
        """Where turn `index` begins and ends by rendering the conversation up to it; None where that is no prefix."""
        before = self._try_render(messages[:index], tools, prompt=True)
        whole = index == len(messages) - 1 and not prompt
        upto = text if whole else self._try_render(messages[: index + 1], tools, prompt=False)
        begin = len(before) if before is not None and text.startswith(before) else None
        end = len(upto) if upto is not None and text.startswith(upto) else None
        if begin is not None and end is not None and begin > end:
            return None, end
        return begin, end

    def _try_render(self, messages: Messages, tools: Any, prompt: bool) -> str | None:
        """A part of a conversation, which some templates refuse although they take the whole."""
        try:
            return self._render(list(messages), plain(tools), prompt)
        except RowError:
            return None

    def _locate_contents(self, messages: Messages, tools: Any, text: str, prompt: bool) -> dict[int, Span]:
        """The spans of the assistant's contents in `text`, found with markers; empty if the markers change the text."""
        if MARK_BEGIN in text or MARK_END in text:
            return {}
        wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("content", "").strip()]
        copies = [dict(message) for message in messages]
        for index in wanted:
            copies[index]["content"] = _mark(copies[index]["content"])
        marked = self._try_render(copies, tools, prompt)
        if marked is None or _unmark(marked)[0] != text:
            return {}
        begins = [at for at, char in enumerate(marked) if char == MARK_BEGIN]
        ends = [at for at, char in enumerate(marked) if char == MARK_END]
        if len(begins) != len(wanted) or len(ends) != len(wanted):
            return {}
        # 2k markers stand before the k-th begin, and one more before its end.
        return {i: (b - 2 * k, e - 2 * k - 1) for k, (i, b, e) in enumerate(zip(wanted, begins, ends, strict=True))}


def stop_ids(encoder: Encoder, template: ChatTemplate | None) -> tuple[int, ...]:
    """The ids at which a generated answer ends: EOS, and the template's end-of-turn token where that is another."""
    found = [encoder.eos] if encoder.tokenizer.eos_token_id is not None else []
    if template is not None:
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            turns = template.turns(probe, None, encoder)
        except RowError:  # a template for other conversations than this one; its rows will tell
            return tuple(found)
        begin, end = turns.spans[1]
        if special := encoder.special_suffix(turns.text[begin:end]):
            found.append(int(encoder.tokenizer.convert_tokens_to_ids(special)))
    return tuple(dict.fromkeys(found))


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning goes by three names; templates read `reasoning_content` or `thinking`."""
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((message[name] for name in names if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _unmark(marked: str) -> tuple[str, list[Span]]:
    """The text without markers, and the spans that they enclosed."""
    text = ""
    spans: list[Span] = []
    for piece in re.split(f"({MARK_BEGIN}[^{MARK_END}]*{MARK_END})", marked):
        if piece.startswith(MARK_BEGIN):
            spans.append((len(text), len(text) + len(piece) - 2))
            piece = piece[1:-1]
        text += piece
    return text, spans


def _mark(content: str) -> str:
    """Markers inside the outer white space, so that a template that trims the content still does."""
    inner = content.strip()
    before = len(content) - len(content.lstrip())
    return content[:before] + MARK_BEGIN + inner + MARK_END + content[before + len(inner) :]


def _after_special(text: str, position: int, encoder: Encoder) -> int:
    """Past the special token that follows at `position`, white space aside; `position` if none does."""
    space = len(text[position:]) - len(text[position:].lstrip())
    special = encoder.special_prefix(text[position + space :])
    return position + space + len(special) if special else position


def _end_of_turn(text: str, begin: int, end: int, encoder: Encoder) -> int:
    """Without the white space after an end-of-turn token; everything, where there is no such token."""
    stripped = text[begin:end].rstrip()
    return begin + len(stripped) if encoder.special_suffix(stripped) else end


def resolve_template(option: str, encoder: Encoder, date: str = _DEFAULT_DATE) -> ChatTemplate:
    """The template that `chat_template` asks for: `auto`, a built-in's name, or a file's path.

    Raises UsageError if it is none of these, does not compile, or needs special tokens that the vocabulary lacks.
    """
    specials = _special_names(encoder.tokenizer)
    own = getattr(encoder.tokenizer, "chat_template", None)
    if option == "auto" and own:
        source = own if isinstance(own, str) else own.get("default", "")
        return _checked(ChatTemplate("auto", source, specials, "the tokenizer's own", date))
    if option in BUILTINS or option == "auto":
        name = DEFAULT if option == "auto" else option
        reason = "the default: the tokenizer has no template of its own" if option == "auto" else "built in"
        return _checked(ChatTemplate(name, _builtin_source(name, encoder), specials, reason, date))
    path = Path(option).expanduser()
    if not path.is_file():
        known = ", ".join(BUILTINS)
        raise UsageError(f"chat_template: {option!r} is neither auto, nor built in ({known}), nor a file")
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"chat_template: {option} cannot be read: {error}") from None
    return _checked(ChatTemplate(path.name, source, specials, option, date))


def _builtin_source(name: str, encoder: Encoder) -> str:
    builtin = BUILTINS[name]
    missing = [token for token in builtin.needs if not encoder.has_token(token)]
    if missing:
        raise UsageError(
            f"chat_template: {name} needs the tokens {', '.join(missing)}, which this model's vocabulary lacks: "
            f"use {DEFAULT}"
        )
    if not builtin.needs:
        assert encoder.eos is not None  # raises where there is none: these end a turn with EOS
    bos = "{{- bos_token -}}" if encoder.adds_bos else ""
    return bos + builtin.source.removeprefix("BOS")


def _special_names(tokenizer: Any) -> dict[str, str]:
    names = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    return {"bos_token": "", "eos_token": "", **names}


def _checked(template: ChatTemplate) -> ChatTemplate:
    try:
        compile_template(template.source, template.date)
    except TemplateSyntaxError as error:
        raise UsageError(
            f"chat_template: {template.origin} is not valid Jinja (line {error.lineno}): {error.message}"
        ) from None
    except ValueError:
        raise UsageError(f"chat_template_date: {template.date!r} is not a date (year-month-day)") from None
    return template
