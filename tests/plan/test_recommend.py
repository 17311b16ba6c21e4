"""What the plan says of every method: verdicts, intervals, layouts, changes; and plan.json."""

import json
from dataclasses import replace
from typing import Any

import pytest

from halfbyte.adapters import LoraOptions
from halfbyte.errors import DoesNotFit
from halfbyte.models.spec import ModelSpec
from halfbyte.optim.options import OptimOptions
from halfbyte.plan import memory
from halfbyte.plan.calibration import Calibration, of
from halfbyte.plan.estimate import least_peak
from halfbyte.plan.hardware import Gpu, Hardware, Rates
from halfbyte.plan.price import Price
from halfbyte.plan.recommend import Candidate, DataShape, Plan, Request, check_fits, estimate, make_plan
from halfbyte.quant import QuantOptions

CPU = Hardware("Linux x86_64", "a laptop", 2, 16_000_000_000, 12_000_000_000, "physical memory", ("AVX2",))
GPU = replace(CPU, gpus=(Gpu(0, "a card", 24_000_000_000, 23_000_000_000, "8.9", True),))
RATES = Rates("cpu", {"float32": 2e11, "bfloat16": 8e11}, 2e10, 1e9)
DATA = DataShape(rows=1000, tokens=200_000, longest=600, supervised_share=0.4, spread=80, eval_tokens=10_000)
BATCHES = ((16, 1), (8, 2), (4, 4), (2, 8), (1, 16))
CONSTANTS = Calibration(memory_scale=1.1, memory_spread=0.2, memory_margin=100_000_000, time_scale=2.0, time_spread=0.5,
                        probe_spread=0.1)  # fmt: skip


