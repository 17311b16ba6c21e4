"""Reads the pages strictly: a value that is not escaped is an element that is not ours, or an end that is missing."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link"}
OURS = re.compile(
    "html|head|title|style|body|a|header|p|main|h[1-3]|ul|li|nav|section|div|table|caption|thead|tbody|tr|th|td|small|strong"
    "|dl|dt|dd|pre|code|figure|figcaption|details|summary|footer|script|svg|desc|text|tspan|path|rect|circle|meta|link"
)
ATTRIBUTES = re.compile(
    "lang|charset|http-equiv|content|name|rel|href|class|id|tabindex|aria-(label|labelledby|hidden)|role|scope"
    "|viewbox|x|y|width|height|d|transform|text-anchor|dx|cx|cy|r"
)


class Page(HTMLParser):
    """The page's text by element, its elements, and `problems`: all that should not be in it."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.problems: list[str] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)
        self.close()
        self.problems += [f"<{tag}> never ends" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not OURS.fullmatch(tag):
            self.problems.append(f"<{tag}> is none of ours")
        self.problems += [f"{name} on <{tag}>" for name, _ in attrs if not ATTRIBUTES.fullmatch(name)]
        self.tags.append((tag, dict(attrs)))
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> ends something else")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def handle_comment(self, data: str) -> None:
        self.problems.append(f"a comment: {data[:40]}")

    def text(self) -> str:
        return "\n".join(text for _, text in self.texts)


def table_rows(markdown: str) -> list[list[list[str]]]:
    """Every pipe table of a Markdown page as rows of cells, the rule below the headings left out."""
    tables: list[list[list[str]]] = []
    fence, before = "", ""
    for line in markdown.split("\n"):
        if line.startswith("```"):
            fence = "" if line == fence else fence or line.removesuffix("sh")
        if not fence and line.startswith("|"):
            cells = line.replace("\\\\", "").replace("\\|", "").strip("|").split("|")
            if not before.startswith("|"):
                tables.append([])
            if not set(line) <= set("|-: "):
                tables[-1].append(cells)
        before = line
    return tables
