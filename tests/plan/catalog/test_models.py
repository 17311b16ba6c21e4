"""The catalogue's models: the published number of parameters follows from each entry's shapes, exactly."""

import pytest

from halfbyte.errors import UsageError
from halfbyte.models.foreign_spec import ForeignSpec
from halfbyte.models.spec import ModelSpec
from halfbyte.plan.catalog import find_model, models
from halfbyte.plan.catalog.models import find

ASKED = """
    llama-3.1-8b llama-3.1-70b llama-3.2-1b llama-3.2-3b llama-7b llama-13b llama-30b llama-65b llama-2-7b
    llama-2-13b llama-2-70b mistral-7b-v0.1 codellama-7b codellama-13b codellama-34b phi-3-mini phi-3-medium
    gemma-2-2b gemma-2-9b gemma-2-27b gemma-3-270m gemma-3-1b qwen2.5-0.5b qwen2.5-72b t5-v1.1-xl
"""


@pytest.mark.parametrize("name", list(models()))
def test_the_published_parameters_follow_from_the_shapes(name: str) -> None:
    entry = models()[name]
    kind = ModelSpec if ModelSpec.serves(entry.config) else ForeignSpec
    assert kind.from_config(entry.config).total_parameters == entry.parameters


def test_some_published_numbers() -> None:
    """As the Hub counts the files' tensors."""
    counts = {name: entry.parameters for name, entry in models().items()}
    assert counts["llama-3.1-8b"] == 8_030_261_248
    assert counts["llama-3.1-70b"] == 70_553_706_496
    assert counts["mistral-7b-v0.1"] == 7_241_732_096
    assert counts["gpt2"] == 124_439_808
    assert counts["t5-v1.1-xl"] == 2_849_757_184


def test_the_families_that_people_start_from_are_there() -> None:
    assert set(ASKED.split()) <= set(models())


@pytest.mark.parametrize("name", ["llama-3.1-8b", "Llama 3.1 8B", "LLAMA_3.1_8B", "meta-llama/Llama-3.1-8B"])
def test_a_name_may_be_spelled_in_many_ways(name: str) -> None:
    found = find(name)
    assert found is not None
    assert found.name == "llama-3.1-8b"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'lama-3-8b' is not a model .*llama-3.1-8b") as caught:
        find_model("lama-3-8b")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="known are codellama-13b"):
        find_model("xyzzy")


def test_who_changes_a_config_changes_their_own() -> None:
    find_model("gpt2")["n_layer"] = 1
    assert find_model("gpt2")["n_layer"] == 12
