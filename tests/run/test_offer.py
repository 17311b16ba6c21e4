"""`halfbyte plan` from config to answer: this machine, machines of the catalogue, models without weights."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import DoesNotFit, UsageError
from halfbyte.plan.recommend import DataShape, Plan
from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.offer import Where, duration, offer, refuse
from halfbyte.run.planning import make, resolve, survey

GIB = 2**30


@pytest.fixture(autouse=True)
def _own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No machines file but the test's."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def here(config: RunConfig, **given: Any) -> Plan:
    answer = offer(config, **given)
    assert isinstance(answer, Plan)
    return answer


def among(config: RunConfig, **given: Any) -> Where:
    answer = offer(config, **given)
    assert isinstance(answer, Where)
    return answer


@pytest.fixture
def priced(tmp_path: Path) -> Path:
    file = tmp_path / "machines.yaml"
    file.write_text(
        "rtx-3060: {price: 0.10 EUR/h}\nrtx-4090: {price: 0.34 EUR/h}\na100-80g: {price: 1.50 EUR/h}\n"
        "big-box:\n  kind: cpu\n  memory: 1TB\n  bandwidth: 4e11\n  gemm: {bfloat16: 2e13, float32: 5e12}\n"
        "  price: 5 USD/h\n"
    )
    return file


def test_a_name_of_the_catalogue_is_enough() -> None:
    plan = here(load_config(model="llama-3.1-8b"), devices=["rtx-4090"], price="0.34 EUR/h")
    assert plan.machine == "rtx-4090"
    assert plan.budget <= 24 * GIB
    by_name = {e.name: e for e in plan.estimates}
    assert plan.verdict(by_name["full"]) == "does not fit"
    # 2 bytes for each of 8.03e9 parameters but the embedding, which is read from the file where it is used.
    assert by_name["lora"].memory["train"]["base weights"] == pytest.approx(8.03e9 * 2, rel=0.07)
    assert by_name["lora"].cost is not None
    assert by_name["lora"].cost.p50 == pytest.approx(by_name["lora"].time.p50 / 3600 * 0.34)
    assert plan.data.assumed
    said = " ".join(plan.assumed)
    assert "no data was given: 1,000 rows of 512 tokens" in said
    assert "nothing was measured" in said


def test_where_a_run_should_go(priced: Path) -> None:
    asked = {"devices": ["rtx-3060,rtx-4090", "a100-80g"], "machines": priced}
    config = load_config(model="llama-3.1-8b")
    every = among(config, **asked)
    assert [plan.machine for plan in every.plans] == ["rtx-3060", "rtx-4090", "a100-80g"]
    assert (every.placed, every.picked, every.pick) == (None, None, None)
    methods = {plan.machine: plan.name for plan in every.plans}
    assert (methods["rtx-3060"], methods["a100-80g"]) == ("qlora", "lora"), "each gets what the rule takes there"

    fast = among(config, **asked, pick="fastest")
    assert fast.picked is not None
    assert fast.picked.machine == min(every.plans, key=lambda plan: plan.chosen.time.p95).machine
    cheap = among(config, **asked, pick="cheapest")
    assert cheap.picked is not None
    costs = {plan.machine: plan.chosen.cost.p50 for plan in every.plans if plan.chosen.cost is not None}
    assert len(costs) == 3
    assert cheap.picked.machine == min(costs, key=lambda name: costs[name])
    assert "cheapest" in json.dumps(cheap.as_dict()["reason"])


def test_a_deadline_rules_out_what_is_too_slow(priced: Path) -> None:
    """The cheapest that keeps it, at its P95; where none does, the answer says by when the first would be done."""
    config = load_config(model="llama-3.1-8b", num_train_epochs=40)
    asked = {"devices": ["rtx-3060", "rtx-4090"], "machines": priced, "pick": "cheapest"}
    free = among(config, **asked)
    slow, quick = (plan.chosen.time.p95 for plan in free.plans)
    assert quick < slow
    kept = among(config, **asked, deadline=f"{(slow + quick) / 2:.0f}s")
    assert kept.picked is not None
    assert kept.picked.machine == "rtx-4090"
    never = among(config, **asked, deadline=f"{quick / 100:.0f}s")
    assert never.picked is None
    assert "it cannot be done within" in str(never.problem)
    with pytest.raises(DoesNotFit, match="give a longer --deadline"):
        refuse(never)


def test_what_no_machine_holds_is_refused_with_the_nearest(priced: Path) -> None:
    answer = among(load_config(model="llama-3.1-70b"), devices=["rtx-3060", "rtx-4090"], pick="fastest")
    assert [plan.clause for plan in answer.plans] == ["none", "none"]
    with pytest.raises(DoesNotFit, match=r"none of these devices holds it: the nearest is rtx-4090, where qlora needs"):
        refuse(answer)
    one = here(load_config(model="llama-3.1-70b"), devices=["rtx-4090"])
    assert one.changes is not None
    machines = [change.fields["device"] for change in one.changes["qlora"] if "device" in change.fields]
    assert machines, "a machine of the catalogue holds it"
    again = here(load_config(model="llama-3.1-70b"), devices=machines)
    assert again.fits(next(e for e in again.estimates if e.name == "qlora"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"devices": ["rtx-3060", "a100-80g"], "pick": "cheapest"},
            r"needs prices, and there is none for rtx-3060.*price: ",
        ),
        ({"pick": "cheapest"}, "needs prices, and there is none for this machine .*give --price '0.34 EUR/h'"),
        ({"devices": ["rtx-3060"], "pick": "best"}, "--pick best: it is cheapest or fastest"),
        ({"devices": ["cpu,auto"]}, "--device: cpu and auto are both this machine: name one of them"),
        ({"devices": ["rtx-9999"]}, "'rtx-9999' is not a machine of the catalogue: did you mean"),
        (
            {"devices": ["rtx-3060", "rtx-4090"], "price": "1 EUR"},
            "--price is the price of one machine, and 2 were given",
        ),
        ({"price": "0.34"}, "has no currency"),
        ({"price": "-1 EUR"}, "negative"),
        ({"price": "cheap"}, "not an amount of money"),
        ({"deadline": "soon"}, "'soon' is not a duration: write a number and a unit, as in 30m, 6h or 2d"),
        ({"methods": ["lora", "vera"]}, "'vera' is not a method"),
        ({"machines": Path("nowhere.yaml"), "devices": ["rtx-3060"]}, "nowhere.yaml: no such file of machines"),
    ],
)
def test_bad_questions_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        offer(load_config(model="qwen2.5-0.5b"), **given)
    assert "\n" not in str(caught.value)


def test_two_currencies_are_not_compared(priced: Path) -> None:
    with pytest.raises(UsageError, match="prices in two currencies cannot be compared"):
        offer(load_config(model="qwen2.5-0.5b"), devices=["rtx-4090,big-box"], machines=priced, pick="cheapest")


def test_durations() -> None:
    known = {"45s": 45, "30m": 1800, "90 min": 5400, "6h": 21600, "1h30m": 5400, "2d": 172800, "1.5 hours": 5400}
    assert {text: duration(text) for text in known} == known
    for text in ("", "6", "h", "0h", "-5h", "6 weeks", "1h and a bit", "1e3h", "9999999d", "nan h"):
        with pytest.raises(UsageError, match="is not a duration"):
            duration(text)


def test_this_machine_with_data_and_methods(model_folder: Path, data_file: Path) -> None:
    config = load_config(model=str(model_folder), data=str(data_file), dtype="float32", memory="4GB")
    plan = here(config, methods=["full,lora,qlora,dora,galore"], price="3.6 EUR/h")
    assert [e.name for e in plan.estimates] == ["full", "lora", "qlora", "dora", "galore"]
    assert plan.name == "lora"
    assert plan.machine is None
    assert plan.assumed == ()
    lora, dora = plan.estimates[1], plan.estimates[3]
    assert dora.trainable > lora.trainable, "a magnitude a row"
    assert plan.estimates[4].job.optim == "galore_adamw"
    assert plan.chosen.cost is not None
    assert plan.chosen.cost.p50 == pytest.approx(plan.chosen.time.p50 / 1000)
    asked = here(config.replace(method="qdora"))
    assert ([e.name for e in asked.estimates], asked.name) == (["full", "lora", "qlora", "qdora"], "qdora")


def test_the_configs_own_fields_keep_auto_from_what_would_ignore_them(model_folder: Path) -> None:
    made = make(survey(load_config(model=str(model_folder), use_dora=True, memory="4GB"), to_train=False))
    assert (made.method, made.name) == ("lora", "dora")


def test_what_the_rule_chose_is_in_the_config(model_folder: Path, data_file: Path) -> None:
    """`auto` with an open rank, on a base that it quantizes: the resolved config holds rank and layout."""
    config = load_config(model=str(model_folder), data=str(data_file), dtype="float32", memory="4GB")
    found = survey(config)
    plan = make(found)
    resolved = resolve(found, plan)
    job = plan.chosen.job
    assert (resolved.method, resolved.lora_r, resolved.lora_alpha) == (plan.method, job.lora.lora_r, 32)
    assert resolved.eval_batch_tokens == job.eval_batch_tokens == 4096
    assert (resolved.per_device_train_batch_size, resolved.gradient_accumulation_steps) == plan.chosen.batch
    assert resolved.target_modules == "all-linear"
    given = survey(config.replace(lora_r=16, method="qlora"))
    assert resolve(given, make(given)).lora_r == 16


def test_an_explicit_rank_is_never_changed() -> None:
    open_rank = load_config(model="llama-3.1-8b", max_seq_length=256)
    for config, rank in ((open_rank, 32), (open_rank.replace(lora_r=16), 16), (open_rank.replace(method="qlora"), 16)):
        plan = here(config, devices=["rtx-3060"])
        assert plan.name == "qlora"
        assert plan.chosen.job.lora.lora_r == rank


def test_another_architecture_has_a_plan(tmp_path: Path) -> None:
    """GPT-2 from config.json alone: no weights, no tokenizer; the answer says that it is an estimate."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2}))
    plan = here(load_config(model=str(tmp_path), memory="8GB"))
    assert [e.name for e in plan.estimates] == ["lora", "qlora"]
    assert plan.chosen.memory["train"]["activations"] > 0
    assert any("gpt2 is run by transformers' own code" in said for said in plan.assumed)
    json.dumps(plan.as_dict())
    with pytest.raises(UsageError, match="method full is built for the decoder's families only"):
        here(load_config(model=str(tmp_path), method="full"))
    with pytest.raises(UsageError, match="method full is built for the decoder's families only"):
        here(load_config(model=str(tmp_path)), methods=["full", "lora"])


