"""A document as Markdown: the same words, the same tables, the same order; a drawing is its table.

Written for two readers, a code host and a terminal: pipe tables with aligned columns, and as few escapes as keep text
from becoming markup.
"""

import re
from collections.abc import Sequence

from halfbyte.compare.page import document as doc
from halfbyte.compare.page.text import clean, clean_lines

_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")
_OPENING = re.compile(r"^(\d{1,9})([.)])|^([#+=-])")


def page(document: doc.Document) -> str:
    """The whole file, as text."""
    parts = [
        f"# {_text(document.title)}",
        f"**{_text(document.sentence)}**" if clean(document.sentence).strip() else "",
    ]
    parts.append("\n".join(f"- {_line(fact)}" for fact in document.facts))
    for section in document.sections:
        parts.append(f"## {_text(section.title)}")
        parts += [_block(block) for block in section.blocks]
    parts.append(
        f"Made {_text(document.created)}. `report.json` has the same data for programs, `report.html` has the drawings."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _text(text: str) -> str:
    """`text` so that it reads as itself: also `<script>`, pipes in tables and stars."""
    escaped = clean(text).strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(lambda match: "\\" + match[0], escaped)


def _line(text: str) -> str:
    """`text` where a line begins: no list, no heading."""
    return _OPENING.sub(lambda m: f"{m[1]}\\{m[2]}" if m[1] else f"\\{m[3]}", _text(text))


def _block(block: doc.Block) -> str:
    match block:
        case doc.Paragraph():
            return _line(block.text)
        case doc.Bullets():
            said = "**Warning:** " if block.warning else ""
            return "\n".join(f"- {said}{_text(item) if said else _line(item)}" for item in block.items)
        case doc.Facts():
            facts = "\n".join(f"- {_text(name)}: {_text(value)}" for name, value in block.items)
            return f"### {_text(block.title)}\n\n{facts}"
        case doc.Command():
            return f"### {_text(block.label)}\n\n{_fenced(clean_lines(block.text))}"
        case doc.Table():
            return _table(block)
        case doc.Figure():
            return _table(block.table)


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"


def _table(table: doc.Table) -> str:
    rows = [[_text(column.heading) for column in table.columns]]
    rows += [[_text(f"{cell.text} ({cell.note})" if cell.note else cell.text) for cell in row] for row in table.rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.columns))]
    lines = [_row(row, widths, table.columns) for row in rows]
    rule = "|".join(
        f" {'-' * (size - 1)}{':' if column.numeric else '-'} "
        for size, column in zip(widths, table.columns, strict=True)
    )
    return "\n".join([f"**{_text(table.caption)}**", "", lines[0], f"|{rule}|", *lines[1:]])


def _row(row: list[str], widths: list[int], columns: Sequence[doc.Column]) -> str:
    cells = (
        text.rjust(size) if column.numeric else text.ljust(size)
        for text, size, column in zip(row, widths, columns, strict=True)
    )
    return "| " + " | ".join(cells) + " |"
