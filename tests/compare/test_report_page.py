"""The report in a real browser: Chromium, driven by Playwright. Skipped visibly where there is none.

Chromium is looked for as HALFBYTE_CHROMIUM says, then on the path (on Debian: apt-get install chromium).
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.compare.render import write_report
from tests.compare.extremes import ALL

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE, SMALL_PHONE, PAGE = 390, 360, 1280
FAST = {("failed", "light", PAGE), ("single", "dark", PHONE)}
REPORTS = pytest.mark.parametrize("name", ALL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = os.environ.get("HALFBYTE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here (HALFBYTE_CHROMIUM names one; on Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        # Inside a container the browser's own sandbox cannot start; the page is ours.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    for name, make in ALL.items():
        write_report(make(), folder / name)
    return folder


class Opened:
    """A page that is open, with what it complained about and what it asked for."""

    def __init__(self, browser: Any, path: Path, width: int, scheme: str) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.fixture
def opened(browser: Any, written: Path) -> Iterator[Any]:
    pages: list[Opened] = []

    def opening(name: str, width: int = PAGE, scheme: str = "light") -> Opened:
        pages.append(Opened(browser, written / name / "report.html", width, scheme))
        return pages[-1]

    yield opening
    for page in pages:
        page.context.close()


@REPORTS
def test_opens_without_complaints_and_asks_for_nothing_else(opened: Any, written: Path, name: str) -> None:
    page = opened(name)
    assert page.said == []
    assert [url for url in page.asked if not url.startswith("data:")] == [(written / name / "report.html").as_uri()]
    assert page.ask("document.querySelectorAll('script').length") == 1


@REPORTS
@pytest.mark.parametrize("width", [SMALL_PHONE, PAGE])
def test_the_page_never_scrolls_sideways(opened: Any, name: str, width: int) -> None:
    page = opened(name, width)
    page.ask("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.ask("document.documentElement.scrollWidth") <= width
    wider = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') && !e.closest('.skip')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"""
    assert page.ask(wider) == []


@REPORTS
@pytest.mark.parametrize("width", [SMALL_PHONE, PAGE])
def test_no_text_of_a_chart_is_cut_or_covers_the_edge(opened: Any, name: str, width: int) -> None:
    cut = """[...document.querySelectorAll('svg.chart')].filter(s => s.getBoundingClientRect().width).flatMap(s =>
        [...s.querySelectorAll('text')].filter(t => { const b = t.getBBox(), v = s.viewBox.baseVal;
            return b.x < -3 || b.y < -3 || b.x + b.width > v.width + 3 || b.y + b.height > v.height + 3; })
        .map(t => t.textContent))"""
    assert opened(name, width).ask(cut) == []


@REPORTS
def test_tables_have_captions_and_headers(opened: Any, name: str) -> None:
    page = opened(name)
    bad = """[...document.querySelectorAll('table')].filter(t => !t.caption || !t.caption.textContent.trim()
        || [...t.tHead.rows[0].cells].some(c => c.tagName != 'TH' || c.scope != 'col')
        || [...t.tBodies[0].rows].some(r => r.cells[0].tagName != 'TH' || r.cells[0].scope != 'row'
            || r.cells.length != t.tHead.rows[0].cells.length)).map(t => t.outerHTML.slice(0, 200))"""
    assert page.ask(bad) == []
    if name == "five":
        assert page.ask("document.querySelectorAll('table').length") >= 14


@pytest.mark.parametrize("name", ["five", "single", "failed", "many"])
def test_every_chart_has_its_data_in_text(opened: Any, name: str) -> None:
    """A title, a description, and a table in the same figure with all that the chart's marks are labelled with."""
    page = opened(name)
    assert page.ask("document.querySelectorAll('svg.chart').length") >= 12
    untold = """[...document.querySelectorAll('svg.chart')].filter(s => s.getAttribute('role') != 'img'
        || !s.getAttribute('aria-labelledby').split(' ').every(id => document.getElementById(id).textContent.trim())
        || !s.closest('figure').querySelector('details table tbody tr')).map(s => s.outerHTML.slice(0, 200))"""
    assert page.ask(untold) == []
    missing = """[...document.querySelectorAll('figure')].flatMap(f => {
        const table = f.querySelector('table').textContent;
        return [...f.querySelectorAll('svg.chart .label')].map(t => t.firstChild.textContent.trim())
            .filter(t => !t.endsWith('…') && !table.includes(t)); })"""
    assert page.ask(missing) == []


_slow = pytest.mark.slow  # axe looks at every mark of every chart: seconds a page
_LOOKED_AT = [
    pytest.param(name, scheme, width, marks=() if (name, scheme, width) in FAST else _slow)
    for name in ALL
    for scheme, width in (("light", PAGE), ("dark", PHONE), ("light", PHONE), ("dark", PAGE))
]


@pytest.mark.parametrize(("name", "scheme", "width"), _LOOKED_AT)
def test_axe_finds_nothing(opened: Any, name: str, scheme: str, width: int) -> None:
    page = opened(name, width, scheme)
    page.ask("document.querySelectorAll('details').forEach(details => details.open = true)")
    found = axe.Axe().run(page.page).response["violations"]
    assert [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in found] == []


@REPORTS
def test_prints_whole(opened: Any, name: str) -> None:
    """On A4: tables unfolded, nothing wider than the paper, and folded again afterwards."""
    page = opened(name, 703)  # A4 less the margins, in CSS pixels
    page.page.emulate_media(media="print")
    page.ask("dispatchEvent(new Event('beforeprint'))")
    assert page.ask("[...document.querySelectorAll('details')].every(d => d.open)")
    hidden = "[...document.querySelectorAll('table')].filter(t => !t.getBoundingClientRect().height).length"
    assert page.ask(hidden) == 0
    if name not in ("nasty", "many"):  # twenty methods side by side are wider than any paper
        wide = """[...document.querySelectorAll('table, svg.chart, pre')].filter(e =>
            e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200))"""
        assert page.ask(wide) == []
    page.ask("dispatchEvent(new Event('afterprint'))")
    assert not page.ask("[...document.querySelectorAll('details')].some(d => d.open)")
    printed = page.page.pdf(format="A4")
    assert printed.startswith(b"%PDF-")
    assert printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") >= 1


def test_the_keyboard_reaches_what_scrolls_and_what_folds(opened: Any) -> None:
    page = opened("five", PHONE)
    page.page.keyboard.press("Tab")
    assert page.ask("document.activeElement.className") == "skip"
    assert page.ask("getComputedStyle(document.activeElement).left") == "16px"
    page.page.keyboard.press("Enter")
    assert page.ask("document.activeElement.id") == "report"
    reached = set()
    for _ in range(100):
        page.page.keyboard.press("Tab")
        if page.ask("document.activeElement == document.body"):
            break
        reached.add(page.ask("document.activeElement.tagName + '.' + document.activeElement.className"))
        outline = page.ask("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", page.ask("document.activeElement.outerHTML.slice(0, 200)")
    assert {"A.", "DIV.scroll", "SUMMARY."} <= reached


def test_moves_only_where_movement_is_welcome(browser: Any, written: Path) -> None:
    for asked, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
        context = browser.new_context(reduced_motion=asked)
        page = context.new_page()
        page.goto((written / "five" / "report.html").as_uri())
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == behaviour
        context.close()
