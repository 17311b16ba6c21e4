"""A document as one HTML file: style, script and drawings are in it, and its policy lets nothing else be loaded.

It is read with the eyes, with a screen reader and on paper: drawings are images with a title and a description, their
tables are folded in below them and unfolded for printing, and tables that are wider than the page scroll by themselves.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources
from itertools import count

from halfbyte.compare.page import document as doc
from halfbyte.compare.page.svg import colour, shape
from halfbyte.compare.page.text import clean, clean_lines

_LONG_WORD = 24


def page(document: doc.Document) -> str:
    """The whole file, as text."""
    return _Writer().page(document)


@cache
def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(text: str) -> str:
    return escape(clean(text))


class _Writer:
    """Writes a document once: it hands out the ids by which names and what they name find each other."""

    def __init__(self) -> None:
        self._ids = count(1)

    def _id(self) -> str:
        return f"n{next(self._ids)}"

    def page(self, document: doc.Document) -> str:
        style, script = _asset("report.css"), _asset("report.js")
        allowed = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:"
        policy = f"{allowed}; base-uri 'none'; form-action 'none'"
        sources = "report.json beside this page has the same data for programs, report.md for terminals."
        title = _text(document.title)
        links = "".join(f'<li><a href="#{section.id}">{_text(section.title)}</a></li>' for section in document.sections)
        facts = "".join(f"<li>{_text(fact)}</li>" for fact in document.facts)
        body = "\n".join(self._section(section) for section in document.sections)
        return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="halfbyte compare">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#report">Skip to the report</a>
<header><p>halfbyte compare</p></header>
<main id="report" tabindex="-1">
<h1>{title}</h1>
<p class="sentence">{_text(document.sentence)}</p>
<ul class="facts">{facts}</ul>
<nav aria-label="Sections"><ul>{links}</ul></nav>
{body}
</main>
<footer><p>Made {_text(document.created)}. {sources}</p></footer>
<script>{script}</script>
</body>
</html>
"""

    def _section(self, section: doc.Section) -> str:
        blocks = "\n".join(self._block(block) for block in section.blocks)
        return f'<section id="{section.id}">\n<h2>{_text(section.title)}</h2>\n{blocks}\n</section>'

    def _block(self, block: doc.Block) -> str:
        match block:
            case doc.Paragraph():
                return f"<p>{_text(block.text)}</p>"
            case doc.Bullets():
                style = "warnings" if block.warning else "notes"
                said = "<strong>Warning:</strong> " if block.warning else ""
                return f'<ul class="{style}">{"".join(f"<li>{said}{_text(item)}</li>" for item in block.items)}</ul>'
            case doc.Facts():
                pairs = "".join(
                    f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in block.items
                )
                return f"<h3>{_text(block.title)}</h3>\n<dl>{pairs}</dl>"
            case doc.Command():
                return f"<h3>{_text(block.label)}</h3>\n<pre><code>{escape(clean_lines(block.text))}</code></pre>"
            case doc.Table():
                return self._table(block)
            case doc.Figure():
                return self._figure(block)

    def _table(self, table: doc.Table) -> str:
        name = self._id()
        heads = "".join(
            f'<th scope="col"{_style(column, column.heading)}>{_text(column.heading)}</th>' for column in table.columns
        )
        rows = "\n".join(f"<tr>{self._row(table, row)}</tr>" for row in table.rows)
        return (
            f'<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0"><table>\n'
            f'<caption id="{name}">{_text(table.caption)}</caption>\n'
            f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>"
        )

    def _row(self, table: doc.Table, row: Sequence[doc.Cell]) -> str:
        out = []
        for i, (column, cell) in enumerate(zip(table.columns, row, strict=True)):
            mark = "" if cell.mark is None else _key(f'<path class="mark {colour(cell.mark)}" d="{shape(cell.mark)}"/>')
            note = f" <small>{_text(cell.note)}</small>" if cell.note else ""
            style = _style(column, f"{cell.text} {cell.note}", marked=cell.mark is not None)
            start, end = (f'<th scope="row"{style}>', "</th>") if i == 0 else (f"<td{style}>", "</td>")
            out.append(f"{start}{mark}{_text(cell.text)}{note}{end}")
        return "".join(out)

    def _figure(self, figure: doc.Figure) -> str:
        if not figure.drawings:
            return self._table(figure.table)
        only = len(figure.drawings) == 1
        large = [self._drawing(drawing, titled=not only) for drawing in figure.drawings if len(drawing.svgs) > 1]
        small = [self._drawing(drawing, titled=not only) for drawing in figure.drawings if len(drawing.svgs) == 1]
        drawings = "\n".join([*large, *(['<div class="panels">', *small, "</div>"] if small else [])])
        keys = "".join(f"<li>{_swatch(key)}{_text(key.text)}</li>" for key in figure.legend)
        legend = f'<ul class="legend">{keys}</ul>\n' if keys else ""
        return (
            f"<figure>\n<figcaption>{_text(figure.caption)}</figcaption>\n{drawings}\n{legend}"
            f"<details><summary>As a table: {_text(figure.table.caption)}</summary>\n"
            f"{self._table(figure.table)}\n</details>\n</figure>"
        )

    def _drawing(self, drawing: doc.Drawing, titled: bool) -> str:
        heading = f'<p class="title">{_text(drawing.title)}</p>' if titled else ""
        styles = [""] if len(drawing.svgs) == 1 else ["for-page", "for-phone"]
        svgs = "\n".join(self._svg(drawing, svg, style) for svg, style in zip(drawing.svgs, styles, strict=True))
        return f'<div class="drawing">{heading}\n{svgs}</div>'

    def _svg(self, drawing: doc.Drawing, svg: doc.Svg, style: str) -> str:
        title, description = self._id(), self._id()
        return (
            f'<svg class="{f"chart {style}".strip()}" viewBox="0 0 {svg.width:g} {svg.height:g}" role="img" '
            f'aria-labelledby="{title} {description}"><title id="{title}">{_text(drawing.title)}</title>'
            f'<desc id="{description}">{_text(drawing.description)}</desc>{svg.body}</svg>'
        )


def _style(column: doc.Column, text: str, marked: bool = False) -> str:
    """Classes of a cell: digits below each other, room for sentences or a mark, a name that has to be broken."""
    long = max(map(len, text.split()), default=0) > _LONG_WORD
    all_of = (("number", column.numeric), ("wide", column.wide), ("long", long), ("marked", marked))
    said = [name for name, on in all_of if on]
    return f' class="{" ".join(said)}"' if said else ""


def _key(shapes: str) -> str:
    """A mark or a swatch within text."""
    return f'<svg class="key" viewBox="-9 -9 18 18" aria-hidden="true">{shapes}</svg>'


def _swatch(key: doc.Key) -> str:
    square = f'<rect class="part {key.style}" x="-8" y="-8" width="16" height="16"/>'
    return _key(f'{square}<text class="letter {key.style}" y="4" text-anchor="middle">{key.letter}</text>')
