"""Which row format a source is in: decided from its columns, reported, and never guessed.

A format matches when all its columns are there. Exactly one must match; with none or several the error says what was
found and what can be chosen.
"""

import difflib
from collections import Counter
from collections.abc import Sequence

from halfbyte.data.options import RowFormat
from halfbyte.data.records import Record
from halfbyte.errors import UsageError

#: The columns of one or two texts that a label can stand beside, as in GLUE and SuperGLUE.
TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "passage"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)

#: The columns that a format needs; every alternative is a full set.
REQUIRED: dict[RowFormat, tuple[tuple[str, ...], ...]] = {
    "messages": (("messages",),),
    "conversations": (("conversations",),),
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"),),
    "text": (("text",),),
    "classification": tuple((*texts, "label") for texts in TEXT_COLUMNS),
    "preference": (("chosen", "rejected"),),
    "code": (
        ("prompt", "test", "entry_point"),
        ("instruction", "test", "entry_point"),
        ("text", "test_list"),
        ("prompt", "test_list"),
        ("instruction", "tests"),
        ("prompt", "tests"),
    ),
}

#: Columns that a format reads when they are there.
OPTIONAL: dict[RowFormat, tuple[str, ...]] = {
    "messages": ("tools",),
    "conversations": ("system", "tools"),
    "alpaca": ("input", "system", "history"),
    "prompt_completion": ("tools",),
    "text": (),
    "classification": (),
    "preference": ("prompt",),
    "code": ("input", "canonical_solution", "code", "completion", "output", "test_setup_code", "test_imports"),
}

_PARTS = sorted({name for sets in REQUIRED.values() for columns in sets for name in columns}.union(*OPTIONAL.values()))


def check_columns(columns: dict[str, str], records: Sequence[Record], source: str) -> None:
    """Raise UsageError for a mapping from a part that does not exist, or to a column that no row has."""
    present = {name for record in records for name in record.values}
    for part, column in columns.items():
        if part not in _PARTS:
            close = difflib.get_close_matches(part, _PARTS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(_PARTS)}"
            raise UsageError(f"columns: there is no part {part!r}: {hint}")
        if column not in present:
            close = difflib.get_close_matches(column, sorted(present), 1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {_names(present)}"
            raise UsageError(f"columns: {source} has no column {column!r} (for {part!r}): {hint}")


def rename(values: dict[str, object], columns: dict[str, str]) -> dict[str, object]:
    """Give the mapped columns the names of their parts; a mapped part hides a column of the same name."""
    taken = set(columns.values())
    kept = {name: value for name, value in values.items() if name not in taken and name not in columns}
    return kept | {part: values[column] for part, column in columns.items() if column in values}


def detect(names: Sequence[frozenset[str]], source: str, mapped: frozenset[str] = frozenset()) -> RowFormat:
    """The one format that fits the columns of most rows.

    `names`: each row's columns, after renaming. `mapped`: parts that the user named; a format that uses them all is
    preferred over one that does not, because the user said so.
    """
    columns = Counter(names).most_common(1)[0][0]
    found = [row_format for row_format in REQUIRED if fits(row_format, columns)]
    if "classification" in found and "text" in found:
        found.remove("text")  # a text with a label is classification; text alone has none
    if "code" in found:
        found = ["code"]  # tests beside a prompt say what the row is for, whatever else it has
    if mapped and len(found) > 1:
        found = [row_format for row_format in found if mapped <= _parts(row_format)] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{source}: the columns {_names(columns)} fit several row formats: "
            f"choose with data_format: {' or '.join(found)}"
        )
    raise UsageError(f"{source}: cannot tell what a row is from its columns {_names(columns)}: {_advice(columns)}")


def fits(row_format: RowFormat, columns: frozenset[str]) -> bool:
    return any(columns.issuperset(needed) for needed in REQUIRED[row_format])


def _parts(row_format: RowFormat) -> set[str]:
    return {name for columns in REQUIRED[row_format] for name in columns} | set(OPTIONAL[row_format])


def _advice(columns: frozenset[str]) -> str:
    if {"question", "answer"} <= columns:
        return (
            "map them, e.g. columns: {instruction: question, output: answer} (through the chat template) or "
            "{prompt: question, completion: answer} (as they are)"
        )
    needs = "; ".join(f"{name}: {' + '.join(REQUIRED[name][-1])}" for name in REQUIRED)
    return f"map them with columns: {{part: column}} to one of {needs}"


def _names(columns: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(columns)) or "(none)"
