"""The tokenizer of a model source: a transformers fast tokenizer, whatever the model came as.

Where a folder has a tokenizer.json it is taken as it is. transformers 5's AutoTokenizer rebuilds many classes
(Llama's, Gemma's, Qwen's) in Python from its vocabulary and merges with the normalisation that the class has
today: slower, 0.4 GB more for Gemma, and not always what the file says.
"""

from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.models import gguf_tokenizer
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.model_source import ModelSource

_VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json")


def load_tokenizer(source: ModelSource) -> Any:
    """A transformers fast tokenizer, with its chat template where the model has one. Never runs a model's own code.

    Raises UsageError where the files are missing or damaged.
    """
    file = getattr(source, "file", None)
    if isinstance(file, GgufFile):
        return from_gguf(file)
    return from_folder(source.path)


def from_folder(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder."""
    import transformers  # heavy, and not needed by those who only read weights

    whole = (folder / "tokenizer.json").is_file()
    if not whole and not any((folder / name).is_file() for name in _VOCABULARIES):
        # transformers would make one with an empty vocabulary, without a word.
        raise UsageError(f"{folder} has no tokenizer (tokenizer.json): copy it from the model that this one came from")
    kind = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
    try:
        made = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        made.decode(made("a").input_ids)  # settings of a wrong type are only found in use
        return made
    except Exception as error:  # transformers raises whatever its parsers raise
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{folder} has no tokenizer that transformers can load: {text[0]}") from error


def from_gguf(file: GgufFile) -> Any:
    """The tokenizer that a GGUF file describes, as a transformers fast tokenizer."""
    from transformers import PreTrainedTokenizerFast

    backend = gguf_tokenizer.build_backend(file)
    names = gguf_tokenizer.special_tokens(file, backend)
    template = file.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise UsageError(f"{file.path}: tokenizer.chat_template is not a text: the file is damaged")
    tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)
    # Handed over before __init__ runs: as an argument it would be copied through a JSON text of 35 MB.
    tokenizer._tokenizer = backend
    tokenizer.__init__(
        **names,
        add_bos_token=gguf_tokenizer.adds_bos(file) and "bos_token" in names,
        add_eos_token=gguf_tokenizer.adds_eos(file) and "eos_token" in names,
        **({} if template is None else {"chat_template": template}),
        clean_up_tokenization_spaces=False,
    )
    return tokenizer
