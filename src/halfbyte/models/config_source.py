"""A model of which nothing but config.json is there: enough to plan with, and to train nothing.

    open_config("Qwen/Qwen2.5-7B")       from the Hub: a few kilobytes, no weights
    open_config("my-model")              a folder, whole or with its config.json alone
    open_config("somewhere/config.json")

What is on this machine as a whole, headers and all, is opened as `open_source` does: the headers say what a quantized
file holds. Tokenizer files are fetched when somebody asks for the tokenizer, which only a plan with data does.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.models import hub, ollama
from halfbyte.models.model_source import ModelSource, Stored, TensorInfo
from halfbyte.models.safetensors_source import FolderSource, read_json_object
from halfbyte.models.source import open_source
from halfbyte.models.spec import ModelSpec

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ConfigOnly(ModelSource):
    """See `ModelSource`. Tensors have shapes for the decoder's families, and the type that config.json states.

    kind        "config": of a folder or file; "hub"; "catalogue"
    fetch       makes the folder with the tokenizer's files, when one is asked for; None: it is `path`
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        path: Path,
        kind: str = "config",
        revision: str | None = None,
        fetch: Callable[[], Path] | None = None,
    ) -> None:
        super().__init__(name, kind, path, config, revision)
        self._fetch = fetch

    def tensors(self) -> dict[str, TensorInfo]:
        if not ModelSpec.serves(self.config):
            return {}
        stated = str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.")
        dtype = _DTYPES.get(stated, torch.bfloat16)  # what files are taken to hold where nothing says it
        return {name: TensorInfo(shape, dtype) for name, shape in ModelSpec.from_config(self.config).tensors()}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        raise self._without_weights()

    def stored(self) -> Iterator[Stored]:
        raise self._without_weights()

    def tokenizer(self) -> Any:
        if self._fetch is not None:
            self.path, self._fetch = self._fetch(), None
        return super().tokenizer()

    def _without_weights(self) -> UsageError:
        return UsageError(
            f"{self.name}: only its config.json was opened, which is enough for a plan; training and everything else "
            "need the whole model"
        )


def open_config(model: str, revision: str | None = None, cache: Path | None = None) -> ModelSource:
    """Open `model` for a plan, without its weights; arguments and errors as `open_source`.

    A model on the Hub is not downloaded: its config.json is. A GGUF file is, since nothing else says what it holds.
    """
    path = Path(model).expanduser()
    if ollama.is_ollama_name(model):
        return open_source(model, revision, cache)
    if path.exists():
        if revision is None and path.suffix == ".json":
            return ConfigOnly(model, read_config(path), path.parent)
        if revision is None and path.is_dir() and (path / "config.json").is_file() and not _has_weights(path):
            return ConfigOnly(model, read_config(path / "config.json"), path)
        return open_source(model, revision, cache)
    if not hub.is_hub_id(model) or model.endswith(".gguf"):
        return open_source(model, revision, cache)
    found = hub.download(model, revision, cache, part="config")
    if _has_weights(found.path):
        try:
            return FolderSource(model, found.path, kind="hub", revision=found.revision)
        except UsageError:
            pass  # a download that was broken off: the config is whole
    config = read_config(found.path / "config.json")

    def fetch() -> Path:
        return hub.download(model, found.revision or revision, cache, part="tokenizer").path

    return ConfigOnly(model, config, found.path, "hub", found.revision, fetch)


def read_config(path: Path) -> dict[str, Any]:
    """A config.json; UsageError for one that is not JSON, or not a transformers model's."""
    config = read_json_object(path)
    if not isinstance(config.get("model_type"), str):
        raise UsageError(f"{path} has no model_type: it is not a transformers model's config")
    return config


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))
