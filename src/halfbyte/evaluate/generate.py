"""Text from a model: one prompt with its text as it comes, or many at once for an evaluation.

A batch is prompts of similar length, continued together with a key-value cache; a finished one leaves. Each prompt
has a random stream of its own, from the seed and its index, so that what is drawn for it does not depend on what
else is in the batch (its logits may, by the rounding of another matrix shape).
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from halfbyte.data import ChatTemplate, Encoder
from halfbyte.data.templates import stop_ids
from halfbyte.errors import UsageError
from halfbyte.evaluate.sampling import GenerateOptions, next_token, sequence_rng
from halfbyte.evaluate.session import Model, Session, context_length, inference
from halfbyte.evaluate.text import TextStream
from halfbyte.models.seq2seq import Seq2Seq

FinishReason = Literal["eos", "stop", "length"]
_GREEDY = GenerateOptions()
_CONTEXT_TOKENS = 4  # of the prompt, to decode the answer's first word with its space
BATCH_TOKENS = 16_384
"""Most tokens, prompts and answers, that the caches of one batch hold room for."""


class Tokenizer(Protocol):
    """What is needed of a tokenizer; transformers' are such."""

    def decode(self, token_ids: Any, skip_special_tokens: bool = ...) -> Any: ...


@dataclass(frozen=True)
class Generation:
    """A continuation.

    tokens         the new ids; the end-of-text token that ended them is left out
    text           their text, up to a stop text
    finish_reason  "eos": the model ended it; "stop": a stop text came; "length": max_new_tokens or the model's context
    prompt_tokens  how many tokens it continues
    """

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass
class _Sequence:
    """One text in the making. `before` is what it continues: the prompt, or of an encoder-decoder nothing."""

    index: int
    prompt: Sequence[int]
    before: Sequence[int]
    room: int
    stream: TextStream
    rng: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def generation(self) -> Generation:
        assert self.finish_reason is not None
        return Generation(tuple(self.tokens), self.stream.text, self.finish_reason, len(self.prompt))


def end_ids(encoder: Encoder, template: ChatTemplate | None, *configs: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's EOS, the template's end of turn, and what the model's files say.

    `configs` are config.json and generation_config.json, whose `eos_token_id` is a number or a list: a chat model's
    end of turn is often only there.
    """
    found = set(stop_ids(encoder, template))
    for config in configs:
        value = config.get("eos_token_id")
        found.update(value if isinstance(value, list | tuple) else () if value is None else (value,))
    return frozenset(found)


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    options: GenerateOptions = _GREEDY,
    eos_ids: Collection[int] = (),
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue one prompt. `on_text` gets each piece of text as soon as it is certain; together they are `.text`.

    Raises UsageError for an empty prompt and for one that fills the model's context.
    """
    room = _room(0, prompt_ids, options.max_new_tokens, context_length(model))
    with inference(model):
        session = Session(model, len(prompt_ids) + room)
        return generate_in(session, tokenizer, prompt_ids, room, options, eos_ids, on_text)


def generate_in(
    session: Session,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    room: int,
    options: GenerateOptions,
    eos_ids: Collection[int] = (),
    on_text: Callable[[str], None] | None = None,
    index: int = 0,
) -> Generation:
    """Continue a prompt by at most `room` tokens in a session of one sequence, which may hold its beginning already.

    For conversations, where each prompt begins with the one before. The caller is inside `inference`.
    """
    sequence = _sequence(session.model, tokenizer, index, prompt_ids, room, options)
    pending = [list(prompt_ids[session.lengths[0] :])]
    return next(_continue_together(session, pending, [sequence], options, frozenset(eos_ids), on_text))[1]


def generate_batch(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    options: GenerateOptions = _GREEDY,
    eos_ids: Collection[int] = (),
    batch_size: int = 32,
    on_done: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Continue many prompts; the results in the prompts' order. `on_done(index, result)` comes as each ends."""
    limit = context_length(model)
    rooms = [_room(index, prompt, options.max_new_tokens, limit) for index, prompt in enumerate(prompts)]
    sizes = [len(prompt) + room for prompt, room in zip(prompts, rooms, strict=True)]
    results: dict[int, Generation] = {}
    with inference(model):
        for batch in batches(sizes, batch_size):
            live = [_sequence(model, tokenizer, i, prompts[i], rooms[i], options) for i in batch]
            session = Session(model, max(sizes[i] for i in batch), len(batch))
            pending = [prompts[i] for i in batch]
            for index, generation in _continue_together(session, pending, live, options, frozenset(eos_ids), None):
                results[index] = generation
                if on_done is not None:
                    on_done(index, generation)
    return [results[i] for i in range(len(prompts))]


def _sequence(
    model: Model, tokenizer: Tokenizer, index: int, prompt: Sequence[int], room: int, options: GenerateOptions
) -> _Sequence:
    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    before = () if isinstance(model, Seq2Seq) else prompt
    stream = TextStream(decode, options.stop, before[-_CONTEXT_TOKENS:])
    return _Sequence(index, prompt, before, room, stream, sequence_rng(options.seed, index))


def _continue_together(
    session: Session,
    pending: Sequence[Sequence[int]],
    live: list[_Sequence],
    options: GenerateOptions,
    eos_ids: frozenset[int],
    on_text: Callable[[str], None] | None,
) -> Iterator[tuple[int, Generation]]:
    """Feed what is pending, then token after token to all that still go on; each text is yielded when it ends."""
    logits_BV = session.feed(pending)
    while True:
        for sequence, logits_V in zip(live, logits_BV, strict=True):
            seen = None
            if options.repetition_penalty != 1.0:
                seen = torch.tensor([*sequence.before, *sequence.tokens], dtype=torch.int64)
            piece = _take(sequence, next_token(logits_V, options, seen, sequence.rng), eos_ids)
            if piece and on_text is not None:
                on_text(piece)
        yield from ((s.index, s.generation()) for s in live if s.finish_reason)
        going = [i for i, s in enumerate(live) if not s.finish_reason]
        if not going:
            return
        if len(going) < len(live):
            session.keep(going)
            live = [live[i] for i in going]
        logits_BV = session.feed([[s.tokens[-1]] for s in live])


def _take(sequence: _Sequence, token: int, eos_ids: frozenset[int]) -> str:
    """Add the token, decide whether the text has ended, and return the text that became certain."""
    if token in eos_ids:
        sequence.finish_reason = "eos"
        piece = sequence.stream.finish()
    else:
        sequence.tokens.append(token)
        piece = sequence.stream.push(token)
        if len(sequence.tokens) == sequence.room and not sequence.stream.stopped:
            sequence.finish_reason = "length"
            piece += sequence.stream.finish()
    if sequence.stream.stopped:
        sequence.finish_reason = "stop"
    return piece


def _room(index: int, prompt: Sequence[int], max_new_tokens: int, limit: int | None) -> int:
    """How many tokens may follow the prompt."""
    if not prompt:
        raise UsageError(f"prompt {index + 1} is empty: give the model at least one token to continue")
    if limit is None:
        return max_new_tokens
    if len(prompt) >= limit:
        raise UsageError(
            f"prompt {index + 1} has {len(prompt)} tokens and the model's context is {limit}: shorten the prompt"
        )
    return min(max_new_tokens, limit - len(prompt))


def batches(sizes: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of sequences that will grow to `sizes` tokens, similar ones together, the shortest first.

    At most `batch_size` of them, and no more than fit a cache of BATCH_TOKENS (one always does).
    """
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * sizes[i] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
