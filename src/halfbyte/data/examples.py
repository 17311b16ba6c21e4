"""Rows as tokens: which ids, which of them are learned, and where the last prompt ends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.encoding import Encoder, Segment
from halfbyte.data.options import Task
from halfbyte.data.records import BadRow, Chat, CodeTests, Completion, Labelled, Origin, Preference, Row, RowError, Text
from halfbyte.data.templates import ChatTemplate, Turns

_CHUNK = 4096  # rows that are rendered and tokenized together; it bounds the memory for their texts

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a document of a batch, or two of them where it is a pair of answers to one prompt.

    input_ids      int32 [n]
    supervised     bool [n]: this token is learned, i.e. it is the target of the position before it; never the first
    prompt_length  tokens before the last answer; 0 where all of it is text
    prompt         what was asked, for people to read: the last message, the prompt, the text to classify
    completion     what should be answered, without the end-of-turn token
    label          classification: the index into Prepared.labels
    target         a trained head: the class that the last position predicts; nothing else is then learned
    source_length  seq2seq: tokens that the encoder reads; what follows is the decoder's
    source         the index of the source in `data` or `eval_data`
    index          the position in Prepared.train or Prepared.eval
    truncated      tokens that did not fit into max_seq_length
    rejected       preference: the worse answer, a document of its own; everything else is then the better one's
    tests          code: what a generated answer must pass
    """

    input_ids: Ids
    supervised: Mask
    origin: Origin
    prompt_length: int = 0
    prompt: str | None = None
    completion: str | None = None
    label: int | None = None
    target: int | None = None
    source_length: int = 0
    source: int = 0
    index: int = 0
    truncated: int = 0
    rejected: "Example | None" = None
    tests: CodeTests | None = None

    def __len__(self) -> int:
        """Tokens in a batch, of a pair those of both documents."""
        return sum(len(document.input_ids) for document in self.documents)

    @property
    def documents(self) -> "tuple[Example, ...]":
        return (self,) if self.rejected is None else (self, self.rejected)

    @property
    def prompt_ids(self) -> Ids:
        """What the model is given when it has to generate the (last) completion."""
        return self.input_ids[: self.prompt_length]

    @property
    def supervised_tokens(self) -> int:
        """What the loss counts: learned tokens, or the one class of a row."""
        return sum(int(document.supervised.sum()) for document in self.documents) + (self.target is not None)


@dataclass(frozen=True, slots=True)
class LabelChoice:
    """A class: `value` in the data, the `word` that stands for it, and the ids after the prompt (EOS included).

    A trained head needs no ids.
    """

    value: int | str
    word: str
    input_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How rows become tokens: all that `encode_rows` needs beside the rows."""

    encoder: Encoder
    max_seq_length: int
    template: ChatTemplate | None = None
    labels: tuple[LabelChoice, ...] = ()
    train_on_inputs: bool = False
    instruction: str | None = None
    task: Task = "causal"


@dataclass(slots=True)
class Draft:
    """A row in segments, before tokenization. `end`: append EOS to the last segment."""

    row: Row
    segments: list[Segment]
    end: bool = False
    prompt: str | None = None
    completions: dict[int, str] | None = None
    label: int | None = None
    exact_prompt: bool = True


# ---------------------------------------------------------------- segments


def classification_prompt(row: Labelled, instruction: str | None = None) -> str:
    """What is classified, and a line that ends in "Label:"."""
    return f"{text_to_classify(row.texts, instruction)}\nLabel:"


def text_to_classify(texts: Sequence[tuple[str, str]], instruction: str | None = None) -> str:
    """The text, or of several each on a line of its own after its column's name; the instruction in front."""
    named = len(texts) > 1
    body = "\n".join(f"{name}: {text}" if named else text for name, text in texts)
    return f"{instruction}\n\n{body}" if instruction else body


