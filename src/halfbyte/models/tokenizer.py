"""The tokenizer of a model source: transformers' fast one, whatever the model came as."""

from typing import Any

from halfbyte.errors import UsageError
from halfbyte.models.model_source import ModelSource


def load_tokenizer(source: ModelSource) -> Any:
    """A transformers fast tokenizer, with its chat template where the model has one. Never runs a model's own code.

    Raises UsageError where the files are missing or damaged.
    """
    import transformers  # heavy, and not needed by those who only read weights

    path = source.path
    folder, extra = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **extra
        )
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UsageError(f"{path} has no tokenizer that transformers can load: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