def spec_of(size: str) -> ModelSpec:
    shapes = {
        "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
        "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    }
    return ModelSpec.from_config({"model_type": "llama", "vocab_size": 32000, **shapes[size]})


def request(**changes: Any) -> Request:
    asked = Request("auto", "bfloat16", "cpu", QuantOptions(), LoraOptions(), "adamw", BATCHES, None, 3.0, None)
    return replace(asked, **changes)


def plan(
    size: str = "1b", machine: Hardware = CPU, budget: int | None = None, data: DataShape = DATA, **changes: Any
) -> Plan:
    device = {"device": "cuda"} if machine.gpus else {}
    given = {k: changes.pop(k) for k in ("constants", "price", "deadline", "advise", "asked") if k in changes}
    return make_plan(spec_of(size), request(**device, **changes), data, machine, RATES, budget, **given)


# -- methods and verdicts ---------------------------------------------------------------------------------------------


def test_full_can_be_asked_for() -> None:
    made = plan(method="full", budget=10**12)
    assert (made.method, made.reason) == ("full", "asked for")


def test_memory_orders_methods_as_everybody_knows() -> None:
    by_name = {e.method: e for e in plan("7b", budget=10**12).estimates}
    assert by_name["qlora"].peak < by_name["lora"].peak < by_name["full"].peak
    assert by_name["full"].trainable > 100 * by_name["lora"].trainable == 100 * by_name["qlora"].trainable


def test_fits_is_a_promise_and_tight_is_not() -> None:
    least = min(plan(budget=1, method="qlora").estimates, key=lambda e: e.peak_p95)
    assert least.peak < least.peak_p95
    for budget, verdict in (
        (least.peak_p95, "fits"),
        (least.peak_p95 - 1, "tight"),
        (least.peak, "tight"),
        (least.peak - 1, "does not fit"),
    ):
        made = plan(budget=budget, method="qlora")
        assert made.verdict(made.chosen) == verdict, budget


@pytest.mark.parametrize(
    ("budget", "method", "message"),
    [
        (300_000_000, "auto", r"qlora needs at least .* the budget is 0.30 GB \(--memory\)"),
        (3_000_000_000, "full", r"full needs at least .*: --method qlora fits \("),
        (600_000_000, "qlora", r"qlora needs at least .*with 1 x 16 rows, activations recomputed.*most of it is "),
    ],
)
def test_what_does_not_fit_is_refused_with_the_minimum_and_a_way_out(budget: int, method: str, message: str) -> None:
    made = plan(budget=budget, method=method)
    with pytest.raises(DoesNotFit, match=message) as caught:
        check_fits(made)
    assert "\n" not in str(caught.value)
    large = replace(CPU, memory_total=10**12)
    check_fits(plan(machine=large, budget=made.chosen.peak_p95, method=made.method))  # what was named is enough


def test_a_budget_is_no_memory() -> None:
    """A budget above what the machine has can be planned with, but no run is started that needs more than there is."""
    made = plan("7b", budget=10**12, method="full")
    assert made.verdict(made.chosen) == "fits"
    with pytest.raises(DoesNotFit, match=r"^full needs up to .*, and this machine has 16.00 GB of memory in all"):
        check_fits(made)
    check_fits(plan(budget=10**12, method="qlora"))
    card = plan("7b", machine=GPU, budget=10**12, method="full")
    with pytest.raises(DoesNotFit, match=r"has 24\.00 GB of GPU memory in all"):
        check_fits(card)


def test_a_deadline_is_answered_for_a_method_that_was_asked_for() -> None:
    time = plan(method="qlora").chosen.time
    for deadline, said in (
        (time.p95 + 1, "asked for"),
        (time.p95 - 1, "asked for; it may take longer than the "),
        (time.p50 - 1, "asked for; it is not done within "),
    ):
        reason = plan(method="qlora", deadline=deadline).reason
        assert reason.startswith(said)
        assert (reason == said) == (deadline > time.p95)
    assert "within 5 s" in plan(method="qlora", deadline=5.0).reason


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_the_layout_shrinks_before_it_gives_up() -> None:
    """Larger budgets never get smaller layouts, and each layout makes the same update."""
    seen = []
    for budget in range(1_600_000_000, 8_000_000_000, 200_000_000):
        e = plan(budget=budget, method="qlora").chosen
        assert e.batch[0] * e.batch[1] == 16
        seen.append((not e.job.checkpointing, e.batch[0], e.job.eval_batch_tokens))
        if e.peak_p95 > budget:
            assert e.batch == (1, 16), "the smallest layout of all"
            assert e.job.checkpointing
    layouts = [(kept, rows) for kept, rows, _ in seen]
    assert layouts == sorted(layouts)
    assert len(set(layouts)) >= 4
    assert seen[-1] == (True, 2, 4096), "no larger than 2,048 tokens, which products do not need"
    assert plan(budget=12_000_000_000, checkpointing=True).chosen.job.checkpointing


def test_an_evaluation_reads_fewer_rows_at_once_where_it_is_the_peak() -> None:
    """A row of 64 tokens takes little in training; 4,096 tokens at once in an evaluation take more."""
    short = replace(DATA, longest=64, tokens=50_000, spread=5)
    roomy = plan(budget=8_000_000_000, method="qlora", data=short, batches=((1, 16),)).chosen
    assert (roomy.peak_phase, roomy.job.eval_batch_tokens) == ("evaluate", 4096)
    tight = plan(budget=roomy.peak_p95 - 1, method="qlora", data=short, batches=((1, 16),)).chosen
    assert tight.peak_p95 < roomy.peak_p95
    assert tight.batch == roomy.batch, "training is as it was"
    assert 256 <= tight.job.eval_batch_tokens < 4096
    fixed = plan(budget=roomy.peak_p95 - 1, method="qlora", data=short, batches=((1, 16),), eval_tokens=4096).chosen
    assert fixed.job.eval_batch_tokens == 4096
    long = replace(DATA, longest=3000, tokens=600_000)
    assert plan(budget=1, method="qlora", data=long).chosen.job.eval_batch_tokens >= 2048, "a row is never cut"


def test_a_budget_never_changes_what_is_computed() -> None:
    """Optimizer, rank and lengths are the user's: less memory makes advice, no other run."""
    for budget in (500_000_000, 2_000_000_000, 12_000_000_000):
        job = plan(budget=budget, method="qlora").chosen.job
        assert (job.optim, job.lora, job.longest) == ("adamw", LoraOptions(), 600)


def test_packing_makes_smaller_batches_than_the_longest_row_allows() -> None:
    assert DATA.largest_micro_batch(16, 16) == 16 * 200 + 3 * 80 * 4
    assert DATA.largest_micro_batch(2, 16) == 1200
    assert DataShape(3, 30, 20, 1.0).largest_micro_batch(1, 1) == 20


def test_cut_rows_are_shorter_and_never_longer() -> None:
    assert DATA.cut(600) is DATA
    half = DATA.cut(100)
    assert (half.longest, half.tokens, half.eval_tokens, half.rows) == (100, 100_000, 5_000, 1000)
    assert DATA.cut(400).tokens == DATA.tokens, "an upper bound: the mean is 200"


def test_a_raised_rank_must_not_cost_the_layout() -> None:
    roomy = plan(budget=12_000_000_000, open_rank=True)
    by_name = {e.name: e.job.lora.lora_r for e in roomy.estimates}
    assert by_name == {"qlora": 32, "lora": 16, "full": 16}
    smallest = next(e for e in plan(budget=1_000_000_000, open_rank=True).estimates if e.name == "qlora")
    assert smallest.job.lora.lora_r == 16
    kept = plan(budget=12_000_000_000, lora=LoraOptions(lora_r=4))
    assert {e.job.lora.lora_r for e in kept.estimates} == {4}


# -- intervals, time, money -------------------------------------------------------------------------------------------


def test_intervals_come_from_the_calibration() -> None:
    e = plan(budget=10**12, constants=CONSTANTS).chosen
    raw = sum(e.memory[e.peak_phase].values())
    assert e.peak == pytest.approx(1.1 * raw, abs=1)
    assert e.peak_p95 == pytest.approx(1.1 * 1.2 * raw + 1e8, abs=1)
    seconds = sum(e.seconds.values())
    assert (e.total_seconds, e.seconds_p95) == (pytest.approx(2 * seconds), pytest.approx(3 * seconds))
    for phase in e.phases:
        parts = [e.of_component(phase, name) for name in (e.merge if phase == "merge" else e.memory[phase])]
        assert sum(p.p50 for p in parts) == pytest.approx(e.of_phase(phase).p50)
        assert sum(p.p95 for p in parts) == pytest.approx(e.of_phase(phase).p95)


def test_a_probe_replaces_the_seconds_and_narrows_them() -> None:
    made = plan(budget=10**12, constants=CONSTANTS, price=Price(3.6, "EUR"))
    probed = made.corrected({"train": 1000.0, "evaluate": 100.0})
    other = made.chosen.seconds["load"] + made.chosen.seconds["save"]
    assert probed.chosen.total_seconds == pytest.approx(1100 + other), "a probe has this run's scale"
    assert probed.chosen.seconds_p95 == pytest.approx(1.1 * (1100 + other))
    assert probed.chosen.cost.p50 == pytest.approx((1100 + other) / 1000)  # type: ignore[union-attr]
    assert made.chosen.probed is False, "a plan is a value"
    assert [e.name for e in probed.estimates] == [e.name for e in made.estimates]
    assert json.loads(json.dumps(probed.as_dict()))["probed"] is True
    assert not any(e["probed"] for e in probed.as_dict()["methods"] if e["method_name"] != probed.name)


def test_time_grows_with_work() -> None:
    def seconds(**changes: Any) -> float:
        return plan(budget=10**12, **{"method": "lora", **changes}).chosen.seconds["train"]

    assert seconds(epochs=6.0) == pytest.approx(2 * seconds(epochs=3.0), rel=0.01)
    assert seconds(checkpointing=True) > 1.2 * seconds()
    assert seconds(max_steps=10) < seconds()
    assert seconds(method="full") > seconds()
    assert seconds(dtype="float32") > 2 * seconds()


def test_disk_counts_what_stands_at_once() -> None:
    e = plan(budget=10**12, method="full").chosen
    each = (e.disk[1]["checkpoints"] - e.disk[0]["checkpoints"]) / 2
    assert each >= 2 * spec_of("1b").total_parameters * 4, "moments in float32"
    assert e.disk_bytes.p95 - e.disk_bytes.p50 == pytest.approx(2 * each)
    more = plan(budget=10**12, method="full", checkpoints=5).chosen
    assert more.disk_bytes.p50 - e.disk_bytes.p50 == pytest.approx(3 * each)


# -- what would have to change ----------------------------------------------------------------------------------------


def test_every_change_that_is_named_was_tried_and_fits() -> None:
    """The named change, made to the request by hand, is within the budget, and the request without it is not."""
    least = next(e for e in plan(budget=1).estimates if e.name == "lora")
    budget = least.peak_p95 - 30_000_000
    made = plan(budget=budget, advise=True)
    assert made.changes is not None
    named = made.changes["lora"]
    kinds = {field for change in named for field in change.fields}
    assert kinds == {"optim", "max_seq_length", "lora_r", "method"}
    for change in named:
        assert change.peak_p95 <= budget
        asked, rows = request(method="lora"), DATA
        for field, value in change.fields.items():
            if field == "max_seq_length":
                rows = rows.cut(value)
            elif field == "lora_r":
                asked = asked.with_rank(value)
            elif field == "optim":
                asked = replace(asked, optim=value, updates=OptimOptions(optim=value))
            elif field == "method":
                asked = replace(asked, method=value)
        candidate = Candidate("lora", asked)
        again = estimate(spec_of("1b"), candidate, rows, RATES, budget)
        assert again.peak_p95 == change.peak_p95
        assert least_peak(spec_of("1b"), candidate, rows, of("cpu")) <= budget
    assert "qlora" not in made.changes, "it fits as it is"


def test_what_the_user_fixed_is_named_first() -> None:
    made = plan(budget=3_200_000_000, method="qlora", batches=((16, 1),), checkpointing=False, advise=True)
    assert made.changes is not None
    assert list(made.changes["qlora"][0].fields) in (
        ["gradient_checkpointing"],
        ["per_device_train_batch_size", "gradient_accumulation_steps"],
        ["per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"],
    )
    assert made.changes["qlora"][0].flags.startswith(
        ("--gradient-checkpointing", "--per-device-train-batch-size 1 --gradient-accumulation-steps 16")
    )


def test_several_changes_at_once_where_one_is_not_enough() -> None:
    """Full fine-tuning of a 1B model needs its weights and gradients whatever is changed: a third of its budget."""
    whole = plan(budget=1, method="full")
    least = plan(budget=whole.chosen.peak_p95 // 2, method="full", advise=True)
    assert least.changes is not None
    assert all(change.peak_p95 <= least.budget for change in least.changes["full"])


# -- plan.json --------------------------------------------------------------------------------------------------------


def test_plan_json_has_what_others_rely_on() -> None:
    made = json.loads(json.dumps(plan(price=Price(0.5, "EUR"), deadline=1e9).as_dict()))
    intervals = [made[key] for key in ("peak_memory_bytes", "seconds", "disk_bytes", "cost")]
    intervals += made["memory_by_phase"].values()
    intervals += made["seconds_by_phase"].values()
    for found in intervals:
        assert {"p50", "p95"} <= set(found)
        assert 0 <= found["p50"] <= found["p95"]
    assert made["schema_version"] == 2
    assert {m["method"] for m in made["methods"]} == {"qlora", "lora", "full"}
    assert {m["verdict"] for m in made["methods"]} <= {"fits", "tight", "does not fit"}
    assert all(m["fits"] == (m["verdict"] == "fits") for m in made["methods"])
    assert list(made["memory_by_phase"]) == ["load", "train", "evaluate", "save", "merge"]
    peak = made["memory_by_component"][made["peak_phase"]]
    assert made["peak_memory_bytes"]["p50"] == pytest.approx(sum(part["p50"] for part in peak.values()), abs=20)
    assert made["peak_memory_bytes"] == made["memory_by_phase"][made["peak_phase"]]
    assert sum(s["p50"] for s in made["seconds_by_phase"].values()) == pytest.approx(made["seconds"]["p50"], abs=0.3)
    assert made["cost"]["currency"] == "EUR"
    assert made["cost"]["p50"] == pytest.approx(made["seconds"]["p50"] * 0.5 / 3600, abs=1e-3)
    assert (made["deadline_seconds"], made["packing"], made["lora_r"]) == (1e9, True, 16)
    assert plan().as_dict()["cost"] is None


def test_a_merge_afterwards_is_not_part_of_the_runs_peak() -> None:
    made = plan(budget=10**12)
    e = made.chosen
    assert e.merge == memory.merge_phase(spec_of("1b"), e.job)
    assert e.peak == max(e.of_phase(phase).p50 for phase in e.memory)
    assert next(one for one in made.estimates if one.name == "full").merge == {}