def cut(turns: Turns, supervise: Sequence[bool] = ()) -> list[Segment]:
    """A rendered conversation in segments: text before a turn, the turn, text before the next, …, the rest.

    Also the empty ones, so that a prompt and the row that it was taken from are cut alike.
    """
    segments: list[Segment] = []
    position = 0
    for index, (begin, end) in sorted(turns.spans.items()):
        if begin < position:
            raise RowError("the chat template prints the assistant's turns out of order")
        learned = bool(supervise) and supervise[index]
        segments += [Segment(turns.text[position:begin]), Segment(turns.text[begin:end], True, learned)]
        position = end
    return [*segments, Segment(turns.text[position:])]


def draft(row: Row, recipe: Recipe) -> Draft:
    """The segments of a row. Raises RowError if the template refuses it or the label is unknown."""
    if recipe.task == "seq2seq":
        return _draft_seq2seq(row, recipe)
    match row:
        case Chat():
            return _draft_chat(row, recipe)
        case Completion():
            segments = [Segment(row.prompt), Segment(row.completion, True, True)]
            return Draft(row, segments, end=True, prompt=row.prompt, completions={1: row.completion})
        case Labelled() if recipe.task == "classification":
            number, choice = _choice(row, recipe.labels)
            text = text_to_classify(row.texts, recipe.instruction)
            return Draft(row, [Segment(text)], prompt=text, completions={0: choice.word}, label=number)
        case Labelled():
            number, choice = _choice(row, recipe.labels)
            prompt = classification_prompt(row, recipe.instruction)
            segments = [Segment(prompt), Segment(label_text(choice.word), True, True)]
            return Draft(row, segments, end=True, prompt=prompt, completions={1: choice.word}, label=number)
        case Text():
            return Draft(row, [Segment(row.text, True, True)], end=True)
    raise AssertionError(f"no tokens for {type(row).__name__}")


def label_text(word: str) -> str:
    """A label as a completion: after "Label:" comes a space, which most tokenizers hold in the word's own token."""
    return f" {word}"


def _choice(row: Labelled, labels: Sequence[LabelChoice]) -> tuple[int, LabelChoice]:
    """(number, class) of a row. Raises RowError for a label that is none of them."""
    for number, choice in enumerate(labels):
        if choice.value == row.label or choice.word == row.label:
            return number, choice
    known = ", ".join(choice.word for choice in labels)
    raise RowError(f"the label {row.label!r} is not among label_names ({known})")


def _draft_seq2seq(row: Row, recipe: Recipe) -> Draft:
    """Two segments: what the encoder reads and what the decoder writes, each a text of its own. RowError for others."""
    number = None
    match row:
        case Completion():
            source, answer = row.prompt, row.completion
        case Labelled():
            number, choice = _choice(row, recipe.labels)
            source, answer = classification_prompt(row, recipe.instruction), choice.word
        case Chat():
            *before, last = row.messages
            if row.tools or last["role"] != "assistant" or any(m["role"] not in ("system", "user") for m in before):
                raise RowError("an encoder-decoder learns one answer to one text, and this is a conversation of turns")
            source, answer = "\n\n".join(m["content"] for m in before), last["content"]
        case _:
            raise RowError("an encoder-decoder learns an answer to a text, and this row is text alone")
    if not source.strip():
        raise RowError("there is nothing for the encoder to read: the prompt is empty")
    segments = [Segment(source), Segment(answer, True, True)]
    return Draft(row, segments, end=True, prompt=source, completions={1: answer}, label=number)


def _draft_chat(row: Chat, recipe: Recipe) -> Draft:
    assert recipe.template is not None
    turns = recipe.template.turns(row.messages, row.tools, recipe.encoder)
    segments = cut(turns, row.supervise)
    completions = {}
    for number, index in enumerate(sorted(turns.spans)):
        message = row.messages[index]
        printed = segments[2 * number + 1].text
        special = recipe.encoder.special_suffix(printed)
        spoken = message["content"] if not message.get("tool_calls") else printed.removesuffix(special or "").strip()
        completions[2 * number + 1] = spoken
    last = max(index for index, learned in enumerate(row.supervise) if learned)
    asked = row.messages[last - 1]["content"] if last else ""
    return Draft(row, segments, prompt=asked, completions=completions, exact_prompt=turns.exact)


