"""The same run by other methods: which fields stay, and which go."""

import pytest

from halfbyte.errors import UsageError
from halfbyte.run.config import load_config
from halfbyte.run.variants import known_methods, variants


def names(found: list) -> list[str]:  # type: ignore[type-arg]
    return [one.name for one in found]


def test_by_default_three_ways_to_hold_a_base_and_the_configs_own() -> None:
    assert names(variants(load_config(model="m"))) == ["full", "lora", "qlora"]
    assert names(variants(load_config(model="m", method="lora"))) == ["full", "lora", "qlora"]
    assert names(variants(load_config(model="m", method="qdora"))) == ["full", "lora", "qlora", "qdora"]
    assert names(variants(load_config(model="m", method="galore"))) == ["full", "lora", "qlora", "galore"]
    mixed = load_config(model="m", method="lora", use_dora=True, use_rslora=True)
    assert names(variants(mixed)) == ["full", "lora", "qlora", "dora+rslora"]
    assert names(variants(load_config(model="m"), full=False)) == ["lora", "qlora"]


def test_the_configs_own_is_itself() -> None:
    config = load_config(model="m", method="dora", lora_r=4)
    own = variants(config)[-1]
    assert (own.config, own.lost) == (config, ())


def test_under_auto_adapters_keep_what_the_config_says_of_them() -> None:
    found = variants(load_config(model="m", use_dora=True, lora_r=8))
    assert names(found) == ["full", "dora", "qdora"]
    assert [one.config.lora_r for one in found] == [8, 8, 8]
    assert [one.lost for one in found] == [("use_dora",), (), ()], "what the user set, and full has no use for"
    assert names(variants(load_config(model="m", init_lora_weights="loftq", loftq_iter=5))) == ["full", "loftq"]
    assert [one.lost for one in variants(load_config(model="m", requantize=True))] == [
        ("requantize",), ("requantize",), ()
    ]  # fmt: skip


def test_named_methods_are_exactly_these() -> None:
    config = load_config(model="m", method="qdora", lora_r=8, learning_rate=1e-3)
    found = {one.name: one.config for one in variants(config, ("lora", "loftq", "galore", "full", "qdora"))}
    assert list(found) == ["lora", "loftq", "galore", "full", "qdora"]
    assert all(found[name].method_name == name for name in found)
    assert not found["lora"].use_dora
    assert not found["loftq"].use_dora
    assert {one.lora_r for one in found.values()} == {8}
    assert {one.learning_rate for one in found.values()} == {1e-3}
    eight = load_config(model="m", optim="adamw_8bit")
    assert [one.config.optim for one in variants(eight, ("full", "galore", "lora"))] == [
        "adamw_8bit", "galore_adamw", "adamw_8bit"
    ]  # fmt: skip
    many_steps = load_config(model="m", init_lora_weights="loftq", loftq_iter=5)
    assert [one.config.loftq_iter for one in variants(many_steps, ("qlora", "loftq"))] == [1, 5]


def test_what_was_left_open_stays_open() -> None:
    """A changed copy still knows what the user chose: the rule may only fill the rest."""
    config = load_config(model="m", learning_rate=1e-3)
    copy = config.replace(model="n").without(["learning_rate"], lora_alpha=8)
    assert [copy.given(name) for name in ("model", "lora_alpha", "learning_rate", "lora_r")] == [
        True,
        True,
        False,
        False,
    ]
    assert copy.learning_rate is None
    whole = type(config).model_validate(config.model_dump())
    assert [whole.given(name) for name in ("learning_rate", "lora_r")] == [True, False], "a run.yaml has every field"


def test_known_methods_and_their_spellings() -> None:
    assert known_methods(["full,lora", "LoRA+", "lora"]) == ("full", "lora", "loraplus")
    for words, message in (
        (["qlroa"], "--methods: 'qlroa' is not a method: did you mean qlora?"),
        (["xyz"], "known are full, galore, lora"),
        (["auto"], "'auto' is not a method"),
        ([""], "'' is not a method"),
    ):
        with pytest.raises(UsageError) as caught:
            known_methods(words)
        assert message in str(caught.value)
