"""What a report says, before it is HTML or Markdown: sections of sentences, tables, drawings and commands.

Text in here is as its author wrote it; the writers escape it. A drawing never stands alone: a `Figure` has the table of
what it shows, which is all that Markdown, a screen reader or a search gets to know.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """A table's cell: its text, and what stands small below it (an interval, how many seeds)."""

    text: str
    note: str = ""
    mark: int | None = None
    """The variant, by its place in the report, whose mark stands before the text."""


@dataclass(frozen=True)
class Column:
    heading: str
    numeric: bool = False
    wide: bool = False
    """Holds sentences or lists: wants room."""


@dataclass(frozen=True)
class Table:
    """The first column heads the rows. Captions are unique in a document: they name the tables."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]
    warning: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and what they are, as in a list of the machine's properties."""

    title: str
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Command:
    """Something to type, and what it is for."""

    label: str
    text: str


@dataclass(frozen=True)
class Drawing:
    """An image and its text. Two `svgs` are the same drawn for a page and for a phone; one is small enough for both."""

    title: str
    description: str
    svgs: Sequence["Svg"]


@dataclass(frozen=True)
class Svg:
    width: float
    height: float
    body: str


@dataclass(frozen=True)
class Figure:
    """Drawings that share a caption and the table of what they show."""

    caption: str
    drawings: Sequence[Drawing]
    table: Table
    legend: Sequence["Key"] = ()


@dataclass(frozen=True)
class Key:
    """One entry of a legend: the swatch's style classes, its letter, and the text."""

    style: str
    letter: str
    text: str


Block = Paragraph | Bullets | Facts | Command | Table | Figure


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """`sentence` is what somebody reads who reads nothing else; `facts` are one line below it."""

    title: str
    sentence: str
    facts: Sequence[str]
    sections: Sequence[Section] = field(default=())
    created: str = ""