# ---------------------------------------------------------------- tokens


def join(encoder: Encoder, pieces: Sequence[Sequence[int]], raw: bool) -> list[Sequence[int]]:
    """The pieces of one row with its beginning put right: `raw` text gets the tokenizer's BOS, and nothing gets two."""
    pieces = list(pieces)
    first = list(pieces[0])
    if raw and first[: len(encoder.prefix)] != list(encoder.prefix):
        first = [*encoder.prefix, *first]
    while encoder.bos is not None and first[:2] == [encoder.bos, encoder.bos]:
        first.pop(0)
    return [first, *pieces[1:]]


@dataclass(slots=True)
class Encoded:
    """Examples, and what was noticed on the way: rows in which …

    double_bos        two BOS stood at the beginning; one was dropped
    missing_bos       the tokenizer puts a BOS first, and the chat template does not
    unsupervised_eos  the last answer does not end with a special token, so the model does not learn to stop
    prompt_mismatch   the prompt at inference is not the beginning of what is trained
    specials_in_text  the user's text spells out a special token
    glued             prompt and completion meet without white space
    """

    examples: list[Example]
    bad: list[BadRow]
    double_bos: int = 0
    missing_bos: int = 0
    unsupervised_eos: int = 0
    prompt_mismatch: int = 0
    specials_in_text: int = 0
    glued: int = 0


_COUNTS = ("double_bos", "missing_bos", "unsupervised_eos", "prompt_mismatch", "specials_in_text", "glued")


def encode_rows(rows: Sequence[Row], recipe: Recipe, source: int = 0) -> Encoded:
    """Tokenize rows. What cannot be used is set aside with its reason."""
    result = Encoded([], [])
    for start in range(0, len(rows), _CHUNK):
        drafts: list[list[Draft]] = []
        for row in rows[start : start + _CHUNK]:
            try:
                drafts.append([draft(document, recipe) for document in documents(row)])
            except RowError as error:
                result.bad.append(BadRow(row.origin.file, row.origin.line, str(error)))
        encoded = iter(_tokenize([item for items in drafts for item in items], recipe))
        for items in drafts:
            pieces = [next(encoded) for _ in items]
            try:
                if len(items) == 1:
                    result.examples += _examples(items[0], pieces[0], recipe, source, result)
                else:
                    result.examples.append(_pair(items, pieces, recipe, source, result))
            except RowError as error:
                result.bad.append(BadRow(items[0].row.origin.file, items[0].row.origin.line, str(error)))
    return result


def _tokenize(drafts: Sequence[Draft], recipe: Recipe) -> list[list[tuple[int, ...]]]:
    """The ids of each draft's segments."""
    if recipe.task != "seq2seq":
        return recipe.encoder.encode_segments([item.segments for item in drafts])
    sides = recipe.encoder.encode_segments([[segment] for item in drafts for segment in item.segments])
    return [[source[0], answer[0]] for source, answer in zip(sides[::2], sides[1::2], strict=True)]


def documents(row: Row) -> list[Row]:
    """What is tokenized of a row: itself; of a preference, its two conversations."""
    if not isinstance(row, Preference):
        return [row]
    found: list[Row] = []
    for answer in (row.chosen, row.rejected):
        learned = (message["role"] == "assistant" for message in answer)
        found.append(Chat(row.origin, row.prompt + answer, (*(False for _ in row.prompt), *learned)))
    return found


def _pair(
    items: Sequence[Draft], pieces: Sequence[Sequence[Sequence[int]]], recipe: Recipe, source: int, seen: Encoded
) -> Example:
    """The better answer's document, with the worse one's behind it; what is noticed in either counts once."""
    noticed = [Encoded([], []), Encoded([], [])]
    halves = [_examples(i, p, recipe, source, n)[0] for i, p, n in zip(items, pieces, noticed, strict=True)]
    chosen, rejected = halves
    if np.array_equal(chosen.input_ids, rejected.input_ids):
        raise RowError(f"nothing tells the two answers apart within max_seq_length ({recipe.max_seq_length:,} tokens)")
    for name in _COUNTS:
        setattr(seen, name, getattr(seen, name) + max(getattr(part, name) for part in noticed))
    return replace(chosen, rejected=rejected, truncated=chosen.truncated + rejected.truncated)


