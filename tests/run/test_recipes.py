"""The config-only rung: every recipe is a valid config, and trains a tiny model of its family as it stands."""

from pathlib import Path

import pytest
import torch

from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.run import run
from tests.evaluate.conftest import VOCAB, byte_tokenizer
from tests.models import families

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TINY = {"llama": "llama3-gqa", "mistral": "mistral-sliding", "phi3": "phi3", "gemma": "gemma3-small", "qwen": "qwen3"}


def test_there_is_one_a_family() -> None:
    assert {recipe.stem for recipe in RECIPES} == set(TINY)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_trains_its_family(recipe: Path, data_file: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    assert config.method == "qlora"
    assert "/" in config.model
    assert f"halfbyte train recipes/{recipe.name}" in recipe.read_text()
    folder = tmp_path / "model"
    tiny = families.config(TINY[recipe.stem])
    tiny.vocab_size = VOCAB
    families.make_model(tiny).to(torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    done = run(config.replace(model=str(folder), data=str(data_file), output_dir=tmp_path / "run", max_steps=2))
    assert done.result["step"] == 2
    assert done.config.learning_rate == config.learning_rate


def test_recipes_say_only_what_differs_from_the_defaults() -> None:
    for recipe in RECIPES:
        config = load_config(recipe)
        said = {name for name in RunConfig.model_fields if f"\n{name}:" in "\n" + recipe.read_text()}
        assert {"model", "data", "method", "learning_rate"} <= said
        fields = RunConfig.model_fields.items()
        defaults = {name: field.get_default(call_default_factory=True) for name, field in fields}
        assert {name for name, default in defaults.items() if getattr(config, name) != default} <= said
