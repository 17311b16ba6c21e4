"""Models in Ollama's store, on a store on disk with a tiny GGUF; every way in which a manifest can be wrong."""

import json
import os
from pathlib import Path

import gguf
import pytest
import torch

from halfbyte.errors import UsageError
from halfbyte.models import ollama
from halfbyte.models.gguf_source import GgufSource
from halfbyte.models.ollama import OllamaSource, parse_name
from halfbyte.models.source import open_source
from tests.models import families
from tests.models.gguf_files import write_gguf
from tests.models.ollama_store import LAYER, add_model, layer, write_manifest

LIBRARY = "registry.ollama.ai/library"
PARAMETERS = json.dumps({"stop": ["<|a|>", "<|b|>"], "temperature": 0.5}).encode()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(families.make_model(families.config("qwen2-tied")), path)
    return path


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    (tmp_path / "models" / "manifests").mkdir(parents=True)
    return tmp_path / "models"


def fails(name: str, message: str) -> str:
    with pytest.raises(UsageError, match=message) as caught:
        open_source(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_models_file_is_a_gguf_source_under_its_own_name(store: Path, tiny: Path) -> None:
    add_model(
        store, f"{LIBRARY}/tiny/1b",
        [("model", tiny.read_bytes()), ("template", b"{{ .Prompt }}"), ("params", PARAMETERS),
         ("system", "Be brief…".encode()), ("license", b"MIT")],
    )  # fmt: skip
    source = open_source("ollama:tiny:1b")
    assert isinstance(source, OllamaSource)
    assert (source.name, source.kind, source.revision) == ("ollama:tiny:1b", "gguf", None)
    assert source.path.parent == store / "blobs"
    of_file = GgufSource("tiny", tiny)
    assert source.fingerprint == of_file.fingerprint
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(source.read(name), of_file.read(name))
    assert source.ollama.name == "tiny:1b"
    assert source.ollama.template == "{{ .Prompt }}"
    assert source.ollama.system == "Be brief…"
    assert source.ollama.stop == ("<|a|>", "<|b|>")
    assert source.ollama.parameters["temperature"] == 0.5


@pytest.mark.parametrize(
    ("manifest", "name", "shown"),
    [
        (f"{LIBRARY}/tiny/latest", "tiny", "tiny:latest"),
        (f"{LIBRARY}/tiny/q4_K_M", "tiny:q4_K_M", "tiny:q4_K_M"),
        ("registry.ollama.ai/someone/tiny/latest", "someone/tiny", "someone/tiny:latest"),
        ("hf.co/someone/tiny-GGUF/Q4_K_M", "hf.co/someone/tiny-GGUF:Q4_K_M", "hf.co/someone/tiny-GGUF:Q4_K_M"),
        ("localhost:5000/library/tiny/latest", "localhost:5000/library/tiny", "localhost:5000/library/tiny:latest"),
    ],
)
def test_names_are_ollamas(store: Path, tiny: Path, manifest: str, name: str, shown: str) -> None:
    add_model(store, manifest, [("model", tiny.read_bytes())])
    source = open_source(f"ollama:{name}")
    assert source.name == f"ollama:{shown}"
    assert isinstance(source, OllamaSource)
    assert (source.ollama.template, source.ollama.system, source.ollama.stop) == (None, None, ())
    assert str(parse_name(shown)) == shown


@pytest.mark.parametrize("name", ["", "a/b/c/d", "../secret", "a:../b", "a b", "/x", "x:", "user/../x", "ä", "a" * 81])
def test_what_is_no_name_is_refused(store: Path, name: str) -> None:
    fails(f"ollama:{name}", "is no name of Ollama's")


def test_a_revision_is_for_the_hub(store: Path) -> None:
    with pytest.raises(UsageError, match="has its tag in the name"):
        open_source("ollama:tiny", revision="main")


def test_an_unknown_model_lists_near_ones(store: Path, tiny: Path) -> None:
    fails("ollama:tiny", "is empty; `ollama pull tiny:latest` brings it")
    for name in ("qwen2.5/0.5b", "qwen2.5/7b", "gemma3/270m"):
        add_model(store, f"{LIBRARY}/{name}", [("model", b"GGUF")])
    assert "it has qwen2.5:0.5b, qwen2.5:7b;" in fails("ollama:qwen2.5", "Ollama has no model qwen2.5:latest")
    assert "it has gemma3:270m;" in fails("ollama:gema3:270m", "Ollama has no model")
    assert "gemma3:270m, qwen2.5:0.5b, qwen2.5:7b" in fails("ollama:zzzzzzzzzzzzzzz", "Ollama has no model")


def test_without_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama, "_SYSTEM_STORE", tmp_path / "system")
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fails("ollama:tiny", "there is no store of Ollama's models in .*home.* or .*system.*set OLLAMA_MODELS")
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "asked"))
    assert "system" not in fails("ollama:tiny", "there is no store of Ollama's models in .*asked")