def _examples(
    item: Draft, pieces: Sequence[Sequence[int]], recipe: Recipe, source: int, seen: Encoded
) -> list[Example]:
    encoder = recipe.encoder
    if recipe.task in ("classification", "seq2seq"):
        seen.specials_in_text += any(encoder.spells_special(segment.text) for segment in item.segments)
        return [(_classified if recipe.task == "classification" else _answered)(item, pieces, recipe, source)]
    raw = not isinstance(item.row, Chat)
    joined = join(encoder, pieces, raw)
    if len(joined[0]) < len(pieces[0]):
        seen.double_bos += 1
    if item.end and list(joined[-1][-1:]) != [encoder.eos]:
        joined[-1] = [*joined[-1], encoder.eos]
    if isinstance(item.row, Text):
        return _windows(np.array(joined[0], dtype=np.int32), item.row.origin, recipe, source)
    example = _example(item, joined, recipe, source)
    _notice(item, joined, encoder, seen)
    return [example]


def _example(item: Draft, pieces: Sequence[Sequence[int]], recipe: Recipe, source: int) -> Example:
    """One example: cut to max_seq_length, and without tokens after the last that is learned (they change nothing)."""
    limit = recipe.max_seq_length
    begins = [0, *accumulate(len(piece) for piece in pieces)]
    ids = np.fromiter((token for piece in pieces for token in piece), dtype=np.int32, count=begins[-1])
    supervised = np.zeros(len(ids), dtype=np.bool_)
    answers = [number for number, segment in enumerate(item.segments) if segment.supervised]
    for number in answers:
        supervised[begins[number] : begins[number + 1]] = True
    if recipe.train_on_inputs:
        supervised[:] = True
    supervised[:1] = False  # nothing comes before the first token that could predict it
    cut_off = max(0, len(ids) - limit)
    ids, supervised = ids[:limit], supervised[:limit]
    if not supervised.any():
        length = begins[answers[0]]
        raise RowError(
            f"nothing is left to learn: the answer begins after {length:,} tokens, max_seq_length is {limit:,}"
        )
    used = int(np.flatnonzero(supervised)[-1]) + 1
    fitting = [number for number in answers if begins[number] < used] or answers[:1]
    return Example(
        input_ids=ids[:used].copy(),
        supervised=supervised[:used].copy(),
        origin=item.row.origin,
        prompt_length=min(begins[fitting[-1]], used),
        prompt=item.prompt,
        completion=(item.completions or {}).get(fitting[-1]),
        label=item.label,
        source=source,
        truncated=cut_off,
        tests=_tests(item),
    )


def _classified(item: Draft, pieces: Sequence[Sequence[int]], recipe: Recipe, source: int) -> Example:
    """A row for a trained head: the text as the tokenizer gives it to transformers' models, cut to max_seq_length."""
    ids = np.array(recipe.encoder.wrap(pieces[0], recipe.max_seq_length), dtype=np.int32)
    if not len(ids):
        raise RowError("the text has no tokens")
    return Example(
        input_ids=ids,
        supervised=np.zeros(len(ids), dtype=np.bool_),
        origin=item.row.origin,
        prompt=item.prompt,
        completion=(item.completions or {}).get(0),
        label=item.label,
        target=item.label,
        source=source,
        truncated=len(recipe.encoder.wrap(pieces[0])) - len(ids),
    )


