"""Where a model comes from: a Hugging Face folder, the Hub, a GGUF file, or Ollama's store.

source = open_source("Qwen/Qwen3-0.6B")
source.tensors()                          names, shapes, dtypes: headers only
source.read("model.embed_tokens.weight")  one tensor, when it is wanted
"""

from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.models import hub, ollama
from halfbyte.models.gguf_source import GgufSource
from halfbyte.models.model_source import ModelSource, TensorInfo
from halfbyte.models.safetensors_source import FolderSource

__all__ = ["ModelSource", "TensorInfo", "open_source"]

_CHOICES = "a model folder, a .gguf file, ollama:NAME or a Hub id such as Qwen/Qwen3-0.6B"


def open_source(model: str, revision: str | None = None, cache: Path | None = None) -> ModelSource:
    """Find `model` and read its headers; weights stay where they are (a Hub model is downloaded first).

    model     a folder, a .gguf file, a Hub id "owner/name" or a GGUF file in one, "owner/name/file.gguf", or a model of
              Ollama's on this machine, "ollama:name:tag"
    revision  the Hub's branch, tag or commit
    cache     the Hub's cache folder, huggingface_hub's own by default

    Raises UsageError, one line that names the file and what to do, for anything that is not a whole model.
    """
    if ollama.is_ollama_name(model):
        if revision is not None:
            raise UsageError(f"revision {revision!r} is for Hub models; a model of Ollama's has its tag in the name")
        return ollama.open_ollama(model)
    path = Path(model).expanduser()
    if path.exists():
        if revision is not None:
            raise UsageError(f"revision {revision!r} is for Hub models; {path} is on this machine: leave it out")
        return _open_local(model, path)
    if not hub.is_hub_id(model):
        raise UsageError(f"{path} does not exist: give {_CHOICES}")
    found = hub.download(model, revision, cache)
    if found.path.is_dir():
        return FolderSource(model, found.path, kind="hub", revision=found.revision)
    source = GgufSource(model, found.path)
    source.revision = found.revision
    return source


def _open_local(model: str, path: Path) -> ModelSource:
    if path.is_dir():
        return FolderSource(model, path)
    with path.open("rb") as file:
        magic = file.read(4)
    if path.suffix == ".gguf" or magic == b"GGUF":
        return GgufSource(model, path)
    if path.suffix == ".safetensors":
        raise UsageError(f"{path} is one file of a model: give its folder, {path.parent}")
    raise UsageError(f"{path} is not a model: give {_CHOICES}")
