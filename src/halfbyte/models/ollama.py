"""A model in Ollama's store, trained on and exported from where it lies: `ollama:NAME[:TAG]`.

The store is a small registry on disk (Ollama's manifest/ and types/model/name.go):

    <store>/manifests/<host>/<namespace>/<model>/<tag>      JSON: layers with mediaType, digest, size
    <store>/blobs/sha256-<hex>                              the layers: the GGUF file, template, parameters, …

    ollama:qwen2.5                     registry.ollama.ai/library/qwen2.5:latest
    ollama:user/name:tag               registry.ollama.ai/user/name:tag
    ollama:hf.co/user/name:Q4_K_M      host, namespace, model and tag all given

Only read, never written. Manifests come from others, so names and digests are checked before they become a path.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.gguf_source import GgufSource

PREFIX = "ollama:"
_HOST, _NAMESPACE, _TAG = "registry.ollama.ai", "library", "latest"
_SYSTEM_STORE = Path("/usr/share/ollama/.ollama/models")  # where Ollama's Linux service keeps its own
_LAYER = "application/vnd.ollama.image."
# Ollama's isValidPart: letters, digits, _ and -, dots but in a namespace, a colon in a host (its port).
_PARTS = {
    "host": re.compile(r"\w[\w.:-]{0,349}", re.ASCII),
    "namespace": re.compile(r"\w[\w-]{0,79}", re.ASCII),
    "model": re.compile(r"\w[\w.-]{0,79}", re.ASCII),
    "tag": re.compile(r"\w[\w.-]{0,79}", re.ASCII),
}
_DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
_MAX_MANIFEST = 1 << 20
_MAX_TEXT = 1 << 20
"""Most bytes of a manifest, and of a template, system text or parameters: they are read whole."""


@dataclass(frozen=True)
class Name:
    """A model's four parts."""

    host: str
    namespace: str
    model: str
    tag: str

    def __str__(self) -> str:
        """As Ollama shows it: without the parts that are its defaults, always with the tag."""
        host = "" if self.host == _HOST else f"{self.host}/"
        namespace = "" if self.namespace == _NAMESPACE and not host else f"{self.namespace}/"
        return f"{host}{namespace}{self.model}:{self.tag}"

    @property
    def path(self) -> Path:
        return Path(self.host) / self.namespace / self.model / self.tag


@dataclass(frozen=True)
class OllamaModel:
    """What the store knows of a model beside its weights.

    name          as it is given to Ollama, without `ollama:`
    path          the GGUF file
    template      its TEMPLATE, in Go's template language; None: it has none
    system        its SYSTEM text
    parameters    its PARAMETERs: a number, a text, or a list of texts (`stop`)
    """

    name: str
    path: Path
    template: str | None
    system: str | None
    parameters: dict[str, Any]

    @property
    def stop(self) -> tuple[str, ...]:
        """The texts at which its answers end."""
        found = self.parameters.get("stop", ())
        return tuple(map(str, found)) if isinstance(found, list) else (str(found),) if found else ()


class OllamaSource(GgufSource):
    """A GgufSource on the store's file, under the name that the user gave. `ollama` is what lies beside it."""

    def __init__(self, found: OllamaModel) -> None:
        _require_text_model(found)
        super().__init__(f"{PREFIX}{found.name}", found.path)
        self.ollama = found


def is_ollama_name(model: str) -> bool:
    return model.startswith(PREFIX)


def open_ollama(model: str) -> OllamaSource:
    """The source of `ollama:NAME[:TAG]`. UsageError, one line, for whatever is not one whole text model in GGUF."""
    return OllamaSource(find(model))


def find(model: str) -> OllamaModel:
    """Look `ollama:NAME[:TAG]` up in the stores of this machine. UsageError: see `open_ollama`."""
    name = parse_name(model.removeprefix(PREFIX))
    looked_in = stores()
    for store in looked_in:
        manifest = store / "manifests" / name.path
        if _is_file(manifest):
            return _read_model(store, manifest, name)
    raise UsageError(f"Ollama has no model {name}{_near(name, looked_in)}")


def parse_name(text: str) -> Name:
    """`[[host/]namespace/]model[:tag]` with Ollama's defaults. UsageError for what cannot be a name."""
    rest, tag = text, _TAG
    if text.rfind(":") > text.rfind("/"):
        rest, _, tag = text.rpartition(":")
    parts = rest.split("/")
    host, namespace, model = ([_HOST, _NAMESPACE][: 3 - len(parts)] + parts) if len(parts) <= 3 else ("", "", "")
    name = Name(host, namespace, model, tag)
    for kind, allowed in _PARTS.items():
        if not allowed.fullmatch(getattr(name, kind)):
            raise UsageError(f"{PREFIX}{text} is no name of Ollama's (its {kind} is {getattr(name, kind)!r}): "
                             "write ollama:NAME, ollama:NAME:TAG or ollama:USER/NAME:TAG")  # fmt: skip
    return name


def stores() -> list[Path]:
    """The stores on this machine, $OLLAMA_MODELS alone where it is set. UsageError if there is none."""
    asked = os.environ.get("OLLAMA_MODELS", "").strip()
    places = [Path(asked).expanduser()] if asked else [Path("~/.ollama/models").expanduser(), _SYSTEM_STORE]
    found = [place for place in places if _is_folder(place / "manifests")]
    if not found:
        why = "OLLAMA_MODELS names it" if asked else "set OLLAMA_MODELS if Ollama keeps its models elsewhere"
        raise UsageError(f"there is no store of Ollama's models in {' or '.join(map(str, places))} ({why})")
    return found