def _answered(item: Draft, pieces: Sequence[Sequence[int]], recipe: Recipe, source: int) -> Example:
    """A row for an encoder-decoder: source and answer end to end; where both do not fit, the source is cut."""
    encoder, limit = recipe.encoder, recipe.max_seq_length
    answer = encoder.wrap(pieces[1])
    if answer[-1:] != [encoder.eos]:
        answer.append(encoder.eos)
    smallest = len(encoder.wrap(())) + 1
    if len(answer) + smallest > limit:
        raise RowError(f"the answer's {len(answer):,} tokens leave no room for a source: max_seq_length is {limit:,}")
    whole, read = len(encoder.wrap(pieces[0])), encoder.wrap(pieces[0], limit - len(answer))
    supervised = np.zeros(len(read) + len(answer), dtype=np.bool_)
    supervised[len(read) :] = True
    return Example(
        input_ids=np.array([*read, *answer], dtype=np.int32),
        supervised=supervised,
        origin=item.row.origin,
        prompt_length=len(read),
        prompt=item.prompt,
        completion=(item.completions or {}).get(1),
        label=item.label,
        source_length=len(read),
        source=source,
        truncated=whole - len(read),
        tests=_tests(item),
    )


def _tests(item: Draft) -> CodeTests | None:
    return item.row.tests if isinstance(item.row, Chat | Completion) else None


def _notice(item: Draft, pieces: Sequence[Sequence[int]], encoder: Encoder, seen: Encoded) -> None:
    """Count what a user should know about this row."""
    ends = [pieces[number][-1] for number, segment in enumerate(item.segments) if segment.supervised and pieces[number]]
    seen.unsupervised_eos += bool(ends) and ends[-1] not in encoder.special_ids
    seen.prompt_mismatch += not item.exact_prompt
    row = item.row
    if isinstance(row, Chat):
        seen.specials_in_text += any(encoder.spells_special(message["content"]) for message in row.messages)
        seen.missing_bos += encoder.adds_bos and pieces[0][0] != encoder.bos
    elif isinstance(row, Completion):
        seen.specials_in_text += encoder.spells_special(row.prompt) or encoder.spells_special(row.completion)
        glued = row.prompt and not row.prompt[-1].isspace() and not row.completion[0].isspace()
        seen.glued += bool(glued)


def _windows(ids: Ids, origin: Origin, recipe: Recipe, source: int) -> list[Example]:
    """A document in windows that fit, such that each of its tokens is learned exactly once.

    Every window begins with BOS (where the tokenizer has that habit) and, from the second on, repeats the last token
    of the window before, as the context of its first target.
    """
    prefix = np.array(recipe.encoder.prefix, dtype=np.int32)
    if len(prefix) and np.array_equal(ids[: len(prefix)], prefix):
        ids = ids[len(prefix) :]
    step = recipe.max_seq_length - len(prefix)
    if step < 2:
        raise RowError(f"max_seq_length {recipe.max_seq_length} leaves no room for text")
    examples: list[Example] = []
    start = 0
    while start < len(ids) - 1 or not examples:
        window = np.concatenate([prefix, ids[start : start + step]])
        supervised = np.ones(len(window), dtype=np.bool_)
        supervised[: len(prefix) + (start > 0)] = False
        supervised[:1] = False
        if supervised.any():
            examples.append(Example(window, supervised, origin, source=source))
        elif not examples:
            raise RowError("a text of one token: there is nothing to learn")
        start += step - 1
    return examples


# ---------------------------------------------------------------- prompts


def render_prompt(
    tokenizer: Any,
    messages: str | Sequence[dict[str, Any]],
    template: ChatTemplate | None = None,
    add_generation_prompt: bool = True,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """The ids to generate from: a prefix of the ids that the same conversation was trained with.

    A string is taken as it is (as in prompt/completion rows); messages go through the template, with each earlier
    answer tokenized apart, as in training. `tokenizer` may be an Encoder, which saves its preparation.
    Raises RowError if the template refuses the messages.
    """
    encoder = tokenizer if isinstance(tokenizer, Encoder) else Encoder(tokenizer)
    if isinstance(messages, str):
        segments = [Segment(messages)]
    else:
        if template is None:
            raise ValueError("messages need a template")
        segments = cut(template.turns(messages, tools, encoder, prompt=add_generation_prompt))
    pieces = join(encoder, encoder.encode_segments([segments])[0], raw=isinstance(messages, str))
    return [int(token) for piece in pieces for token in piece]
