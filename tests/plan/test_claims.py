"""The claims: the file and the page are what the functions compute, and the figures are those done by hand."""

import dataclasses
import re
from pathlib import Path

import pytest

from halfbyte.errors import UsageError
from halfbyte.plan import claim_arithmetic, claim_parts, claims
from halfbyte.plan.claim_arithmetic import DECIDED
from halfbyte.plan.claim_file import VERDICTS, Claim, Claims, Decision

PAGE = Path(__file__).parents[2] / "docs" / "claims.md"
HELD = claims.load()
REFRESH = "python -m halfbyte.plan.claims --decide > docs/claims.md"


def arithmetic(number: int) -> Decision:
    found = HELD.find(number).by("arithmetic")
    assert found is not None
    return found


def test_the_page_is_what_the_file_says() -> None:
    assert PAGE.read_text() == claims.page(HELD), REFRESH


@pytest.mark.parametrize("number", sorted(DECIDED))
def test_a_verdict_by_arithmetic_is_what_its_function_computes(number: int) -> None:
    assert arithmetic(number) == DECIDED[number](), REFRESH


def test_a_verdict_does_not_depend_on_the_users_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "halfbyte").mkdir()
    (tmp_path / "halfbyte" / "machines.yaml").write_text("rtx-3090:\n  memory: 12GB\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    claim_parts.cards.cache_clear()
    assert DECIDED[4]() == arithmetic(4)


def test_arithmetic_decides_every_claim_of_its_kind_and_no_other() -> None:
    assert {c.id for c in HELD.claims if "A" in c.kinds} == set(DECIDED)
    assert all((c.by("arithmetic") is not None) == ("A" in c.kinds) for c in HELD.claims)
    assert all(d.verdict not in ("not testable here", "not measured yet") for n in DECIDED if (d := arithmetic(n)))


def test_what_cannot_be_tested_says_why_and_what_can_be_measured_waits_or_has_evidence() -> None:
    for claim in HELD.claims:
        if {"X", "G"} & set(claim.kinds):
            open_part = claim.by("none")
            assert open_part is not None
            assert open_part.verdict == "not testable here"
            assert len(open_part.sentence) >= 40
        if "M" in claim.kinds:
            measured = claim.by("measurement")
            assert measured is not None
            assert measured.verdict == "not measured yet" or measured.evidence
        assert claim.test


@pytest.mark.shared
def test_the_claims_are_the_shared_files(shared: Path) -> None:
    table = (shared / "CLAIMS.md").read_text()
    listed = re.findall(r"^\| (\d+) \| (P\d) \| (.*?) \| ([AMGX, ]+) \|", table, re.MULTILINE)
    assert len(listed) == 46
    assert [(str(c.id), c.page, c.claim, c.kind) for c in HELD.claims] == listed


# -- figures by hand ----------------------------------------------------------------------------------------------


def test_claim_37_counts_the_adapters_of_llama_3_8b() -> None:
    # q and o: 16 (4096 + 4096) each; k and v: 16 (4096 + 1024) each; 32 layers.
    assert arithmetic(37).figure == 32 * 16 * (2 * 8192 + 2 * 5120) == 13_631_488
    assert arithmetic(37).verdict == "partly"
    assert "Does not hold: ~6.5M parameters (13,631,488; rank 8 would have 6,815,744" in arithmetic(37).sentence
    assert "0.08 % (0.17 %)" in arithmetic(37).sentence


def test_claim_36_saves_0_373_bits() -> None:
    assert arithmetic(36).figure == pytest.approx(0.5 - 0.125 - 32 / 16_384, abs=1e-5)
    assert arithmetic(36).verdict == "confirmed"


def test_claim_13_is_possible_in_full_only() -> None:
    sentence = arithmetic(13).sentence
    assert "LoRA 48 GB (the 16-bit weights alone are 130.6 GB)" in sentence
    assert "QLoRA 12 GB (the 4-bit linears alone are 33.4 GB" in sentence
    assert arithmetic(13).verdict == "partly"


def test_claim_12_contradicts_its_own_table() -> None:
    assert arithmetic(12).verdict == "contradicts itself"
    assert arithmetic(12).working == "2.4/1.8 = 1.33; 1.6/1.1 = 1.45; 0.8/0.5 = 1.60"
    assert "25 % to 38 % slower" in arithmetic(12).sentence


def test_claim_24_is_less_than_the_weights() -> None:
    assert "LoRA ~12 GB (the 16-bit weights alone are 13.5 GB" in arithmetic(24).sentence.split("Does not hold")[1]


def test_claim_29_names_a_card_that_does_not_exist() -> None:
    assert arithmetic(29).verdict == "refuted"
    assert "there are 40 and 80 GB" in arithmetic(29).sentence


def test_a_peak_of_the_page_is_the_sum_of_its_components() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith(("| 7B", "| 65B", "| 70B"))]
    assert len(rows) == 10
    for row in rows:
        *parts, total = (float(cell.strip(" |") or 0) for cell in row[1:])
        assert sum(parts) == pytest.approx(total, abs=0.07), row


