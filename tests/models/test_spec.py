"""A model's shapes from its config.json, against transformers, and configs that are wrong."""

from typing import Any

import pytest
import transformers

from halfbyte.errors import UsageError
from halfbyte.models.spec import ModelSpec
from tests.models import families

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize("name", families.FAMILIES)
def test_names_and_shapes_are_transformers_own(name: str) -> None:
    config = families.config(name)
    model = families.make_model(config)
    spec = ModelSpec.from_config(config.to_dict())
    theirs = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert dict(spec.tensors()) == theirs
    assert spec.total_parameters == sum(p.numel() for p in model.parameters())


def test_published_sizes() -> None:
    """Llama 2 7B has 6,738,415,616 parameters; Gemma 3 270M has 268,098,176, 167,772,160 of them the embedding."""
    llama = {**LLAMA, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    assert ModelSpec.from_config({**llama, "num_attention_heads": 32}).total_parameters == 6_738_415_616
    gemma = transformers.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
    )
    spec = ModelSpec.from_config(gemma.to_dict())
    assert (spec.total_parameters, spec.head_parameters) == (268_098_176, 167_772_160)


def test_the_spelling_of_transformers_4_means_the_same() -> None:
    """rope_theta, rope_scaling and rope_local_base_freq, as in the files on the Hub from before transformers 5."""
    scaling = {"type": "linear", "factor": 4.0}
    old = ModelSpec.from_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    new = ModelSpec.from_config({**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}})
    assert old.rope == new.rope
    gemma: dict[str, Any] = {**LLAMA, "model_type": "gemma3_text", "head_dim": 16}
    spec = ModelSpec.from_config({**gemma, "rope_theta": 1e6, "rope_local_base_freq": 2e4})
    assert spec.local_rope is not None
    assert (spec.rope.theta, spec.local_rope.theta) == (1e6, 2e4)


def test_a_multimodal_gemma3_is_read_through_its_text_config() -> None:
    text = {**LLAMA, "model_type": "gemma3_text", "head_dim": 16}
    spec = ModelSpec.from_config({"model_type": "gemma3", "text_config": text})
    assert spec.family == "gemma3_text"
    assert spec.hidden_size == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": -4}, "hidden_size is -4"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "share 3 key-value heads"),
        ({"hidden_act": "relu6"}, "relu6"),
        ({"rope_scaling": {"type": "magic"}}, "magic"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
    ],
)
def test_a_wrong_config_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelSpec.from_config({**LLAMA, **change})
