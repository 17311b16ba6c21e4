"""A conversation with a model, without a terminal: history, streaming, commands, base or tuned.

What the model has read stays in its key-value cache from turn to turn, so that a long conversation costs only its new
tokens; a template that prints earlier turns in another way later on is noticed, and read again from there.
"""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

from halfbyte.adapters import disabled
from halfbyte.data import ChatTemplate, Encoder, render_prompt
from halfbyte.data.records import RowError
from halfbyte.errors import UsageError
from halfbyte.evaluate.generate import Generation, generate_in
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.evaluate.session import Model, Session, context_length, inference

Message = dict[str, Any]
COMMANDS = {
    "/reset": "forget the conversation",
    "/undo": "forget the last question and its answer",
    "/base": "answer without the adapter",
    "/tuned": "answer with the adapter",
    "/system TEXT": "begin anew with this system message",
    "/help": "this list",
}
MAX_CONTEXT = 8192
"""Tokens of a conversation, however many the model could take: the cache for them is set aside at the start."""


class ChatSession:
    """A conversation. `messages` is its history in OpenAI's form; `tuned` says whether the adapters are on.

    encoder    around the model's tokenizer
    template   how messages become text
    end_ids    the ids that end an answer (`generate.end_ids`)
    """

    def __init__(
        self,
        model: Model,
        encoder: Encoder,
        template: ChatTemplate,
        options: GenerateOptions | None = None,
        end_ids: Collection[int] = (),
        system: str | None = None,
        tuned: bool = True,
    ) -> None:
        self.model, self.encoder, self.template = model, encoder, template
        self.options = options or GenerateOptions()
        self.end_ids = frozenset(end_ids)
        self.system = system
        self.tuned = tuned
        self.messages: list[Message] = []
        self.capacity = min(context_length(model) or MAX_CONTEXT, MAX_CONTEXT)
        self._session: Session | None = None
        self._held: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def undo(self) -> bool:
        """Forget the last question and answer; False where there is none."""
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            return False
        del self.messages[-2:]
        return True

    def use(self, tuned: bool) -> None:
        """Switch between base and tuned. The conversation stays, what the other model made of it does not."""
        if tuned != self.tuned:
            self.tuned = tuned
            self._session = None

    def command(self, line: str) -> str | None:
        """Carry out a line that begins with "/" and return what to tell the user; None for anything else.

        Raises UsageError for a command that does not exist.
        """
        if not line.startswith("/"):
            return None
        word, _, rest = line.strip().partition(" ")
        if word == "/reset":
            self.reset()
            return "The conversation starts anew."
        if word == "/undo":
            return "Forgot the last question and answer." if self.undo() else "There is nothing to forget."
        if word in ("/base", "/tuned"):
            self.use(word == "/tuned")
            return "The tuned model answers." if self.tuned else "The base model answers, the adapter is off."
        if word == "/system" and rest.strip():
            self.system = rest.strip()
            self.reset()
            return "The conversation starts anew with this system message."
        if word == "/help":
            width = max(map(len, COMMANDS))
            return "\n".join(f"{name:<{width}}  {text}" for name, text in COMMANDS.items())
        raise UsageError(f"there is no command {line.strip()!r}; there are {', '.join(COMMANDS)}")

    def send(self, text: str, on_text: Callable[[str], None] | None = None) -> Generation:
        """Ask, and get the answer, which joins the history. `on_text` gets it in pieces as it comes.

        If anything goes wrong on the way, an interruption included, the history is as it was before.
        Raises UsageError where the template refuses the messages or the conversation has filled the context.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(asked)
        session = self._read_so_far(prompt)
        self._session = None  # until it is known what it holds
        room = min(self.options.max_new_tokens, self.capacity - len(prompt))
        with inference(self.model), nullcontext() if self.tuned else disabled(self.model):
            answer = generate_in(
                session,
                self.encoder.tokenizer,
                prompt,
                room,
                self.options,
                self.end_ids,
                None if on_text is None else _without_leading_space(on_text),
                index=len(asked),
            )
        self._held = [*prompt, *answer.tokens][: session.lengths[0]]
        self._session = session
        self.messages = [*asked, {"role": "assistant", "content": answer.text.strip()}]
        return answer

    def _prompt(self, messages: list[Message]) -> list[int]:
        try:
            prompt = render_prompt(self.encoder, messages, self.template)
        except RowError as error:
            raise UsageError(f"this conversation cannot be put to the model: {error}") from None
        if len(prompt) >= self.capacity:
            raise UsageError(
                f"the conversation has {len(prompt):,} tokens and there is room for {self.capacity:,}: use /reset"
            )
        return prompt

    def _read_so_far(self, prompt: list[int]) -> Session:
        """A session that holds as much of the prompt's beginning as was read before; at least one token is left."""
        if self._session is None:
            self._held = []
            return Session(self.model, self.capacity)
        same = 0
        for a, b in zip(self._held, prompt[:-1], strict=False):
            if a != b:
                break
            same += 1
        self._session.rewind([same])
        return self._session


def _without_leading_space(on_text: Callable[[str], None]) -> Callable[[str], None]:
    """SentencePiece models begin an answer with a space that belongs to the word, not to the answer."""
    begun = False

    def pass_on(piece: str) -> None:
        nonlocal begun
        if not begun:
            piece = piece.lstrip()
            begun = bool(piece)
        if piece:
            on_text(piece)

    return pass_on
