"""The three files of a report: they say the same, nothing in them is taken for markup, and none is half there."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError

from halfbyte.compare.page.text import clean
from halfbyte.compare.render import rendered, write_report
from halfbyte.errors import HalfbyteError
from tests.compare.extremes import ALL, NASTY, failed, five, nasty, single
from tests.compare.markup import Page, table_rows
from tests.compare.random_reports import reports

SECTIONS = [
    "Methods", "Memory", "Speed and cost", "Loss curves", "Convergence", "Quality against memory and time",
    "Differences", "Predicted and measured", "Runs", "Commands", "Conditions", "Notes and warnings",
]  # fmt: skip


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_every_report_becomes_three_whole_files(make: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    report = make()
    write_report(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.problems == []
    assert len(page.ids) == len(set(page.ids))
    assert [text for tag, text in page.texts if tag == "h2"] == SECTIONS
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", markdown, re.MULTILINE) == SECTIONS
    again = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {name: again[name] for name in report} == json.loads(json.dumps(report))


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_same_data_same_bytes(make: Callable[[], dict[str, Any]]) -> None:
    assert rendered(make()) == rendered(json.loads(rendered(make())["report.json"]))


def test_names_that_look_like_markup_stay_names() -> None:
    files = rendered(nasty())
    page = Page(files["report.html"])
    assert page.problems == []
    assert ("h1", "title " + clean(NASTY)) in page.texts
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "<script>alert" not in re.sub(r"```+sh\n.*?\n```+", "", files["report.md"], flags=re.DOTALL)


def test_markdown_tables_have_as_many_cells_in_every_row() -> None:
    for make in ALL.values():
        tables = table_rows(rendered(make())["report.md"])
        assert all(len(row) == len(table[0]) for table in tables for row in table)
    assert len(table_rows(rendered(five())["report.md"])) >= 14


def test_both_pages_have_the_same_tables() -> None:
    files = rendered(five())
    captions = [text for tag, text in Page(files["report.html"]).texts if tag == "caption"]
    assert len(captions) == len(set(captions)) == len(table_rows(files["report.md"]))
    for caption in captions:
        assert f"**{caption}**" in files["report.md"]


def test_figures_carry_their_intervals_and_their_units() -> None:
    report = five()
    figure = report["variants"][2]["figures"]["peak_memory_bytes"]
    figure |= {"mean": 1.23462e9, "low": 1.22262e9, "high": 1.24662e9}
    files = rendered(report)
    assert "Peak memory, GB" in files["report.html"]
    assert re.search(r"QLoRA +\|.* 1\.235 \(1\.223 to 1\.247\) \|", files["report.md"])


def test_no_difference_is_said_with_what_could_have_been_seen() -> None:
    page = Page(rendered(five())["report.html"]).text()
    assert "no difference found; a difference of 0.0105 could have been detected" in page
    assert "no difference found; a difference of 1.5\u00a0percentage points could have been detected" in page
    assert "LoRA is better by 0.0090" in page


def test_what_is_missing_is_said_to_be() -> None:
    files = rendered(failed())
    assert files["report.md"].count("not measured") > 10
    assert "killed: it needed more memory than there is" in files["report.html"]
    assert "not reached" in files["report.md"]


def test_one_seed_has_no_intervals_and_says_so() -> None:
    files = rendered(single())
    assert "one seed: no intervals" in files["report.html"]
    assert "95 % interval of" not in files["report.html"]
    assert 'class="area' not in files["report.html"]
    assert "No differences were computed: there are not two methods." in files["report.md"]


def test_what_the_issue_asks_to_be_named_is_named() -> None:
    for text in rendered(five()).values():
        for said in ("another machine: workshop", "an earlier run", "the 16-bit weights were quantized once already"):
            assert said in text
        assert "--method loftq --seed 0" in text
        assert "sha256:90b1" in text
    assert "learning rates searched" in rendered(five())["report.md"]
    report = five()
    report["settings"]["tune_lr"] = None
    assert "learning rates not searched" in rendered(report)["report.html"]


def test_the_page_asks_for_nothing() -> None:
    html = rendered(five())["report.html"]
    style_and_script = "".join(re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", html, re.DOTALL))
    assert not re.search(r"@import|url\(|fetch|XMLHttp|import\(", style_and_script)
    linked = [attributes.get("href") for _, attributes in Page(html).tags if "href" in attributes]
    assert all(link == "data:," or str(link).startswith("#") for link in linked)
    assert "default-src 'none'" in html


def test_a_wrong_report_writes_nothing(tmp_path: Path) -> None:
    write_report(five(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    wrong = five()
    wrong["variants"][0]["figures"]["eval_loss"]["mean"] = math.nan
    with pytest.raises(ValidationError):
        write_report(wrong, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HalfbyteError, match="could not be written"):
        write_report(five(), tmp_path / "file" / "report")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(reports())
def test_any_valid_report_can_be_written_down(report: dict[str, Any]) -> None:
    files = rendered(report)
    page = Page(files["report.html"])
    assert page.problems == []
    assert not re.search(
        r"\b(nan|inf)\b", "".join(value or "" for _, at in page.tags for value in (at.get("d"), at.get("x")))
    )
    text = page.text()
    for variant in report["variants"]:
        assert clean(variant["label"]).strip() in text
    for table in table_rows(files["report.md"]):
        assert all(len(row) == len(table[0]) for row in table)
    files["report.html"].encode()
    files["report.md"].encode()


def test_many_machines_are_named_once_and_the_smallest_twice(tmp_path: Path) -> None:
    report = five()
    assert "Machines of the planner's catalogue" not in document_of(report, tmp_path)
    report["variants"][0]["hardware"] = [f"machine-{number}" for number in range(9)]
    text = document_of(report, tmp_path)
    assert "machine-0, machine-1, machine-2 (and 6 larger)" in text
    assert "Machines of the planner's catalogue that a run fits" in text
    assert text.count("machine-8") == 1


def document_of(report: dict[str, Any], folder: Path) -> str:
    write_report(report, folder)
    return (folder / "report.md").read_text(encoding="utf-8")
