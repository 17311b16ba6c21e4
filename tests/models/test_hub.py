"""The Hub through a local server: what is fetched, what is refused, and one line for everything that goes wrong."""

import errno
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers

from halfbyte.errors import DoesNotFit, HalfbyteError, UsageError
from halfbyte.models import hub
from halfbyte.models.source import open_source
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
    """A sharded repository with what real ones carry beside the model."""
    folder = tmp_path_factory.mktemp("repo")
    model.save_pretrained(folder, max_shard_size="100KB")
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    return wanted | {
        "tokenizer_config.json": b"{}",
        "README.md": b"# read me",
        "preprocessor_config.json": b"{}",
        "pytorch_model.bin": b"a pickle",
        "modeling_qwen.py": b"import os",
        "consolidated.safetensors": b"the same again",
        "onnx/model.onnx": b"another format",
        "original/params.json": b"{}",
    }


def test_a_model_is_fetched_and_read(
    server: Hub, files: dict[str, bytes], model: transformers.PreTrainedModel, tmp_path: Path
) -> None:
    server.repos["org/model"] = Repo(files)
    source = open_source("org/model", cache=tmp_path)
    assert (source.kind, source.revision, source.name) == ("hub", SHA, "org/model")
    for name, expected in model.state_dict().items():
        assert torch.equal(source.read(name), expected)
    fetched = {line.rsplit("/", 1)[-1] for line in server.downloads()}
    assert fetched == {n for n in files if n.startswith(("model-", "model.", "config", "generation", "tokenizer"))}


def test_what_is_there_is_not_fetched_again(server: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    server.repos["org/model"] = Repo(files)
    first = open_source("org/model", cache=tmp_path)
    server.requests.clear()
    again = open_source("org/model", revision="v1", cache=tmp_path)
    assert again.fingerprint == first.fingerprint
    assert server.downloads() == []


def test_offline_uses_the_cache(
    server: Hub,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.repos["org/model"] = Repo(files)
    first = open_source("org/model", cache=tmp_path)
    server.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING):
        again = open_source("org/model", cache=tmp_path)
    assert (again.fingerprint, again.revision) == (first.fingerprint, SHA)
    assert open_source("org/model", revision=SHA, cache=tmp_path).revision == SHA
    assert server.requests == []
    assert "using the copy in the cache, since HF_HUB_OFFLINE is set" in caplog.text


def test_offline_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fails("org/model", "org/model is not in the cache .* and HF_HUB_OFFLINE is set: connect once", tmp_path)
    with pytest.raises(UsageError, match="org/model at revision v7 is not in the cache"):
        open_source("org/model", revision="v7", cache=tmp_path)


def test_a_partial_copy_is_not_a_copy(
    server: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos["org/model"] = Repo(files)
    source = open_source("org/model", cache=tmp_path)
    sorted(source.path.glob("model-*.safetensors"))[1].unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"not in the cache|is missing"):
        open_source("org/model", cache=tmp_path)


def unreachable() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_no_connection(
    server: Hub,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.repos["org/model"] = Repo(files)
    open_source("org/model", cache=tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", unreachable())
    with caplog.at_level(logging.WARNING):
        assert open_source("org/model", cache=tmp_path).revision == SHA
    assert "the Hub cannot be reached" in caplog.text
    fails("org/other", "org/other is not in the cache .* and the Hub cannot be reached", tmp_path)


def fails(model: str, message: str, cache: Path, kind: type[HalfbyteError] = UsageError) -> None:
    with pytest.raises(kind, match=message) as caught:
        open_source(model, cache=cache)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is kind


def test_refusals(server: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    server.repos["org/gated"] = Repo(files, refuse=(403, "GatedRepo"))
    fails("org/gated", r"org/gated is gated on the Hub: accept its conditions at .*org/gated.*hf auth login", tmp_path)
    fails("org/missing", "org/missing is neither a folder here nor a model on the Hub that you may see", tmp_path)
    server.repos["org/model"] = Repo(files)
    with pytest.raises(UsageError, match="org/model has no revision 'v9' on the Hub"):
        open_source("org/model", revision="v9", cache=tmp_path)
    server.repos["org/down"] = Repo(files, refuse=(503, ""))
    fails("org/down", "org/down is not in the cache .* and the Hub answers 503", tmp_path)


def test_pickles_are_refused_before_a_byte_is_fetched(server: Hub, tmp_path: Path) -> None:
    server.repos["org/old"] = Repo({"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    fails(
        "org/old", r"org/old on the Hub has its weights only as pickles \(pytorch_model\.bin\).*never loaded", tmp_path
    )
    assert server.downloads() == []


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "is an adapter: give its base as model"),
        (["README.md"], "has no weights in safetensors"),
        (["model.safetensors"], "has no config.json"),
        (["a-Q4_K_M.gguf", "README.md"], "holds GGUF files: name one, for example org/x/a-Q4_K_M.gguf"),
    ],
)
def test_repositories_without_a_model(names: list[str], message: str, server: Hub, tmp_path: Path) -> None:
    server.repos["org/x"] = Repo(dict.fromkeys(names, b"{}"))
    fails("org/x", message, tmp_path)


def test_a_gguf_file_in_a_repository(server: Hub, model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    write_gguf(model, tmp_path / "m.gguf")
    server.repos["org/x"] = Repo({"m.gguf": (tmp_path / "m.gguf").read_bytes(), "other.gguf": b"GGUF"})
    source = open_source("org/x/m.gguf", cache=tmp_path / "cache")
    assert (source.kind, source.revision) == ("gguf", SHA)
    assert torch.equal(source.read("lm_head.weight"), model.state_dict()["lm_head.weight"])
    assert [line.rsplit("/", 1)[-1] for line in server.downloads()] == ["m.gguf"]
    fails("org/x/none.gguf", r"org/x has no file none\.gguf on the Hub: name one, for example", tmp_path / "cache")


def test_a_disk_that_is_too_small(server: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    shard = next(name for name in files if name.startswith("model-"))
    server.repos["org/large"] = Repo(files, sizes={shard: 1 << 60})
    fails("org/large", r"downloading org/large needs 11529215.* GB on the disk", tmp_path, DoesNotFit)
    assert server.downloads() == []


def test_a_disk_that_fills_up(
    server: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is really full takes a mount of one's own; the error is put where the write would fail."""
    server.repos["org/model"] = Repo(files)

    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", full)
    fails("org/model", "downloading org/model: the disk of .* is full; free some space", tmp_path, DoesNotFit)


def test_a_connection_that_breaks(
    server: Hub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub waits between its retries
    shard = next(name for name in files if name.startswith("model-"))
    server.repos["org/model"] = Repo(files, cut=shard)
    fails("org/model", "downloading org/model failed: .*; run again", tmp_path, HalfbyteError)
    server.repos["org/model"].cut = None
    assert open_source("org/model", cache=tmp_path).revision == SHA


@pytest.mark.parametrize("name", ["gpt2", "org/name", "org/na.me-1_x", "org/name/file.gguf", "org/name/sub/a b.gguf"])
def test_hub_ids(name: str) -> None:
    assert hub.is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["", "./x", "/abs/path", "~/x", "a/b/c", "../x", "org/../x", "a b", "org/name/file.bin"]
)
def test_not_hub_ids(name: str) -> None:
    assert not hub.is_hub_id(name)