def names(folders: list[Path]) -> Iterator[Name]:
    """Every model of the stores, sorted."""
    for store in folders:
        for path in sorted((store / "manifests").glob("*/*/*/*")):
            yield Name(*path.parts[-4:])


def _near(name: Name, folders: list[Path]) -> str:
    """What the user may have meant: other tags of the model first, then models of a similar name, then all of them."""
    known = [str(other) for other in names(folders)]
    stem = str(name).rpartition(":")[0]
    same = [other for other in known if other.rpartition(":")[0] == stem]
    close = same or difflib.get_close_matches(str(name), known, n=3, cutoff=0.5) or known
    if not close:
        return f": its store in {folders[0]} is empty; `ollama pull {name}` brings it"
    return f": it has {', '.join(close[:5])}{', …' if len(close) > 5 else ''}; `ollama pull {name}` brings others"


def _read_model(store: Path, manifest: Path, name: Name) -> OllamaModel:
    layers = _layers(manifest, name)
    weights = [layer for layer in layers if layer["mediaType"] == f"{_LAYER}model"]
    for kind, what in (("projector", "is multimodal (it has a projector)"), ("adapter", "has an adapter of its own")):
        if any(layer["mediaType"] == _LAYER + kind for layer in layers):
            raise UsageError(f"Ollama's {name} {what}: choose a text model that is whole in one file")
    if len(weights) > 1:
        raise UsageError(f"Ollama's {name} is split over {len(weights)} files: choose one that is whole in one file")
    if not weights:
        raise UsageError(f"Ollama's {name} has no GGUF file (a model of its cloud, or in another format): choose "
                         "another tag")  # fmt: skip
    path = _blob(store, weights[0], name)
    texts = {layer["mediaType"].removeprefix(_LAYER): layer for layer in layers}
    template, system, parameters = (_text(store, texts.get(kind), name) for kind in ("template", "system", "params"))
    return OllamaModel(str(name), path, template, system, _parameters(parameters, manifest))


def _layers(manifest: Path, name: Name) -> list[dict[str, Any]]:
    """The manifest's layers, each an object with texts for mediaType and digest and a number for size."""
    damaged = f"{manifest}, Ollama's manifest of {name}, is damaged"
    if manifest.stat().st_size > _MAX_MANIFEST:
        raise UsageError(f"{damaged}: it is larger than {_MAX_MANIFEST} bytes; `ollama pull {name}` again")
    try:
        layers = json.loads(manifest.read_bytes())["layers"]
    except OSError as error:
        raise UsageError(f"{manifest} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UsageError(f"{damaged} ({type(error).__name__}): `ollama pull {name}` again") from None
    kinds = {"mediaType": str, "digest": str, "size": int}
    for layer in layers if isinstance(layers, list) else [None]:
        if not isinstance(layer, dict) or not all(isinstance(layer.get(k), kind) for k, kind in kinds.items()):
            raise UsageError(f"{damaged}: a layer has no mediaType, digest and size; `ollama pull {name}` again")
    return list(layers)


def _blob(store: Path, layer: dict[str, Any], name: Name) -> Path:
    """A layer's file, checked against the manifest: its digest is one, it is there, and it has the size."""
    digest = _DIGEST.fullmatch(layer["digest"])
    if digest is None:
        raise UsageError(f"Ollama's manifest of {name} is damaged: {layer['digest'][:80]!r} is not a sha256 digest; "
                         f"`ollama pull {name}` again")  # fmt: skip
    path = store / "blobs" / f"sha256-{digest[1]}"
    if not _is_file(path):
        raise UsageError(f"{path} is missing, which Ollama's {name} needs: `ollama pull {name}` again")
    if path.stat().st_size != layer["size"]:
        raise UsageError(f"{path} has {path.stat().st_size} bytes, and Ollama's manifest of {name} says "
                         f"{layer['size']}: `ollama pull {name}` again")  # fmt: skip
    return path


def _text(store: Path, layer: dict[str, Any] | None, name: Name) -> str | None:
    if layer is None:
        return None
    path = _blob(store, layer, name)
    if layer["size"] > _MAX_TEXT:
        raise UsageError(f"{path}, the {layer['mediaType'].removeprefix(_LAYER)} of Ollama's {name}, is larger than "
                         f"{_MAX_TEXT} bytes: it is damaged; `ollama pull {name}` again")  # fmt: skip
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None


def _parameters(text: str | None, manifest: Path) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{manifest}: the parameters that it names are no JSON object; pull the model again")
    return found


def _require_text_model(found: OllamaModel) -> None:
    """Newer models have their vision tower inside the one file, and a split one says so: told before it is refused."""
    file = GgufFile(found.path)
    architecture = file.get("general.architecture")
    if any(f"{architecture}.{tower}.block_count" in file for tower in ("vision", "audio")):
        raise UsageError(f"Ollama's {found.name} is multimodal: choose a text model")
    if (file.get("split.count") or 0) > 1:
        raise UsageError(f"Ollama's {found.name} is one part of a split model: choose one that is whole in one file")


def _is_file(path: Path) -> bool:
    return _permitted(path) and path.is_file()


def _is_folder(path: Path) -> bool:
    return _permitted(path) and path.is_dir()


def _permitted(path: Path) -> bool:
    """Whether it is there; UsageError where this user may not look (the service's store belongs to `ollama`)."""
    try:
        path.stat()
    except PermissionError:
        raise UsageError(f"{path} may not be read by this user: add yourself to the group `ollama`, or set "
                         "OLLAMA_MODELS to a store of your own") from None  # fmt: skip
    except OSError:
        return False
    return True
