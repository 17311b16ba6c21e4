from typing import Any

import pytest

from halfbyte.compare.identity import id_of, mismatch, rows_per_update, wanted
from halfbyte.run.config import RunConfig, load_config

SAME = {"base model": "b", "data": "d", "chat template": "t"}
RECORD = {"base_model": {"fingerprint": "b"}, "data": {"fingerprint": "d"}, "chat_template": {"sha256": "t"}}


def config(**values: Any) -> RunConfig:
    return load_config(**{"model": "m", "data": "d", "method": "lora", **values})


def identity(**values: Any) -> str:
    return id_of(wanted(config(**values), SAME, pairs=False))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "elsewhere"}, {"data": "elsewhere.jsonl"}, {"output_dir": "x"}, {"save_minutes": 1},
        {"save_total_limit": 9}, {"logging_steps": 5}, {"memory": "6GB"}, {"report_to": "wandb"},
        {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"quant_type": "int4"}, {"learning_rate": 2e-4}, {"max_grad_norm": 1.0}, {"eval_batch_tokens": 128},
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_change_a_result_does_not_change_the_id(change: dict[str, Any]) -> None:
    assert identity(**change) == identity()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"lora_r": 8}, {"method": "qlora"}, {"method": "dora"}, {"learning_rate": 1e-4}, {"max_steps": 7},
        {"num_train_epochs": 1}, {"max_seq_length": 64}, {"packing": False}, {"eval_steps": 5}, {"dtype": "float32"},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 8}, {"target_modules": ["q_proj"]},
        {"optim": "adamw_8bit"}, {"gradient_checkpointing": True}, {"eval_seed": 3}, {"max_grad_norm": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_a_result_changes_the_id(change: dict[str, Any]) -> None:
    assert identity(**change) != identity()


def test_fingerprints_and_the_source_of_a_chain_are_part_of_it() -> None:
    plain = wanted(config(), SAME, pairs=False)
    ids = {id_of(wanted(config(), {**SAME, name: "other"}, pairs=False)) for name in SAME}
    assert len(ids | {id_of(plain), id_of(wanted(config(), SAME, False, "source"))}) == 5


def test_full_fine_tuning_has_no_rank_and_lora_no_quantization() -> None:
    assert identity(method="full", lora_r=8) == identity(method="full", lora_r=16)
    assert identity(method="qlora", blocksize=128) != identity(method="qlora")
    assert identity(method="full") == identity(method="full", learning_rate=2e-5)
    galore = identity(method="galore")
    assert galore != identity(method="galore", galore_rank=8)
    assert galore == identity(method="galore", learning_rate=2e-5 / 0.25)


def test_rows_of_an_update() -> None:
    assert rows_per_update(config()) == 16
    assert rows_per_update(config(per_device_train_batch_size=4, gradient_accumulation_steps=2)) == 8
    assert rows_per_update(config(method="galore")) == 16


def test_a_finished_run_is_held_against_what_is_wanted() -> None:
    want = wanted(config(), SAME, pairs=False)
    resolved = config().replace(
        dtype="bfloat16", device="cpu", learning_rate=2e-4, per_device_train_batch_size=8, max_grad_norm=1.0,
        gradient_accumulation_steps=2, gradient_checkpointing=False, per_layer_updates=False, task="causal",
    )  # fmt: skip
    assert mismatch(want, resolved, RECORD, pairs=False) is None
    assert mismatch(want, resolved.replace(lora_r=8), RECORD, False) == "lora_r 8, not 16"
    assert mismatch(want, resolved.replace(gradient_accumulation_steps=1), RECORD, False) == "8 rows an update, not 16"
    assert mismatch(want, resolved, {**RECORD, "data": {"fingerprint": "x"}}, False) == "another data"
    assert mismatch(want, resolved, {}, False) == "another base model"
    assert mismatch(want, resolved.replace(adapter_path="a"), RECORD, False) == "it goes on from an adapter"
    asked = wanted(config(dtype="float32"), SAME, pairs=False)
    assert mismatch(asked, resolved, RECORD, False) == "dtype 'bfloat16', not 'float32'"
