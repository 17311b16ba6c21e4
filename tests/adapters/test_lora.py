"""Which linears get an adapter, with what rank, scale and initial values."""

import math

import pytest
import torch

from halfbyte.adapters import (
    LoraOptions,
    adapter_state,
    attach,
    detach,
    disabled,
    load_adapter_state,
    parameters,
    target_names,
)
from halfbyte.errors import UsageError
from halfbyte.linear import segments
from tests.adapters.models import tiny

NAMES = [f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", NAMES),
        (["all-linear"], NAMES),
        ("q_proj", [NAMES[0], NAMES[3]]),
        ("q_proj, down_proj", [NAMES[0], NAMES[2], NAMES[3], NAMES[5]]),
        (["self_attn.k_proj"], [NAMES[1], NAMES[4]]),
        ([NAMES[4]], [NAMES[4]]),
        (r".*layers\.1\..*_proj", NAMES[3:]),
    ],
)
def test_targets(targets: str | list[str], expected: list[str]) -> None:
    assert target_names(NAMES, targets) == expected


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_prj", "did you mean q_proj"),
        ("lm_head", "has down_proj, k_proj, q_proj"),
        ("(", "regular"),
        ("z.*", "no lin"),
    ],
)
def test_targets_that_select_nothing(targets: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        target_names(NAMES, targets)


def test_all_linear_is_every_linear_but_the_head() -> None:
    model = tiny()
    report = attach(model, LoraOptions(lora_r=4))
    assert len(report.names) == 7 * model.spec.num_layers
    expected = sum(4 * (x.out_features + x.in_features) for x in model.spec.linears())
    assert report.trainable_parameters == expected == sum(p.numel() for p in parameters(model))
    assert report.total_parameters == model.spec.total_parameters + expected
    assert {p for p in model.parameters() if p.requires_grad} == set(parameters(model))


def test_a_fresh_adapter_changes_nothing_and_is_reproducible() -> None:
    model = tiny()
    ids = torch.arange(10)
    before = model.logits(ids)
    attach(model, LoraOptions(), seed=7)
    torch.testing.assert_close(model.logits(ids), before, rtol=0, atol=1e-6)
    first = {k: v.clone() for k, v in adapter_state(model).items()}
    torch.manual_seed(999)
    attach(model, LoraOptions(), seed=7)
    assert all(torch.equal(first[k], v) for k, v in adapter_state(model).items())
    attach(model, LoraOptions(), seed=8)
    assert any(not torch.equal(first[k], v) for k, v in adapter_state(model).items())


def test_initial_values_have_peft_s_distribution() -> None:
    model = tiny()
    attach(model, LoraOptions(lora_r=64))
    a = torch.cat([p.flatten() for n, p in adapter_state(model).items() if "lora_A" in n and "down" not in n])
    bound = 1 / math.sqrt(model.spec.hidden_size)
    assert a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    attach(model, LoraOptions(lora_r=64, init_lora_weights="gaussian"))
    a = torch.cat([p.flatten() for n, p in adapter_state(model).items() if "lora_A" in n])
    assert a.std().item() == pytest.approx(1 / 64, rel=0.05)


def test_scaling_and_patterns() -> None:
    options = LoraOptions(
        lora_r=8, lora_alpha=16, rank_pattern={"down_proj": 4}, alpha_pattern={r"layers\.1\..*q_proj": 32}
    )
    assert options.scaling_of("model.layers.0.self_attn.q_proj") == 2
    assert options.scaling_of("model.layers.1.self_attn.q_proj") == 4
    assert options.scaling_of("model.layers.1.mlp.down_proj") == 4
    assert LoraOptions(lora_r=16, lora_alpha=8, use_rslora=True).scaling_of("x") == 2


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_match_nothing_are_named(option: str) -> None:
    attach(tiny(), LoraOptions(**{option: {"mlp.down_proj": 4, r".*layers\.1\..*": 2}}))
    with pytest.raises(UsageError, match=f"{option}: 'q_porj' matches no linear of the model; did you mean q_proj"):
        attach(tiny(), LoraOptions(**{option: {"q_proj": 4, "q_porj": 4}}))


def test_disabled_is_the_base_inside_the_block_only() -> None:
    model = tiny()
    ids = torch.arange(10)
    base = model.logits(ids)
    attach(model, LoraOptions())
    with torch.no_grad():
        for p in parameters(model):
            p.add_(0.1)
    tuned = model.logits(ids)
    with disabled(model):
        torch.testing.assert_close(model.logits(ids), base)
    torch.testing.assert_close(model.logits(ids), tuned, rtol=0, atol=0)
    assert not torch.allclose(tuned, base)
    detach(model)
    torch.testing.assert_close(model.logits(ids), base)


def test_state_goes_round_and_refuses_another_shape() -> None:
    model, other = tiny(), tiny()
    attach(model, LoraOptions(), seed=1)
    attach(other, LoraOptions(), seed=2)
    load_adapter_state(other, adapter_state(model))
    assert all(torch.equal(v, adapter_state(other)[k]) for k, v in adapter_state(model).items())
    attach(other, LoraOptions(lora_r=4))
    with pytest.raises(UsageError, match="model needs"):
        load_adapter_state(other, adapter_state(model))
    attach(detached := tiny(), LoraOptions(target_modules="q_proj"))
    with pytest.raises(UsageError, match="no place"):
        load_adapter_state(detached, adapter_state(model))


def test_segments_of_a_quantized_base_take_adapters_too() -> None:
    model = tiny("nf4")
    attach(model, LoraOptions())
    assert all(s.weight.format == "nf4+dq" for s in segments(model).values())
    assert all(s.adapter is not None for s in segments(model).values())