def test_another_machine_gives_no_more_than_it_has() -> None:
    config = load_config(model="llama-3.1-8b")
    usable = here(config, devices=["rtx-3060"]).budget
    for memory, budget in ((80_000_000_000, usable), (6_000_000_000, 6_000_000_000)):
        asked = here(config.replace(memory=memory), devices=["rtx-3060"])
        assert asked.budget == budget
        assert asked.chosen.peak_p95 <= budget or asked.clause == "none"


def test_a_machine_that_is_named_beside_a_budget_is_for_without_it() -> None:
    """`--device t4` typed beside `--memory 1GB` would have the same gigabyte."""
    config = load_config(model="llama-3.1-8b")
    for memory, note in ((None, False), ("1GB", True)):
        plan = here(config.replace(memory=memory), devices=["rtx-3070"])
        found = [change for changes in (plan.changes or {}).values() for change in changes if "device" in change.fields]
        assert found
        assert all(("without --memory" in change.note) == note for change in found)


def test_a_config_for_a_gpu_is_planned_for_others_without_having_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = load_config(model="llama-3.1-8b", device="cuda")
    assert here(config, devices=["rtx-4090"]).chosen.job.device == "cuda"
    with pytest.raises(UsageError, match="cuda was asked for"):
        here(config)


def test_a_deadline_is_answered_whatever_chose_the_method() -> None:
    plan = here(load_config(model="llama-3.1-8b", method="qlora"), devices=["rtx-4090"], deadline="5s")
    assert plan.reason == "asked for; it is not done within 5 s"
    assert "no method is done within 5 s" in here(load_config(model="llama-3.1-8b"), devices=["rtx-4090"],
                                                  deadline="5s").reason  # fmt: skip


