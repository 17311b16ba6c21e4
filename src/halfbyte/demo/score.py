"""How many held-out requests a model answers exactly right: greedy answers, compared as strict JSON."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from halfbyte.data import Example
from halfbyte.demo.task import is_correct
from halfbyte.evaluate.generate import Tokenizer, generate_batch
from halfbyte.evaluate.intervals import wilson_interval
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.evaluate.session import Model

# The longest answer of the task has 34 tokens in Gemma's vocabulary; a model that has not ended by then is wrong.
ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Answer:
    """One held-out row, and what the model said."""

    request: str
    expected: str
    text: str
    correct: bool


@dataclass(frozen=True)
class Score:
    """All answers of one model, in the order of the rows."""

    answers: tuple[Answer, ...]

    @property
    def correct(self) -> int:
        return sum(answer.correct for answer in self.answers)

    @property
    def exact_match(self) -> float:
        """Share of the rows whose whole object is right."""
        return self.correct / len(self.answers)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of that share: what another draw of rows could have given."""
        return wilson_interval(self.correct, len(self.answers))

    def as_dict(self) -> dict[str, Any]:
        return {
            "rows": len(self.answers),
            "correct": self.correct,
            "exact_match": self.exact_match,
            "exact_match_95": list(self.interval),
            "answers": [asdict(answer) for answer in self.answers],
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Score":
        return cls(tuple(Answer(**answer) for answer in value["answers"]))


def score(model: Model, tokenizer: Tokenizer, examples: Sequence[Example], eos_ids: Collection[int]) -> Score:
    """Let the model answer every example, greedily, until it ends its text or has said far too much."""
    options = GenerateOptions(max_new_tokens=ANSWER_TOKENS)
    prompts = [example.prompt_ids.tolist() for example in examples]
    answers = generate_batch(model, tokenizer, prompts, options, eos_ids, batch_size=32)
    return Score(
        tuple(
            Answer(e.prompt or "", e.completion or "", a.text, is_correct(a.text, e.completion or ""))
            for e, a in zip(examples, answers, strict=True)
        )
    )