def test_the_users_store_comes_before_the_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setattr(ollama, "_SYSTEM_STORE", tmp_path / "system")
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    add_model(tmp_path / "system", f"{LIBRARY}/tiny/latest", [("model", tiny.read_bytes())])
    assert open_source("ollama:tiny").path.is_relative_to(tmp_path / "system")
    add_model(tmp_path / ".ollama/models", f"{LIBRARY}/other/latest", [("model", tiny.read_bytes())])
    assert open_source("ollama:tiny").path.is_relative_to(tmp_path / "system")
    add_model(tmp_path / ".ollama/models", f"{LIBRARY}/tiny/latest", [("model", tiny.read_bytes())])
    assert open_source("ollama:tiny").path.is_relative_to(tmp_path / ".ollama")


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (("model", "projector"), r"is multimodal \(it has a projector\)"),
        (("model", "adapter"), "has an adapter of its own"),
        (("model", "model"), "is split over 2 files"),
        (("tensor", "tensor"), "has no GGUF file"),
        ((), "has no GGUF file"),
    ],
)
def test_what_is_not_one_text_model_is_refused(store: Path, kinds: tuple[str, ...], message: str) -> None:
    add_model(store, f"{LIBRARY}/odd/latest", [(kind, kind.encode() + bytes([i])) for i, kind in enumerate(kinds)])
    fails("ollama:odd", message)


def test_towers_and_splits_inside_the_file_are_refused(store: Path, tmp_path: Path) -> None:
    for key, message in (("llama.vision.block_count", "is multimodal"), ("split.count", "one part of a split model")):
        path = tmp_path / "odd.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint32(key, 2)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        add_model(store, f"{LIBRARY}/odd/latest", [("model", path.read_bytes())])
        fails("ollama:odd", message)


def test_damaged_manifests_are_one_line(store: Path, tiny: Path) -> None:
    good = layer(store, "model", tiny.read_bytes())
    for text in ("", "{", "[]", "{}", '{"layers": 1}', '{"layers": [1]}', '{"layers": [{}]}', "[" * 100_000, "\udcff"):
        path = write_manifest(store, f"{LIBRARY}/bad/latest", {})
        path.write_bytes(text.encode(errors="surrogateescape"))
        fails("ollama:bad", "Ollama's manifest of bad:latest, is damaged")
    write_manifest(store, f"{LIBRARY}/bad/latest", {"layers": [good], "more": "x" * (1 << 20)})
    fails("ollama:bad", "it is larger than")
    for digest in ("sha256:../../../etc/passwd", "sha256:abc", "md5:" + "0" * 64, "sha256:" + "g" * 64):
        write_manifest(store, f"{LIBRARY}/bad/latest", {"layers": [good | {"digest": digest}]})
        fails("ollama:bad", "is not a sha256 digest")
    write_manifest(store, f"{LIBRARY}/bad/latest", {"layers": [good | {"size": good["size"] + 1}]})
    fails("ollama:bad", "and Ollama's manifest of bad:latest says")
    write_manifest(store, f"{LIBRARY}/bad/latest", {"layers": [good | {"digest": "sha256:" + "0" * 64}]})
    fails("ollama:bad", "is missing, which Ollama's bad:latest needs")


def test_damaged_texts_beside_the_model_are_one_line(store: Path, tiny: Path) -> None:
    model = ("model", tiny.read_bytes())
    for kind, data, message in (
        ("params", b"[1]", "are no JSON object"),
        ("params", b"{", "are no JSON object"),
        ("system", b"\xff\xfe", "cannot be read"),
        ("template", b"x" * ((1 << 20) + 1), "is larger than"),
    ):
        add_model(store, f"{LIBRARY}/bad/latest", [model, (kind, data)])
        fails("ollama:bad", message)


def test_a_stop_parameter_may_be_one_text(store: Path, tiny: Path) -> None:
    add_model(store, f"{LIBRARY}/tiny/latest", [("model", tiny.read_bytes()), ("params", b'{"stop": "x"}')])
    source = open_source("ollama:tiny")
    assert isinstance(source, OllamaSource)
    assert source.ollama.stop == ("x",)


def test_a_file_that_is_no_gguf(store: Path) -> None:
    manifest = add_model(store, f"{LIBRARY}/bad/latest", [("model", b"not a model")])
    assert LAYER in manifest.read_text()
    fails("ollama:bad", "is not a GGUF file")


def test_a_store_that_may_not_be_read(store: Path, tiny: Path) -> None:
    add_model(store, f"{LIBRARY}/tiny/latest", [("model", tiny.read_bytes())])
    store.chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)  # nobody: root may read everything
    try:
        fails("ollama:tiny", "may not be read by this user: add yourself to the group")
    finally:
        if is_root:
            os.seteuid(0)
        store.chmod(0o755)