def test_auto_takes_nothing_that_ignores_what_was_set() -> None:
    """So many tokens that all of the model would be trained: but a rank says adapters, and a format four bits."""
    many = DataShape(rows=1_000_000, tokens=500_000_000, longest=512, supervised_share=1.0)
    for given, method in (({}, "full"), ({"lora_r": 32}, "lora"), ({"target_modules": "q_proj"}, "lora"),
                          ({"quant_type": "nf4"}, "qlora"), ({"blocksize": 32, "lora_r": 8}, "qlora")):  # fmt: skip
        found = survey(load_config(model="qwen2.5-0.5b", memory="60GB", **given), to_train=False)
        found.__dict__["data"] = many
        assert make(found).method == method, given


def test_methods_that_none_of_the_rows_go_with_are_one_line(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}:", "chosen": " yes", "rejected": " no"} for i in range(30)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match="--methods full: these rows or this adapter need another"):
        offer(load_config(model=str(model_folder), data=str(file)), methods=["full"])


def test_memory_never_changes_an_update_that_is_made_layer_by_layer() -> None:
    """GaLore has one micro-batch an update: 16 rows, or advice to take fewer."""
    config = load_config(model="gemma-3-270m", method="galore", memory="60GB")
    roomy = here(config)
    assert (roomy.chosen.batch, roomy.chosen.job.steps) == ((16, 1), 189)
    least = here(config.replace(memory="1GB"))
    assert least.chosen.batch == (16, 1)
    asked = here(config.replace(memory=least.chosen.peak_p95 - 1))
    assert asked.changes is not None
    advice = asked.changes["galore"][0]
    assert list(advice.fields) == ["per_device_train_batch_size"]
    assert advice.note.endswith("instead of 16 rows an update")
    fewer = here(config.replace(memory=asked.budget, **advice.fields))
    assert fewer.fits(fewer.chosen)


def test_a_quantized_model_of_which_only_the_config_is_there_says_so(tmp_path: Path) -> None:
    """How its tensors are packed stands in their file."""
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
    for quantized in ({}, {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}):
        (tmp_path / "config.json").write_text(json.dumps(config | quantized))
        plan = here(load_config(model=str(tmp_path), memory="4GB"))
        assert any("planned as a 16-bit model" in said for said in plan.assumed) == bool(quantized)
