"""Other people's claims held against what was measured: `halfbyte compare --claims`.

A claim that measurement can decide has a small function here, under the number that it has in `plan/claims.yaml`; each
takes the reports that there are and says what they say. The rules, the same for all:

    a share or a ratio with a range      confirmed where its 95 % interval is inside the range, refuted where it is
                                         outside, else not testable here: the interval is wider than the question
    one method better than another       confirmed or refuted where a difference was found, else not testable here, with
                                         the difference that would have been found
    one no worse than another            a difference that was not found confirms nothing: confirmed where the interval
                                         leaves out that it is worse by more than MARGIN of the other's figure
    several parts                        all confirmed or it is `partly`; a part that is open confirms nothing
    several reports                      each is asked; reports that disagree make it `partly`

Where a claim has only a word ("slightly", "comparable"), the range that is taken for it is told as that.

`not testable here` always says what would be needed.

    python -m halfbyte.compare.claims FOLDER… > docs/claims.md     judges the reports there, kept in claims.yaml
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfbyte.compare import memory_claims
from halfbyte.compare.claim_rules import OPEN, Report, Said, ended, title_of, together
from halfbyte.compare.claim_tests import NEEDS, TESTS
from halfbyte.compare.schema import SCHEMA_VERSION
from halfbyte.errors import UsageError
from halfbyte.plan import claims as claim_file
from halfbyte.run.folder import read_json

FILE = "report.json"
_PARTS: Mapping[str, type] = {
    "title": str, "model": dict, "data": list, "settings": dict, "metrics": list, "variants": list, "comparisons": list,
    "convergence": list, "cells": list,
}  # fmt: skip
"""What the claims ask of a report."""


@dataclass(frozen=True)
class Verdict:
    """What all reports together say. `evidence`: the reports' paths."""

    claim: int
    verdict: str
    sentence: str
    figure: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    evidence: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def load_reports(folders: Sequence[Path]) -> list[Report]:
    """Every report.json in or below the folders. UsageError where there is none, or one that cannot be read.

    Other programs write files of that name, too. None is left out silently: a verdict says what all reports there say.
    """
    paths = [path for folder in folders for path in ([folder] if folder.is_file() else sorted(folder.rglob(FILE)))]
    if not paths:
        places = ", ".join(map(str, folders))
        raise UsageError(f"no {FILE} in {places}: a comparison writes one (halfbyte compare … -o)")
    return [Report(path, _read(path)) for path in paths]


def _read(path: Path) -> dict[str, Any]:
    found = read_json(path)
    version = found.get("schema_version")
    if "variants" in found and isinstance(version, int) and version > SCHEMA_VERSION:
        raise UsageError(f"{path} is of a newer halfbyte: upgrade it, or leave the report out")
    wrong = [name for name, kind in _PARTS.items() if not isinstance(found.get(name), kind)]
    if wrong:
        raise UsageError(
            f"{path} is no report of a comparison (no {wrong[0]} in it): move it, or give an output (-o) without it"
        )
    return found


def judge(number: int, reports: Sequence[Report], records: Sequence[memory_claims.Record] = ()) -> Verdict:
    """What the reports, or the records of memory, say of one claim."""
    if number in memory_claims.TESTS:
        said = [memory_claims.TESTS[number](record) for record in records]
        evidence = [str(record.path) for record in records]
    else:
        said = TESTS[number](reports)
        evidence = _asked(said, reports)
    if not said:
        return Verdict(number, OPEN, f"it needs {NEEDS[number]}")
    main = max(said, key=lambda one: (one.verdict != OPEN, one.low is not None))
    sentence = " ".join(ended(one.sentence) for one in said)
    verdict = together(said)
    return Verdict(number, verdict, sentence, main.figure, main.low, main.high, main.unit, ", ".join(evidence))


def _asked(said: Sequence[Said], reports: Sequence[Report]) -> list[str]:
    """The reports that the sentences name. A title may begin with another's whole title: longer ones first."""
    text = " ".join(one.sentence for one in said)
    named = set()
    for title in sorted({title_of(report) for report in reports}, key=len, reverse=True):
        if title in text:
            named.add(title)
            text = text.replace(title, "")
    return [str(report.path) for report in reports if title_of(report) in named]


def judge_all(folders: Sequence[Path]) -> list[Verdict]:
    """Every claim that measurement decides, by number."""
    reports, records = load_reports(folders), memory_claims.load_records(folders)
    return [judge(number, reports, records) for number in sorted(NEEDS)]


def with_verdicts(held: claim_file.Claims, verdicts: Sequence[Verdict]) -> claim_file.Claims:
    """The claims' data with what was measured: claims that were not testable keep what they said before."""
    for one in verdicts:
        if one.evidence:
            held = held.with_verdict(
                one.claim, one.verdict, one.figure, one.low, one.high, one.sentence, one.evidence, one.unit
            )
    return held


def _main(arguments: Sequence[str]) -> None:
    """Judge the reports below the folders, keep the verdicts in claims.yaml, print the page."""
    if not arguments:
        raise SystemExit("python -m halfbyte.compare.claims FOLDER… > docs/claims.md")
    held = with_verdicts(claim_file.load(), judge_all([Path(folder) for folder in arguments]))
    held.save()
    sys.stdout.write(claim_file.page(held))


if __name__ == "__main__":
    _main(sys.argv[1:])
