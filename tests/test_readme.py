"""The pages for newcomers and contributors say nothing that is not there: their commands exist, their links resolve."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.cli import VERBS, load

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")])
FENCE = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
INLINE = re.compile(r"`((?:halfbyte|make) [^`]+)`")
OWN_PROGRAMS = ("halfbyte", "make")


def commands(page: Path) -> list[list[str]]:
    """Our own programs' commands in a page: the lines of its shell blocks, and `halfbyte …` in running text."""
    text = page.read_text()
    lines = [line for block in FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += [line.strip() for line in re.findall(r"^    (?:make|halfbyte) .*$", text, re.MULTILINE)]
    lines += INLINE.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    named = [[Path(parts[0]).name, *parts[1:]] for parts in words if parts]
    return [parts for parts in named if parts[0] in OWN_PROGRAMS]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_verb(words: list[str]) -> None:
    """Walk to the verb's command; every flag must be one of its own."""
    assert words[0] in VERBS, f"halfbyte has no verb {words[0]}"
    command, rest = load(words[0]), words[1:]
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, f"halfbyte {words[0]} has no {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    known = {
        name.replace("_", "-") for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
    }
    known |= {"--help", "-h"}
    for flag in (word.split("=")[0] for word in rest if word.startswith("-")):
        assert flag.replace("_", "-") in known, f"halfbyte {' '.join(words)}: {flag} is no flag of it"


def anchors(page: Path) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    for program, *words in commands(page):
        if program == "make":
            targets = {word for word in words if "=" not in word}
            assert targets <= make_targets(), f"{page.name}: make {' '.join(words)}"
        elif words and not words[0].startswith("-") and words[0] != "VERB":
            check_verb(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_shows_both_commands_and_every_verb_it_names_is_listed() -> None:
    shown = commands(ROOT / "README.md")
    assert ["make", "demo"] in shown
    assert ["make", "test"] in shown
    assert {words[1] for words in shown if words[0] == "halfbyte"} <= set(VERBS)
