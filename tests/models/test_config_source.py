"""Models of which only config.json is read: folders, files, the Hub; one line for what they cannot do."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from halfbyte.errors import UsageError
from halfbyte.models.config_source import ConfigOnly, open_config
from halfbyte.models.safetensors_source import FolderSource
from halfbyte.models.source import open_source
from halfbyte.models.spec import ModelSpec
from tests.evaluate.conftest import byte_tokenizer
from tests.models.families import config, make_model
from tests.models.gguf_files import write_gguf
from tests.models.hub_server import SHA, Hub, Repo, serve


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serve() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        yield made


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    return make_model(config("qwen2"))


@pytest.fixture(scope="module")
def files(model: transformers.PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository: weights, config, tokenizer and things beside."""
    folder = tmp_path_factory.mktemp("repo")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"# read me"}


def fetched(server: Hub) -> set[str]:
    return {line.rsplit("/", 1)[-1] for line in server.downloads()}


def only_config(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(files["config.json"])
    return folder


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_folder_or_file_without_weights_has_shapes(
    tmp_path: Path, files: dict[str, bytes], model: transformers.PreTrainedModel, name: str
) -> None:
    only_config(tmp_path, files)
    source = open_config(str(tmp_path / name))
    assert isinstance(source, ConfigOnly)
    assert source.kind == "config"
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if k in source.tensors()}
    assert {k: info.shape for k, info in source.tensors().items()} == expected
    assert len(expected) == len(list(ModelSpec.from_config(source.config).tensors()))
    assert source.prequantized_bytes() == {}


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_type_of_the_weights_is_what_the_config_states(tmp_path: Path, files: dict[str, bytes], key: str) -> None:
    plain = {k: v for k, v in json.loads(files["config.json"]).items() if k not in ("dtype", "torch_dtype")}
    path = tmp_path / "some.json"
    path.write_text(json.dumps(plain))
    assert {info.dtype for info in open_config(str(path)).tensors().values()} == {torch.bfloat16}
    path.write_text(json.dumps({**plain, key: "float32"}))
    assert {info.dtype for info in open_config(str(path)).tensors().values()} == {torch.float32}


def test_weights_are_still_needed_for_training(tmp_path: Path, files: dict[str, bytes]) -> None:
    only_config(tmp_path, files)
    source = open_config(str(tmp_path))
    for work in (lambda: source.read("model.norm.weight"), lambda: source.fingerprint):
        with pytest.raises(UsageError, match=r"only its config.json was opened"):
            work()
    with pytest.raises(UsageError, match=r"has a config\.json but no weights"):
        open_source(str(tmp_path))


def test_whole_models_are_opened_as_ever(tmp_path: Path, model: transformers.PreTrainedModel) -> None:
    model.save_pretrained(tmp_path / "whole")
    assert type(open_config(str(tmp_path / "whole"))) is FolderSource
    write_gguf(model, tmp_path / "m.gguf")
    assert open_config(str(tmp_path / "m.gguf")).kind == "gguf"


def test_the_hub_is_asked_for_the_config_and_nothing_else(server: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    server.repos["org/model"] = Repo(files, sizes={"model.safetensors": 10**15})
    source = open_config("org/model", cache=tmp_path)
    assert (source.kind, source.revision, type(source)) == ("hub", SHA, ConfigOnly)
    assert fetched(server) == {"config.json", "generation_config.json"} & set(files)
    assert ModelSpec.from_config(source.config).family == "qwen2"
    assert source.tokenizer().decode(source.tokenizer()("hello").input_ids) == "hello"
    assert "tokenizer.json" in fetched(server)
    assert "model.safetensors" not in fetched(server)


def test_what_is_in_the_cache_as_a_whole_is_read_by_its_headers(
    server: Hub, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.repos["org/model"] = Repo(files)
    open_source("org/model", cache=tmp_path)
    assert type(open_config("org/model", cache=tmp_path)) is FolderSource


def test_offline_a_config_is_enough_for_a_plan_and_not_for_training(
    server: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos["org/model"] = Repo(files)
    open_config("org/model", cache=tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert type(open_config("org/model", cache=tmp_path)) is ConfigOnly
    with pytest.raises(UsageError, match="org/model is not in the cache"):
        open_source("org/model", cache=tmp_path)
    with pytest.raises(UsageError, match="org/other is not in the cache"):
        open_config("org/other", cache=tmp_path)


def test_weights_that_could_not_be_trained_can_be_planned(server: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    server.repos["org/old"] = Repo({"config.json": files["config.json"], "pytorch_model.bin": b"a pickle"})
    assert open_config("org/old", cache=tmp_path).config["model_type"] == "qwen2"
    with pytest.raises(UsageError, match="only as pickles"):
        open_source("org/old", cache=tmp_path)


@pytest.mark.parametrize(
    ("repo", "said"),
    [
        (Repo({"adapter_config.json": b"{}"}), "is an adapter"),
        (Repo({"m.gguf": b"GGUF"}), "org/m/m.gguf"),
        (Repo({"config.json": b"{}"}, refuse=(403, "GatedRepo")), "is gated"),
        (Repo({"config.json": b"{"}), "config.json, line 1: not JSON"),
        (Repo({"config.json": b"{}"}), "has no model_type"),
        (Repo({"config.json": b"[]"}), "should hold a JSON object"),
    ],
)
def test_what_is_wrong_on_the_hub_is_one_line(server: Hub, tmp_path: Path, repo: Repo, said: str) -> None:
    server.repos["org/m"] = repo
    with pytest.raises(UsageError, match=said) as caught:
        open_config("org/m", cache=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "line 1: not JSON"), ("[]", "should hold a JSON object"), ("{}", "has no model_type")]
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    for name in (path, tmp_path):
        with pytest.raises(UsageError, match=said):
            open_config(str(name))


def test_a_revision_is_for_the_hub(tmp_path: Path, files: dict[str, bytes]) -> None:
    only_config(tmp_path, files)
    with pytest.raises(UsageError, match="revision 'v1' is for Hub models"):
        open_config(str(tmp_path / "config.json"), revision="v1")
    with pytest.raises(UsageError, match="does not exist"):
        open_config(str(tmp_path / "none"))
