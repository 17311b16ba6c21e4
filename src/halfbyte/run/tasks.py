"""What a run learns, told from its config and its model: a language model, a classifier, an encoder-decoder.

The classes of a classifier come from its training rows, once; from then on they are those of its head, which are kept
with it: in labels.json beside an adapter, in config.json of a model's folder.
"""

from pathlib import Path
from typing import Any

from halfbyte.adapters import heads
from halfbyte.adapters.peft_io import read_adapter_config, read_adapter_tensors
from halfbyte.data import Prepared
from halfbyte.errors import UsageError
from halfbyte.models.classifier import HeadOptions, head_of_file
from halfbyte.models.source import ModelSource
from halfbyte.run.config import RunConfig

CLASSIFICATION, SEQ2SEQ = "classification", "seq2seq"


def with_task(config: RunConfig, source: ModelSource) -> RunConfig:
    """The config with the task that the model is for, where `auto` leaves that open; auto stays for language models.

    UsageError for a task that the model cannot learn.
    """
    pairs = bool(source.config.get("is_encoder_decoder"))
    if config.task == "auto":
        if pairs:
            return config.replace(task=SEQ2SEQ)
        return config.replace(task=CLASSIFICATION) if head_of_file(source) is not None else config
    if pairs and config.task != SEQ2SEQ:
        raise UsageError(f"{source.name} is an encoder-decoder: it learns task: seq2seq, not {config.task}")
    if not pairs and config.task == SEQ2SEQ:
        raise UsageError(
            f"task: seq2seq is for encoder-decoders such as T5, and {source.name} is none: leave it out, the rows can "
            "be the same"
        )
    return config


def known_labels(config: RunConfig, source: ModelSource, adapter: Path | None = None) -> tuple[str, ...] | None:
    """The classes of the head that there is already: the adapter's, or the model's own. None: the rows will tell."""
    if config.task != CLASSIFICATION:
        return None
    folder = adapter or (None if config.adapter_path is None else Path(config.adapter_path))
    if folder is None:
        return _named(head_of_file(source), config.label_names, source.name)
    own = heads.read_labels(folder)
    if own is None:
        # PEFT's own files do not say what the classes are called; the base may, and the user can.
        head = heads.take_head(read_adapter_tensors(folder), read_adapter_config(folder), folder)
        of_base, count = head_of_file(source), 0 if head is None else head.shape[0]
        known = of_base is not None and len(of_base) == count and config.label_names is None
        own = of_base if known else _unnamed(count) or None
    return _named(own, config.label_names, folder)


def _unnamed(count: int) -> tuple[str, ...]:
    """What transformers calls classes that nobody named."""
    return tuple(f"LABEL_{index}" for index in range(count))


def _named(own: tuple[str, ...] | None, names: tuple[str, ...] | None, where: str | Path) -> tuple[str, ...] | None:
    """A head's classes; `label_names` gives names to those that have none. UsageError where it says something else."""
    if own is None or not names or names == own:
        return own
    if len(names) == len(own) == len(set(names)) and own == _unnamed(len(own)):
        return names
    raise UsageError(
        f"label_names is {', '.join(names)}, and the head in {where} has the classes {', '.join(own)}: leave it out"
        + (", or give each of them its own name" if own == _unnamed(len(own)) else "")
    )


def require_an_end(config: RunConfig, tokenizer: Any) -> None:
    """UsageError for a classifier whose texts would end with padding: transformers looks for the last other token."""
    if config.task != CLASSIFICATION:
        return
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if padding is not None and tokenizer("a")["input_ids"][-1] == padding:
        raise UsageError(
            f"the tokenizer ends every text with {tokenizer.decode([padding])!r}, which is its padding too: a "
            "classifier in transformers could not tell a text's last token: give the tokenizer another pad_token"
        )


def head_of(config: RunConfig, prepared: Prepared) -> HeadOptions | None:
    """The head that the run's model is loaded with."""
    if config.task != CLASSIFICATION:
        return None
    return HeadOptions(tuple(choice.word for choice in prepared.labels), config.seed)


def head_to_open(config: RunConfig, source: ModelSource, adapter: Path | None) -> HeadOptions | None:
    """The head of a model that is opened without rows. UsageError where nothing says what the classes are."""
    if config.task != CLASSIFICATION:
        return None
    labels = known_labels(config, source, adapter) or config.label_names
    if not labels:
        raise UsageError(f"{source.name} has no head yet, and nothing says what its classes are: give label_names")
    return HeadOptions(tuple(labels), config.seed)


def require_trained_head(source: ModelSource, adapter: Path | None) -> None:
    """UsageError for a classifier whose head would be a new one: it says nothing before it is trained."""
    if adapter is None and head_of_file(source) is None:
        raise UsageError(f"{source.name} has no trained head to classify with: train one with task: classification")


def require_language_model(config: RunConfig, what: str, seq2seq: bool = False) -> None:
    """UsageError where `what` (a verb) is asked of a classifier or, unless `seq2seq`, of an encoder-decoder."""
    if config.task == CLASSIFICATION:
        raise UsageError(
            f"{what} is for language models, and this is a classifier: use `halfbyte evaluate --data ROWS --json "
            "--rows`, or hb.classify in Python"
        )
    if config.task == SEQ2SEQ and not seq2seq:
        raise UsageError(f"{what} is for decoders, and this is an encoder-decoder: use halfbyte generate or merge")
