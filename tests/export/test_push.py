"""Uploads through huggingface_hub's own client to a local server that speaks the Hub's upload endpoints."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from safetensors.torch import load

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.push import PushOptions, push
from halfbyte.export.uploads import Origin, collect
from tests.evaluate.conftest import byte_tokenizer
from tests.export.conftest import Trained
from tests.export.upload_hub import TOKEN, Hub, Repo, serve
from tests.models.families import config, make_model
from tests.models.gguf_files import write_gguf

# huggingface_hub's own, for every file that goes through LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    # LFS, which the stand-in speaks, instead of Xet; no token of the machine's user.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with serve() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.endpoint)
        yield made


@pytest.fixture
def adapter(llama: Trained, tmp_path: Path) -> Path:
    """An adapter's folder with everything that a run leaves beside it."""
    folder = tmp_path / "run"
    folder.mkdir()
    for path in llama.adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    byte_tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("events.jsonl", "result.json", "plan.json", "run.lock", ".run.yaml.x.partial", "notes.txt"):
        (folder / name).write_text('{"path": "/home/me/secret"}')
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "trainable.safetensors").write_bytes(b"x")
    return folder


def front_of(card: bytes) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card.decode(), re.DOTALL)
    assert match is not None
    front: dict[str, Any] = yaml.safe_load(match[1])
    return front


def test_an_adapter_arrives_whole_private_and_alone(server: Hub, adapter: Path) -> None:
    done = push(collect(adapter, Origin("google/gemma-3-270m")), "me/mine")
    repo = server.repos["me/mine"]
    assert repo.private
    assert done.private
    assert set(repo.files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    for name in set(repo.files) - {"README.md", "adapter_config.json"}:
        assert repo.files[name] == (adapter / name).read_bytes(), name
    assert load(repo.files["adapter_model.safetensors"])
    config_there = json.loads(repo.files["adapter_config.json"])
    config_here = json.loads((adapter / "adapter_config.json").read_text())
    assert config_there == config_here | {"base_model_name_or_path": "google/gemma-3-270m"}
    front = front_of(repo.files["README.md"])
    assert (front["base_model"], front["library_name"]) == ("google/gemma-3-270m", "peft")
    assert front["base_model_relation"] == "adapter"
    assert [commit["summary"] for commit in repo.commits] == ["Upload from halfbyte"]
    assert done.url == f"{server.endpoint}/me/mine"
    assert done.to_json()["files"] == [{"name": u.name, "bytes": len(repo.files[u.name])} for u in done.model.uploads]


def test_public_revision_and_message(server: Hub, adapter: Path) -> None:
    model = collect(adapter, Origin("o/base"))
    push(model, "me/mine", PushOptions(public=True, revision="second", message="the second week"))
    repo = server.repos["me/mine"]
    assert not repo.private
    assert repo.files == {}
    assert "adapter_model.safetensors" in repo.branches["second"]
    assert repo.commits[-1]["summary"] == "the second week"


def test_nothing_is_sent_in_a_dry_run(server: Hub, adapter: Path) -> None:
    done = push(collect(adapter), "me/mine", PushOptions(dry_run=True))
    assert done.commit is None
    assert server.requests == []


def test_the_cards_own_entries_stay_and_paths_go(server: Hub, adapter: Path) -> None:
    (adapter / "README.md").write_text(
        "---\nlicense: gemma\nlanguage: de\nbase_model: /home/me/models/gemma\ntags: [mine]\n---\n\n# Mails\n\n"
        "Base: `/home/me/models/gemma` and ~/runs/x and file:///srv/data/rows.jsonl, see https://e.org/a/b/c.\n"
        'from_pretrained("/home/me/models", gguf_file="g.gguf"); 10 tokens/s, and/or, ./here/there, C:\\x\\y.txt\n'
        "at /odd place/with spaces/model.gguf\n"
    )
    here = {
        "/home/me/models/gemma": "gemma",
        '"/home/me/models", gguf_file=': '"path/to/its/folder", gguf_file=',
        "/odd place/with spaces/model.gguf": "model.gguf",
    }
    push(collect(adapter, Origin(None, here)), "me/mine")
    card = server.repos["me/mine"].files["README.md"]
    assert front_of(card) == {
        "license": "gemma", "language": "de", "tags": ["mine"], "library_name": "peft",
        "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert card.decode().split("---\n")[2] == (
        "\n# Mails\n\nBase: `gemma` and x and rows.jsonl, see https://e.org/a/b/c.\n"
        'from_pretrained("path/to/its/folder", gguf_file="g.gguf"); 10 tokens/s, and/or, ./here/there, y.txt\n'
        "at model.gguf\n"
    )
    named = json.loads(server.repos["me/mine"].files["adapter_config.json"])["base_model_name_or_path"]
    assert named == Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]).name
    assert "/home/me/models/gemma" in (adapter / "README.md").read_text(), "the file on the disk is not changed"