# -- verdicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("holding", "verdict"), [((True, True), "confirmed"), ((True, False), "partly"), ((False, False), "refuted")]
)
def test_a_verdict_follows_from_the_parts(holding: tuple[bool, ...], verdict: str) -> None:
    parts = [claim_parts.Part(flag, f"part {i}", "because") for i, flag in enumerate(holding)]
    assert claim_parts.decision(parts, "1 = 1").verdict == verdict
    assert claim_parts.decision(parts, "1 = 1", contradicts="It says both").verdict == "contradicts itself"


def claim(*verdicts: tuple[str, str], kind: str = "A, M") -> Claim:
    return Claim(1, "P0", "c", kind, "t", tuple(Decision(by, verdict, "s") for by, verdict in verdicts))


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (claim(("arithmetic", "refuted"), ("measurement", "not measured yet")), "refuted"),
        (claim(("arithmetic", "confirmed"), ("none", "not testable here")), "partly"),
        (claim(("arithmetic", "confirmed"), ("measurement", "refuted")), "partly"),
        (claim(("arithmetic", "confirmed"), ("measurement", "confirmed")), "confirmed"),
        (claim(("arithmetic", "contradicts itself"), ("measurement", "confirmed")), "contradicts itself"),
        (claim(("measurement", "not measured yet")), "not measured yet"),
        (claim(("none", "not testable here")), "not testable here"),
    ],
)
def test_a_claims_verdict_is_that_of_its_parts(made: Claim, verdict: str) -> None:
    assert made.verdict == verdict


# -- the file -----------------------------------------------------------------------------------------------------


def test_a_measured_verdict_is_kept_by_the_file_and_shown_on_the_page(tmp_path: Path) -> None:
    held = HELD.with_verdict(9, "refuted", 0.97, 0.95, 0.99, "LoRA was no faster.", "runs/cmp/report.json", "of a step")
    again = held.with_verdict(9, "confirmed", 1.25, 1.2, 1.3, "LoRA was faster.", "runs/b/report.json")
    assert len(again.find(9).decisions) == 1
    held.save(tmp_path / "claims.yaml")
    assert claims.load(tmp_path / "claims.yaml") == held
    page = claims.page(held)
    assert "- Measurement: refuted (0.97 of a step, 0.95 to 0.99). LoRA was no faster." in page
    assert "Evidence: runs/cmp/report.json" in page
    assert claims.load() == HELD, "the claims given were changed"


def test_a_measurement_stands_beside_arithmetic() -> None:
    both = HELD.with_verdict(12, "refuted", 0.1, 0.05, 0.15, "Not here either.", "r.json").find(12)
    assert [d.by for d in both.decisions] == ["arithmetic", "measurement"]


def test_computing_anew_keeps_what_was_measured() -> None:
    held = HELD.with_verdict(9, "refuted", 0.97, 0.95, 0.99, "LoRA was no faster.", "r.json")
    assert claim_arithmetic.decided(held) == held


def test_what_the_file_ships_is_what_saving_it_writes(tmp_path: Path) -> None:
    HELD.save(tmp_path / "claims.yaml")
    assert (tmp_path / "claims.yaml").read_text() == claims.FILE.read_text(), REFRESH


@pytest.mark.parametrize(
    ("number", "verdict", "said"),
    [
        (47, "refuted", "there is no claim 47: they are 1 to 46"),
        (36, "refuted", "claim 36 is decided by arithmetic"),
        (17, "refuted", "claim 17 cannot be tested"),
        (9, "wrong", "a claim's verdict is 'wrong', and should be one of confirmed, partly"),
    ],
)
def test_a_verdict_that_cannot_be_given_is_refused(number: int, verdict: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        HELD.with_verdict(number, verdict, None, None, None, "s", "e")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schema_version: 2\nclaims: []\n", "schema_version is 2"),
        ("claims: []\n", "schema_version is None"),
        ("schema_version: 1\n", "not a file of claims"),
        ("schema_version: 1\nclaims:\n- {id: 1, page: P0}\n", "not a file of claims"),
        ("schema_version: 1\nclaims:\n- 7\n", "not a file of claims"),
        (
            "schema_version: 1\nclaims:\n- {id: 1, page: P0, claim: c, kind: M, test: t, decisions: [{by: hand, "
            "verdict: refuted, sentence: s}]}\n",
            "a claim is decided by 'hand'",
        ),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(said)):
        claims.load(tmp_path / "claims.yaml")


def test_no_verdict_is_left_out_of_the_summary() -> None:
    page = claims.page(HELD)
    counted = sum(int(found) for found in re.findall(rf"^\| (?:{'|'.join(VERDICTS)}) \| (\d+) \|", page, re.MULTILINE))
    assert counted == len(HELD.claims) == 46


def test_a_page_of_some_claims_has_only_those() -> None:
    some = Claims(tuple(c for c in HELD.claims if c.page == "P2"))
    assert "### 23. " in claims.page(some)
    assert "### 1. " not in claims.page(some)


def test_claims_are_values() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HELD.find(1).kind = "M"  # type: ignore[misc]


def test_the_command_prints_the_page_and_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    claims._main([])
    assert capsys.readouterr().out == PAGE.read_text()
    with pytest.raises(SystemExit, match="--decide"):
        claims._main(["--page"])
