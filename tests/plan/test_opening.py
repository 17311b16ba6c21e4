"""What `halfbyte plan -m` opens: paths first, names of the catalogue, the Hub, and the nearest names for the rest."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from halfbyte.errors import UsageError
from halfbyte.models.config_source import ConfigOnly
from halfbyte.plan.catalog import models
from halfbyte.plan.opening import open_for_plan
from tests.evaluate.conftest import byte_tokenizer
from tests.models.hub_server import Hub, Repo, serve


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        yield made


@pytest.mark.parametrize("name", ["llama-3.1-8b", "Llama-3.1-8B", "gpt2", "t5-v1.1-xl"])
def test_a_name_of_the_catalogue_needs_no_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    source = open_for_plan(name)
    assert isinstance(source, ConfigOnly)
    assert source.kind == "catalogue"
    assert source.config == models()[name.lower()].config


def test_a_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    Path("gpt2/config.json").write_text('{"model_type": "gpt2", "n_layer": 3}')
    assert open_for_plan("gpt2").config["n_layer"] == 3


def test_the_hub_has_precedence_over_a_catalogues_entry(server: Hub, tmp_path: Path) -> None:
    server.repos["openai-community/gpt2"] = Repo({"config.json": b'{"model_type": "gpt2", "n_layer": 5}'})
    assert open_for_plan("openai-community/gpt2", cache=tmp_path).config["n_layer"] == 5


def test_a_gated_model_is_planned_with_the_catalogues_shapes(
    server: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.repos["meta-llama/Llama-3.1-8B"] = Repo({}, refuse=(403, "GatedRepo"))
    with caplog.at_level(logging.WARNING):
        source = open_for_plan("meta-llama/Llama-3.1-8B", cache=tmp_path)
    assert source.config == models()["llama-3.1-8b"].config
    assert "catalogue's shapes" in caplog.text
    assert "gated" in caplog.text
    with pytest.raises(UsageError, match="is gated"):
        source.tokenizer()
    with pytest.raises(UsageError, match="is gated"):
        open_for_plan("meta-llama/Llama-3.1-8B", revision="main", cache=tmp_path)


def test_the_tokenizer_of_an_entry_comes_from_the_hub(server: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"config.json": b"{}"}
    server.repos["Qwen/Qwen2.5-7B"] = Repo(files | {"model.safetensors": b"no"})
    tokenizer = open_for_plan("qwen2.5-7b", cache=tmp_path / "cache").tokenizer()
    assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"
    assert not any("safetensors" in line for line in server.downloads())


def test_an_unknown_name_is_answered_with_the_nearest(server: Hub, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean llama-3.1-8b") as caught:
        open_for_plan("lama-3.1-8b", cache=tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="check the spelling") as caught:
        open_for_plan("org/nothing", cache=tmp_path)
    assert "catalogue" not in str(caught.value)
    with pytest.raises(UsageError, match="does not exist"):
        open_for_plan("./nothing", cache=tmp_path)
