"""The values that pass between the steps of `data`: where a row came from, what it is, what was wrong with it.

raw record (a dict and its origin)  ->  row (Chat, Completion, Text, Labelled or Preference)  ->  Example (tokens)
"""

from dataclasses import dataclass, field
from typing import Any

from halfbyte.errors import UsageError


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row was read: the file (or Hub id) and its 1-based line; in Parquet and on the Hub the row's number."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class RowError(UsageError):
    """This one row is unusable; the message is the reason. While data is read it becomes a BadRow with its origin."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row as it was read: column -> value."""

    origin: Origin
    values: dict[str, Any]


@dataclass(slots=True)
class RawData:
    """What reading a source gave."""

    records: list[Record] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    #: Names of integer labels that the source itself declares (a Hub data set's ClassLabel).
    label_names: tuple[str, ...] | None = None

    def extend(self, other: "RawData") -> None:
        self.records += other.records
        self.bad += other.bad
        self.notes += other.notes
        self.label_names = self.label_names or other.label_names


@dataclass(frozen=True, slots=True)
class CodeTests:
    """What an answer of code must pass.

    program      Python source, run behind the answer; it raises where the answer is wrong
    prompt       source that the answer continues (a signature, a docstring), or None
    entry_point  the function that the tests call, where the row names it
    """

    program: str
    prompt: str | None = None
    entry_point: str | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation. `supervise[i]` says whether message i, if it is the assistant's, is learned."""

    origin: Origin
    messages: list[dict[str, Any]]
    supervise: tuple[bool, ...]
    tools: list[dict[str, Any]] | None = None
    tests: CodeTests | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its completion, taken as they are: no template, an EOS after the completion."""

    origin: Origin
    prompt: str
    completion: str
    tests: CodeTests | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A document, all of which is learned."""

    origin: Origin
    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """One or two named texts and a label: an integer, or a word."""

    origin: Origin
    texts: tuple[tuple[str, str], ...]
    label: int | str


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a better and a worse answer, as message lists."""

    origin: Origin
    prompt: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]


Row = Chat | Completion | Text | Labelled | Preference
