"""The claims' rules on reports whose figures are known."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.compare import claims
from halfbyte.compare.claims import Report, judge, judge_all, with_verdicts
from halfbyte.compare.statistics import mean_interval
from halfbyte.errors import UsageError
from halfbyte.plan import claims as claim_file


def variant(method: str, key: str | None = None, notes: tuple[str, ...] = (), share: list[float] | None = None,
            fields: dict[str, Any] | None = None, **figures: list[float]) -> dict[str, Any]:  # fmt: skip
    quant = (fields or {}).get("quant_type", "nf4" if method.startswith("q") else None)
    against = None if share is None else {"metric": "accuracy", "share": mean_interval(share).as_dict()}
    return {
        "key": key or method, "method_name": method, "fields": {"method": method} | (fields or {}),
        "notes": list(notes),
        "quant_type": quant, "against_full": against,
        "figures": {name: mean_interval(values).as_dict() for name, values in figures.items()},
    }  # fmt: skip


def compared(a: str, b: str, metric: str, verdict: str, mean: float = 0.0, half: float = 0.01) -> dict[str, Any]:
    return {"a": a, "b": b, "metric": metric, "verdict": verdict, "detectable": 0.02,
            "sentence": f"{a} and {b}: {verdict}.",
            "difference": {"mean": mean, "low": mean - half, "high": mean + half}}  # fmt: skip


def report(*variants: dict[str, Any], comparisons: tuple[dict[str, Any], ...] = (), quality: str = "accuracy",
           data: str = "sst2.jsonl", convergence: tuple[Any, ...] = (), name: str = "model",
           size: int = 1) -> Report:  # fmt: skip
    metrics = [
        {"key": quality, "label": quality, "better": "lower" if quality == "eval_loss" else "higher", "unit": "share",
         "quality": True},
        {"key": "eval_loss", "label": "held-out loss", "better": "lower", "unit": "loss", "quality": True},
    ]  # fmt: skip
    return Report(Path("r/report.json"), {
        "variants": list(variants), "comparisons": list(comparisons), "metrics": metrics,
        "model": {"name": name, "parameters": size},
        "data": [{"name": data}], "convergence": list(convergence), "settings": {"seeds": [1, 2, 3]},
    })  # fmt: skip


A, B, NONE = "a better", "b better", "no difference found"


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [([105.0, 106.0, 107.0], "confirmed"), ([80.0, 81.0, 82.0], "refuted"), ([90.0, 130.0, 70.0], "not testable here")],
)
def test_a_ratio_against_a_claimed_range(rates: list[float], verdict: str) -> None:
    made = judge(9, [report(variant("lora", tokens_per_second=rates), variant("qlora", tokens_per_second=[100.0] * 3))])
    assert made.verdict == verdict
    assert made.figure == pytest.approx(sum(rates) / 300)
    assert made.low is not None
    assert made.evidence == "r/report.json"


def test_one_seed_decides_nothing() -> None:
    made = judge(9, [report(variant("lora", tokens_per_second=[105.0]), variant("qlora", tokens_per_second=[100.0]))])
    assert made.verdict == "not testable here"
    assert "more seeds" in made.sentence


def test_without_a_report_it_says_what_it_needs() -> None:
    for number in claims.NEEDS:
        made = judge(number, [report(variant("full"))])
        assert made.verdict == "not testable here"
        assert made.sentence == f"it needs {claims.NEEDS[number]}"


def test_reports_that_disagree_make_it_partly() -> None:
    fast = report(
        variant("lora", tokens_per_second=[105.0, 106.0, 107.0]), variant("qlora", tokens_per_second=[100.0] * 3)
    )
    slow = report(
        variant("lora", tokens_per_second=[80.0, 81.0, 82.0]), variant("qlora", tokens_per_second=[100.0] * 3)
    )
    assert judge(9, [fast, slow]).verdict == "partly"


def test_shares_of_full() -> None:
    inside = report(
        variant("full"), variant("qlora", share=[0.96, 0.97, 0.965]), variant("lora", share=[0.98, 0.981, 0.982])
    )
    assert judge(6, [inside]).verdict == "confirmed"
    better = report(variant("full"), variant("qlora", share=[1.01, 1.02, 1.015]))
    assert judge(6, [better]).verdict == "refuted"
    assert judge(34, [inside]).verdict == "not testable here"  # its interval reaches beyond both ranges' end


@pytest.mark.parametrize(
    ("verdict", "held"), [(NONE, "confirmed"), (A, "refuted"), (B, "confirmed")], ids=["none", "full", "qlora"]
)
def test_comparable_to_full(verdict: str, held: str) -> None:
    made = judge(
        7, [report(variant("full"), variant("qlora"), comparisons=(compared("full", "qlora", "accuracy", verdict),))]
    )
    assert made.verdict == held


def test_the_difference_on_sst2() -> None:
    pair = variant("lora"), variant("qlora")
    near = report(*pair, comparisons=(compared("qlora", "lora", "accuracy", NONE, -0.002),))
    assert judge(15, [near]).verdict == "confirmed"
    assert judge(15, [near]).figure == pytest.approx(0.002)
    far = report(*pair, comparisons=(compared("lora", "qlora", "accuracy", A, 0.05),))
    assert judge(15, [far]).verdict == "refuted"
    assert (
        judge(15, [report(*pair, data="other", comparisons=(compared("lora", "qlora", "accuracy", A, 0.05),))]).evidence
        == ""
    )


def level(loss: float, **tokens: list[float]) -> dict[str, Any]:
    rows = [{"variant": key, "reached": len(values), "supervised_tokens": mean_interval(values).as_dict()}
            for key, values in tokens.items()]  # fmt: skip
    return {"loss": loss, "rows": rows}


def test_convergence() -> None:
    pair = variant("lora"), variant("qlora")
    slower = report(*pair, convergence=(level(1.0, lora=[100, 100, 100], qlora=[125, 126, 124]),))
    assert judge(18, [slower]).verdict == "confirmed"
    assert judge(19, [slower]).verdict == "partly"
    same = report(*pair, convergence=(level(1.0, lora=[100, 100, 100], qlora=[100, 101, 99]),
                                      level(0.9, lora=[100, 100], qlora=[300, 301, 299])))  # fmt: skip
    assert judge(18, [same]).verdict == "refuted"
    assert judge(19, [same]).verdict == "refuted"


def test_ranks() -> None:
    ranks = [variant(m, f"{m}-r{r}", fields={"lora_r": r}) for m in ("lora", "qlora") for r in (8, 16, 32)]
    needed = (compared("lora-r8", "qlora-r8", "accuracy", A), compared("qlora-r16", "qlora-r8", "accuracy", A))
    assert judge(42, [report(*ranks, comparisons=needed)]).verdict == "confirmed"
    assert judge(42, [report(*ranks, comparisons=needed[1:])]).verdict == "not testable here"
    other_way = (compared("lora-r8", "qlora-r8", "accuracy", B),)
    assert judge(42, [report(*ranks, comparisons=other_way)]).verdict == "refuted"


def test_begin_with_qlora_go_on_with_lora() -> None:
    three = variant("lora"), variant("qlora"), variant("lora", "switch", ("goes on from the adapter of half: …",))
    gain = (compared("lora", "switch", "accuracy", NONE), compared("qlora", "switch", "accuracy", B))
    assert judge(21, [report(*three, comparisons=gain)]).verdict == "confirmed"
    assert judge(21, [report(*three, comparisons=gain[:1])]).verdict == "partly"
    worse = (compared("lora", "switch", "accuracy", A),)
    assert judge(21, [report(*three, comparisons=worse)]).verdict == "refuted"


def test_two_models() -> None:
    big = report(variant("qlora", accuracy=[0.9, 0.91, 0.92]), name="big", size=9)
    small = report(variant("full", accuracy=[0.7, 0.71, 0.72]), name="small", size=1)
    assert judge(43, [big, small]).verdict == "confirmed"
    assert judge(43, [small]).verdict == "not testable here"


def test_merged() -> None:
    one = report(variant("qlora", eval_loss=[1.0, 1.1, 1.2], merge_loss=[1.001, 1.1, 1.201]))
    assert judge(44, [one]).verdict == "confirmed"


def test_the_registry_and_the_file_of_claims_agree() -> None:
    held = claim_file.load()
    measurable = {claim.id for claim in held.claims if "M" in claim.kinds}
    assert claims.NEEDS.keys() == measurable
    assert claims.TESTS.keys() <= claims.NEEDS.keys()
    made = judge(
        9, [report(variant("lora", tokens_per_second=[1.0, 1.0, 1.0]), variant("qlora", tokens_per_second=[1.0] * 3))]
    )
    decision = with_verdicts(held, [made]).find(9).by("measurement")
    assert decision is not None
    assert (decision.verdict, decision.figure, decision.evidence) == (made.verdict, made.figure, made.evidence)
    nothing = judge(9, [report(variant("full"))])
    assert with_verdicts(held, [nothing]) == held


def test_reports_are_found_below_a_folder(tmp_path: Path) -> None:
    one = report(
        variant("lora", tokens_per_second=[105.0, 106.0, 107.0]), variant("qlora", tokens_per_second=[100.0] * 3)
    )
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "report.json").write_text(json.dumps(one.data))
    verdicts = {made.claim: made for made in judge_all([tmp_path])}
    assert verdicts[9].verdict == "confirmed"
    assert verdicts[9].evidence.endswith("a/b/report.json")
    with pytest.raises(UsageError, match=r"no report\.json in"):
        judge_all([tmp_path / "missing"])
