"""claims.yaml: what public pages say, and one decision a claim for each way of deciding it, as plain values.

`plan.claims` says how they are decided and makes the page.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import UsageError
from halfbyte.files import write_atomic
from halfbyte.yamlfile import read_yaml

FILE = Path(__file__).with_name("claims.yaml")
SCHEMA_VERSION = 1
VERDICTS = ("confirmed", "partly", "refuted", "contradicts itself", "not testable here", "not measured yet")
OPEN = ("not testable here", "not measured yet")
BY = ("arithmetic", "measurement", "none")


@dataclass(frozen=True)
class Decision:
    """One verdict and what it rests on.

    by         arithmetic, measurement, or none: nothing here can decide it
    verdict    one of VERDICTS
    figure     the number that decides, with `low` and `high` its interval (over seeds, or of plausible setups)
    unit       of the figure: GB (10⁹ bytes), bits, share, …; empty where there is none
    sentence   the reason, for a reader
    working    the arithmetic in one line
    evidence   where the figure is from: a report's path; empty for arithmetic
    """

    by: str
    verdict: str
    sentence: str
    figure: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    working: str = ""
    evidence: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise UsageError(f"a claim's verdict is {self.verdict!r}, and should be one of {', '.join(VERDICTS)}")
        if self.by not in BY:
            raise UsageError(f"a claim is decided by {self.by!r}, and should be by one of {', '.join(BY)}")


@dataclass(frozen=True)
class Claim:
    """What one page says.

    kind  A arithmetic decides, M measurable on small models on a CPU, G needs a GPU or a big model, X cannot be tested;
          several where the claim has several parts
    test  what decides it, in words
    """

    id: int
    page: str
    claim: str
    kind: str
    test: str
    decisions: tuple[Decision, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.kind.split(","))

    @property
    def verdict(self) -> str:
        """One word for the whole claim: `partly` where its parts differ, or where one is confirmed and another open."""
        found = {d.verdict for d in self.decisions}
        decided, left = found - set(OPEN), found & set(OPEN)
        if "contradicts itself" in decided:
            return "contradicts itself"
        if len(decided) > 1 or (left and "confirmed" in decided):
            return "partly"
        return next(iter(decided)) if decided else min(left, key=OPEN.index, default="not measured yet")

    def by(self, way: str) -> Decision | None:
        return next((d for d in self.decisions if d.by == way), None)

    def with_decision(self, made: Decision) -> "Claim":
        """The same with this decision in the place of an earlier one of its way, in the order of BY."""
        others = [d for d in self.decisions if d.by != made.by]
        return replace(self, decisions=tuple(sorted((*others, made), key=lambda d: BY.index(d.by))))


@dataclass(frozen=True)
class Claims:
    """All claims, in the order of their numbers."""

    claims: tuple[Claim, ...]

    def find(self, number: int) -> Claim:
        """UsageError for a number that no claim has."""
        found = next((c for c in self.claims if c.id == number), None)
        if found is None:
            raise UsageError(f"there is no claim {number}: they are {self.claims[0].id} to {self.claims[-1].id}")
        return found

    def replaced(self, made: Claim) -> "Claims":
        return Claims(tuple(made if c.id == made.id else c for c in self.claims))

    def with_verdict(
        self,
        number: int,
        verdict: str,
        figure: float | None,
        low: float | None,
        high: float | None,
        sentence: str,
        evidence: str,
        unit: str = "",
    ) -> "Claims":
        """The claims with what was measured for one: a decision by measurement, an earlier one replaced.

        UsageError for a claim that no measurement decides (of kind A or X alone), an unknown number or verdict.
        """
        found = self.find(number)
        if found.kinds == ("A",):
            raise UsageError(
                f"claim {number} is decided by arithmetic: a measurement of small models does not change it"
            )
        if found.kinds == ("X",):
            raise UsageError(f"claim {number} cannot be tested: {found.test}")
        made = Decision("measurement", verdict, sentence, figure, low, high, unit, evidence=evidence)
        return self.replaced(found.with_decision(made))

    def save(self, path: Path = FILE) -> None:
        """Write the file; whole or not at all."""
        text = yaml.safe_dump(
            {"schema_version": SCHEMA_VERSION, "claims": [_as_dict(claim) for claim in self.claims]},
            sort_keys=False,
            allow_unicode=True,
            width=118,
        )
        write_atomic(path, (HEAD_OF_FILE + text).encode())


HEAD_OF_FILE = """\
# Written by `python -m halfbyte.plan.claims --decide` and `halfbyte compare --claims`; `plan.claims` says what the
# fields are. Decisions by arithmetic are computed (`plan.claim_arithmetic`) and a test compares them: do not edit them.

"""


def load(path: Path = FILE) -> Claims:
    """The claims of a file: the one that ships with halfbyte, or what `save` wrote elsewhere. UsageError if damaged."""
    entries = read_yaml(path)
    version = entries["schema_version"].value if "schema_version" in entries else None
    if version != SCHEMA_VERSION:
        raise UsageError(f"{path}: schema_version is {version!r}, and this version of halfbyte reads {SCHEMA_VERSION}")
    try:
        return Claims(tuple(_claim(entry) for entry in entries["claims"].value))
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a file of claims ({error})") from None


def _claim(entry: dict[str, Any]) -> Claim:
    decisions = tuple(Decision(**decision) for decision in entry["decisions"])
    return Claim(**{**entry, "decisions": decisions})


def _as_dict(claim: Claim) -> dict[str, Any]:
    """A claim as plain data; fields that a decision does not have are left out."""
    decisions = [{k: v for k, v in asdict(d).items() if v not in (None, "")} for d in claim.decisions]
    return {**asdict(claim), "decisions": decisions}
