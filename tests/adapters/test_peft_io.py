"""PEFT's two files: what we write, what we read, and files that are wrong. PEFT itself is in test_peft_parity."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.adapters import LoraOptions, adapter_state, attach, load_adapter, parameters, save_adapter
from halfbyte.adapters.peft_io import lora_options, read_adapter_config, read_options
from halfbyte.errors import UsageError
from tests.adapters.models import tiny


def saved(folder: Path, **options: Any) -> LoraOptions:
    made = LoraOptions(**options)
    model = tiny()
    attach(model, made, seed=3)
    with torch.no_grad():
        for p in parameters(model):
            p.add_(0.05)
    save_adapter(model, folder, made, "some/base")
    return made


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "lora_alpha": 5.5}])
def test_a_saved_adapter_comes_back_exactly(tmp_path: Path, options: dict[str, Any]) -> None:
    made = saved(tmp_path, **options)
    model = tiny()
    read = load_adapter(model, tmp_path)
    again = tiny()
    attach(again, made, seed=3)
    with torch.no_grad():
        for p in parameters(again):
            p.add_(0.05)
    torch.testing.assert_close(model.logits(torch.arange(9)), again.logits(torch.arange(9)), rtol=0, atol=0)
    assert (read.lora_r, read.lora_alpha, read.use_rslora) == (made.lora_r, made.lora_alpha, made.use_rslora)
    state, expected = adapter_state(model), adapter_state(again)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) for k in state)


def test_target_modules_are_short_names_where_those_are_enough(tmp_path: Path) -> None:
    saved(tmp_path / "all")
    config = json.loads((tmp_path / "all/adapter_config.json").read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    saved(tmp_path / "one", target_modules=["model.layers.1.self_attn.q_proj"])
    config = json.loads((tmp_path / "one/adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("change", "targets"),
    [
        ({}, ["q_proj", "v_proj"]),
        ({"target_modules": ["v_proj", "c_attn", "q_proj"]}, ["q_proj", "v_proj"]),
        ({"target_modules": r".*\.[qv]_proj"}, r".*\.[qv]_proj"),
        ({"target_modules": ["q_proj"]}, None),
        ({"target_modules": "all-linear", "layers_to_transform": [0, 1]}, None),
        ({"target_modules": None}, None),
        ({"target_modules": [1, {}]}, None),
    ],
)
def test_the_targets_of_a_file(tmp_path: Path, change: dict[str, Any], targets: Any) -> None:
    """As its config says, where that is what the tensors are; else each by its name."""
    saved(tmp_path, target_modules=["q_proj", "v_proj"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found = read_options(tmp_path).target_modules
    if targets is None:
        assert len(found) == 4
        assert found[0] == "model.layers.0.self_attn.q_proj"
    else:
        assert found == targets


def test_bfloat16_files_are_half_as_large(tmp_path: Path) -> None:
    saved(tmp_path, adapter_dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    load_adapter(model := tiny(), tmp_path)
    assert {t.dtype for t in adapter_state(model).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "no lora_magnitude_vector"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head' in modules_to_save"),
        ({"use_qalora": True}, "QALoRA"),
        ({"r": 5}, "rank 16"),
        ({"init_lora_weights": "pissa_niter_4"}, "for a base that PEFT changed"),
        ({"init_lora_weights": "PiSSA"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "for a base that PEFT changed"),
        ({"init_lora_weights": "corda"}, "for a base that PEFT changed"),
        ({"init_lora_weights": "loftq"}, "for a base that PEFT changed"),
        ({"init_lora_weights": "lora_ga"}, "for a base that PEFT changed"),
    ],
)
def test_what_we_cannot_compute_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UsageError, match=message):
        load_adapter(tiny(), tmp_path)


@pytest.mark.parametrize("initial", [True, False, None, "gaussian", "orthogonal", "mica", "eva"])
def test_initial_values_that_leave_the_base_alone(tmp_path: Path, initial: Any) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": initial}))
    load_adapter(tiny(), tmp_path)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no adapter_config\.json"):
        load_adapter(tiny(), tmp_path)
    saved(tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()

    config.write_text(text[:40])
    with pytest.raises(UsageError, match="not JSON"):
        load_adapter(tiny(), tmp_path)
    config.write_text(text)

    weights.write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="broken"):
        load_adapter(tiny(), tmp_path)

    tensors = load_file_bytes(whole, tmp_path)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, weights)
    with pytest.raises(UsageError, match=r"lora_B of .*q_proj is missing"):
        load_adapter(tiny(), tmp_path)
    save_file({**tensors, name: torch.zeros(7, 16)}, weights)
    with pytest.raises(UsageError, match="another base"):
        load_adapter(tiny(), tmp_path)
    extra = {
        f"base_model.model.extra.lora_{f}.weight": t for f, t in (("A", torch.zeros(16, 4)), ("B", torch.zeros(4, 16)))
    }
    save_file({**tensors, **extra}, weights)
    with pytest.raises(UsageError, match="no place"):
        load_adapter(tiny(), tmp_path)

    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match="never loads"):
        load_adapter(tiny(), tmp_path)


def load_file_bytes(data: bytes, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "whole.safetensors"
    path.write_bytes(data)
    return load_file(path)


def test_a_model_without_adapters_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter"):
        save_adapter(tiny(), tmp_path, LoraOptions(), "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": {"a": 1}}, "lora_alpha cannot be"),
        ({"lora_alpha": float("nan")}, "lora_alpha cannot be"),
        ({"r": 0}, "lora_r cannot be 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern cannot be"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern cannot be"),
        ({"modules_to_save": True}, "modules_to_save cannot be"),
        ({"modules_to_save": [{}], "task_type": "SEQ_CLS"}, "modules_to_save cannot be"),
    ],
)
def test_values_that_are_none_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lora_options({"r": 4, "lora_alpha": 8, **change})


@pytest.mark.parametrize("text", [b"[" * 100_000, b"9" * 5000, b"\xff", b'"text"'])
def test_configs_that_are_no_json(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text)
    with pytest.raises(UsageError, match=r"is not JSON|peft_type is"):
        read_adapter_config(tmp_path)