def test_no_file_names_a_path_of_this_machine(server: Hub, adapter: Path, tmp_path: Path) -> None:
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings | {"name_or_path": str(tmp_path / "base")}))
    (adapter / "parity.json").write_text(json.dumps({"passed": True, "files": [str(tmp_path / "x.gguf")]}))
    push(collect(adapter), "me/mine")
    for name, content in server.repos["me/mine"].files.items():
        assert str(tmp_path).encode() not in content, name
        assert b"/home/" not in content, name
    assert json.loads(server.repos["me/mine"].files["parity.json"]) == {"passed": True, "files": ["x.gguf"]}


def test_a_models_folder_with_shards(server: Hub, llama: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    llama.reference.save_pretrained(folder, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "training_args.bin").write_bytes(b"a pickle")
    push(collect(folder), "me/model")
    files = server.repos["me/model"].files
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert shards | {"model.safetensors.index.json", "config.json", "README.md"} <= set(files)
    assert not [name for name in files if name.endswith(".bin")]
    assert all(files[name] == (folder / name).read_bytes() for name in shards)
    assert front_of(files["README.md"])["library_name"] == "transformers"


def test_gguf_files_lie_beside_each_other(server: Hub, tmp_path: Path) -> None:
    model = make_model(config("qwen2"))
    folder = tmp_path / "gguf"
    folder.mkdir()
    write_gguf(model, folder / "model-F32.gguf")
    (folder / "Modelfile").write_text(f"FROM {folder}/model-F32.gguf\nADAPTER ./a.gguf\nPARAMETER stop x\n")
    (folder / "parity.json").write_text("{}")
    push(collect(folder), "me/gguf")
    files = server.repos["me/gguf"].files
    assert files["Modelfile"] == b"FROM ./model-F32.gguf\nADAPTER ./a.gguf\nPARAMETER stop x\n"
    assert files["model-F32.gguf"] == (folder / "model-F32.gguf").read_bytes()
    (folder / "model-F32.gguf").rename(tmp_path / "model-again.gguf")
    push(collect(tmp_path / "model-again.gguf"), "me/gguf")
    assert {"model-F32.gguf", "model-again.gguf"} <= set(server.repos["me/gguf"].files)
    write_gguf(make_model(config("qwen2"), seed=5), tmp_path / "model-again.gguf")
    with pytest.raises(UsageError, match=r"holds another model \(model-again\.gguf"):
        push(collect(tmp_path / "model-again.gguf"), "me/gguf")


def changed(adapter: Path) -> None:
    """Other values in the adapter's file."""
    path = adapter / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_the_same_model_again_is_not_sent_again_and_another_is_refused(server: Hub, adapter: Path) -> None:
    push(collect(adapter), "me/mine")
    sent, commits = server.bytes_put, len(server.repos["me/mine"].commits)
    push(collect(adapter), "me/mine")
    assert (server.bytes_put, len(server.repos["me/mine"].commits)) == (sent, commits)
    (adapter / "README.md").write_text("# A better card\n")
    push(collect(adapter), "me/mine")
    assert b"A better card" in server.repos["me/mine"].files["README.md"]
    assert server.bytes_put == sent
    changed(adapter)
    before = dict(server.repos["me/mine"].files)
    with pytest.raises(UsageError, match=r"me/mine holds another model \(adapter_model\.safetensors is not") as caught:
        push(collect(adapter), "me/mine")
    assert "--overwrite" in str(caught.value)
    assert server.repos["me/mine"].files == before
    push(collect(adapter), "me/mine", PushOptions(overwrite=True))
    sent_now = server.repos["me/mine"].files["adapter_model.safetensors"]
    assert sent_now == (adapter / "adapter_model.safetensors").read_bytes()


def test_overwriting_leaves_one_model(server: Hub, adapter: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2", "config.json": b"{}",
           "model.safetensors.index.json": b"{}", "README.md": b"# old", "p.png": b"p", "x.gguf": b"g"}  # fmt: skip
    server.repos["me/mine"] = Repo(private=True, branches={"main": dict(old)})
    with pytest.raises(UsageError, match="holds another model"):
        push(collect(adapter), "me/mine")
    push(collect(adapter), "me/mine", PushOptions(revision="adapter"))
    assert server.repos["me/mine"].files == old, "a new branch takes nothing away"
    done = push(collect(adapter), "me/mine", PushOptions(overwrite=True))
    assert any("model-00002-of-00002.safetensors" in note for note in done.notes)
    for branch in ("adapter", "main"):
        left = set(server.repos["me/mine"].branches[branch]) & set(old)
        assert left == {"README.md", "p.png", "x.gguf"}, branch


def test_a_repository_without_a_model_is_filled(server: Hub, adapter: Path) -> None:
    server.repos["me/mine"] = Repo(private=True, branches={"main": {".gitattributes": b"*", "README.md": b"# soon"}})
    push(collect(adapter), "me/mine")
    assert set(server.repos["me/mine"].files) > {".gitattributes", "adapter_config.json"}


def test_nothing_becomes_public_by_surprise(server: Hub, adapter: Path) -> None:
    server.repos["me/open"] = Repo(private=False)
    server.repos["me/closed"] = Repo(private=True)
    with pytest.raises(UsageError, match="everyone can see it: say --public"):
        push(collect(adapter), "me/open")
    assert server.repos["me/open"].files == {}
    assert not push(collect(adapter), "me/open", PushOptions(public=True)).private
    done = push(collect(adapter), "me/closed", PushOptions(public=True))
    assert done.private
    assert any("stays private" in note for note in done.notes)


def refused(adapter: Path, kind: type[HalfbyteError], match: str) -> str:
    with pytest.raises(kind, match=match) as caught:
        push(collect(adapter, Origin("o/base")), "me/mine")
    assert "\n" not in str(caught.value)
    assert type(caught.value) is kind
    return str(caught.value)


def test_no_token_a_wrong_one_and_one_that_may_not_write(
    server: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.may_write = False
    refused(adapter, UsageError, "the token may not write to me/mine: take one with write permission")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(adapter, UsageError, "does not accept the token: log in again with `hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    refused(adapter, UsageError, "not logged in to the Hub: `hf auth login`")
    assert server.repos == {}


def test_a_card_that_the_hub_refuses(server: Hub, adapter: Path) -> None:
    with pytest.raises(UsageError, match=r'the Hub refuses the card: .*"base_model" with value "a/b/c" is not valid'):
        push(collect(adapter, Origin("a/b/c")), "me/mine")
    assert server.repos["me/mine"].files == {}


def test_a_connection_that_dies_midway_is_continued(server: Hub, adapter: Path) -> None:
    # The client itself repeats the storage's part; a commit that broke is for the user to repeat.
    server.fail["PUT /storage/"] = ["die"]
    server.fail["POST /api/models/me/mine/commit"] = ["die"]
    message = refused(adapter, HalfbyteError, "uploading to me/mine failed: ")
    assert "run the same command again" in message
    assert server.repos["me/mine"].files == {}, "one commit: nothing of a model that is not whole"
    put = server.count("PUT /storage/")
    done = push(collect(adapter, Origin("o/base")), "me/mine")
    assert done.commit is not None
    assert server.count("PUT /storage/") == put, "what had arrived is not sent again"
    weights = server.repos["me/mine"].files["adapter_model.safetensors"]
    assert weights == (adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "request_line",
    ["GET /api/whoami-v2", "GET /api/models/me/mine", "POST /api/repos/create", "POST /api/models/me/mine/commit"],
)
def test_a_server_error_is_one_line(server: Hub, adapter: Path, request_line: str) -> None:
    server.fail[request_line] = [503]
    message = refused(adapter, HalfbyteError, "uploading to me/mine failed: ")
    assert "told to fail" in message or "503" in message
    assert push(collect(adapter), "me/mine").commit is not None


def test_a_storage_that_is_down_for_a_moment(server: Hub, adapter: Path) -> None:
    server.fail["PUT /storage/"] = [503]
    assert push(collect(adapter), "me/mine").commit is not None


def test_a_hub_that_is_not_there(server: Hub, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(adapter, HalfbyteError, "uploading to me/mine failed: .*; run the same command again")


def test_what_is_no_whole_model_is_found_before_anything_is_sent(server: Hub, adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(UsageError, match="is not a whole adapter"):
        collect(adapter)
    weights.unlink()
    with pytest.raises(UsageError, match="is not a whole adapter"):
        collect(adapter)
    weights.write_bytes(whole)
    (adapter / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(UsageError, match="front matter is not YAML"):
        collect(adapter)
    (adapter / "README.md").write_text("---\n- a\n---\n")
    with pytest.raises(UsageError, match="front matter is not a mapping"):
        collect(adapter)
    (adapter / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        collect(adapter)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no finished model"):
        collect(tmp_path / "empty")
    with pytest.raises(UsageError, match=r"neither a folder nor a \.gguf file"):
        collect(tmp_path / "nowhere")
    (tmp_path / "half.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="cut off"):
        collect(tmp_path / "half.gguf")
    assert server.requests == []


@pytest.mark.parametrize(
    "name", ["mine", "a/b/c", "me/..", "me/a--b", "me/-x", "me/a b", "me/x.git", "me/" + "x" * 130]
)
def test_names_that_are_no_repositories(adapter: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a repository's name"):
        push(collect(adapter), name, PushOptions(dry_run=True))
