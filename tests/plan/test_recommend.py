import json
from dataclasses import replace
from typing import Any

import pytest

from halfbyte.adapters import LoraOptions
from halfbyte.errors import DoesNotFit
from halfbyte.models.spec import ModelSpec
from halfbyte.plan.hardware import Gpu, Hardware, Rates
from halfbyte.plan.recommend import DataShape, Plan, Request, check_fits, make_plan
from halfbyte.quant import QuantOptions

CPU = Hardware("Linux x86_64", "a laptop", 2, 16_000_000_000, 12_000_000_000, "physical memory", ("AVX2",))
GPU = replace(CPU, gpus=(Gpu(0, "a card", 24_000_000_000, 23_000_000_000, "8.9", True),))
RATES = Rates("cpu", {"float32": 2e11, "bfloat16": 8e11}, 2e10, 1e9)
DATA = DataShape(rows=1000, tokens=200_000, longest=600, supervised_share=0.4, spread=80, eval_tokens=10_000)
BATCHES = ((16, 1), (8, 2), (4, 4), (2, 8), (1, 16))


def spec_of(size: str) -> ModelSpec:
    shapes = {
        "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
        "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    }
    return ModelSpec.from_config({"model_type": "llama", "vocab_size": 32000, **shapes[size]})


def request(**changes: Any) -> Request:
    asked = Request("auto", "bfloat16", "cpu", QuantOptions(), LoraOptions(), "adamw", BATCHES, None, 3.0, None)
    return replace(asked, **changes)


def plan(size: str = "1b", machine: Hardware = CPU, budget: int | None = None, **changes: Any) -> Plan:
    device = {"device": "cuda"} if machine.gpus else {}
    return make_plan(spec_of(size), request(**device, **changes), DATA, machine, RATES, budget)


def test_a_laptop_gets_qlora_and_is_told_why() -> None:
    made = plan()
    assert made.method == "qlora"
    assert "instead of LoRA's 2.39 GB" in made.reason
    check_fits(made)


def test_a_large_card_gets_lora_and_a_full_one_qlora() -> None:
    assert plan(machine=GPU).method == "lora"
    tight = plan("7b", machine=GPU, budget=16_000_000_000)
    assert tight.method == "qlora"
    assert "which LoRA on a 16-bit base" in tight.reason


def test_full_is_never_chosen_but_can_be_asked_for() -> None:
    made = plan(machine=replace(GPU, gpus=(replace(GPU.gpus[0], free=10**12),)))
    assert made.fits(next(e for e in made.estimates if e.method == "full"))
    assert made.method == "lora"
    assert plan(method="full", budget=10**12).method == "full"


def test_memory_orders_methods_as_everybody_knows() -> None:
    by_name = {e.method: e for e in plan("7b", budget=10**12).estimates}
    assert by_name["qlora"].peak < by_name["lora"].peak < by_name["full"].peak
    assert by_name["full"].trainable > 100 * by_name["lora"].trainable == 100 * by_name["qlora"].trainable


def test_the_layout_shrinks_before_it_gives_up() -> None:
    roomy, tight = plan(budget=12_000_000_000).chosen, plan(budget=2_500_000_000).chosen
    assert roomy.batch[0] * DATA.longest <= 2048
    assert not roomy.job.checkpointing
    assert tight.batch[0] < roomy.batch[0] or tight.job.checkpointing
    assert tight.peak < roomy.peak
    assert tight.batch[0] * tight.batch[1] == 16
    assert plan(budget=12_000_000_000, checkpointing=True).chosen.job.checkpointing


@pytest.mark.parametrize(
    ("budget", "method", "message"),
    [
        (300_000_000, "auto", r"qlora needs .* the budget is 0.30 GB \(--memory\)"),
        (3_000_000_000, "full", r"full needs .*: --method qlora fits \("),
        (600_000_000, "qlora", r"qlora needs .*most of it is "),
    ],
)
def test_what_does_not_fit_is_told_with_a_way_out(budget: int, method: str, message: str) -> None:
    with pytest.raises(DoesNotFit, match=message) as caught:
        check_fits(plan(budget=budget, method=method))
    assert "\n" not in str(caught.value)


def test_time_grows_with_work() -> None:
    def seconds(**changes: Any) -> float:
        return plan(budget=10**12, **changes).chosen.seconds["train"]

    assert seconds(epochs=6.0) == pytest.approx(2 * seconds(epochs=3.0), rel=0.01)
    assert seconds(checkpointing=True) > 1.2 * seconds()
    assert seconds(max_steps=10) < seconds()
    assert seconds(method="full") > seconds(method="lora")
    assert seconds(dtype="float32", method="lora") > 2 * seconds(method="lora")


def test_plan_json_has_what_others_rely_on() -> None:
    made = json.loads(json.dumps(plan().as_dict()))
    for key in ("peak_memory_bytes", "seconds"):
        assert set(made[key]) == {"p50", "p95"}
        assert 0 < made[key]["p50"] < made[key]["p95"]
    assert made["schema_version"] == 1
    assert {m["method"] for m in made["methods"]} == {"qlora", "lora", "full"}
    assert made["peak_memory_bytes"]["p50"] == sum(made["memory_by_component"][made["peak_phase"]].values())
    assert sum(made["seconds_by_phase"].values()) == pytest.approx(made["seconds"]["p50"], abs=0.3)


def test_packing_makes_smaller_batches_than_the_longest_row_allows() -> None:
    assert DATA.largest_micro_batch(16, 16) == 16 * 200 + 3 * 80 * 4
    assert DATA.largest_micro_batch(2, 16) == 1200
    assert DataShape(3, 30, 20, 1.0).largest_micro_batch(1, 1) == 20
