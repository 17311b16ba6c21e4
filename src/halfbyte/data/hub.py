"""Data sets of the Hugging Face Hub, through the `datasets` package (the `data` extra).

Code that a data set brings along is never run: `trust_remote_code` is not passed, and `datasets` refuses it itself.
"""

import os
from typing import Any

from halfbyte.data.records import Origin, RawData, Record
from halfbyte.errors import UsageError

_EVAL_SPLITS = ("validation", "dev", "test")


def read_hub(dataset: str, name: str | None, split: str | None, evaluation: bool) -> RawData:
    """The rows of one split: the one asked for, else `train`, or the first held-out one for evaluation."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"{dataset}: no such file or folder; to read it as a Hub data set: pip install 'halfbyte[data]'"
        ) from None
    datasets.disable_progress_bars()
    splits = _load(datasets, dataset, name)
    chosen = _choose_split(dataset, list(splits), split, evaluation)
    rows = splits[chosen]
    origin = f"{dataset}:{chosen}"
    data = RawData(notes=[f"{dataset}: the split {chosen!r} of {', '.join(map(repr, splits))}"])
    data.records = [Record(Origin(origin, number), dict(values)) for number, values in enumerate(rows, 1)]
    if not data.records:
        raise UsageError(f"{origin}: the split holds no rows")
    names = getattr(rows.features.get("label"), "names", None)
    data.label_names = tuple(names) if names else None
    return data


def _load(datasets: Any, dataset: str, name: str | None) -> Any:
    try:
        return datasets.load_dataset(dataset, name=name)
    except Exception as error:  # each release of datasets raises other classes for the same few causes
        raise UsageError(f"{dataset}: {_explain(error)}") from None


def _explain(error: Exception) -> str:
    """One line for the causes that users meet; otherwise the first line of what `datasets` says."""
    text = " ".join(str(error).split())
    lower = text.lower()
    if "gated" in lower or "401" in lower or "403" in lower:
        return "the Hub refuses access (gated or private): accept its terms on the Hub and run `hf auth login`"
    if "config name is missing" in lower or "please pick one among" in lower:
        return f"it has several configurations, name one: data: [{{path: …, name: …}}] ({text[:200]})"
    if "builderconfig" in lower and "not found" in lower:
        return text[:200]
    if "dataset scripts are no longer supported" in lower or "trust_remote_code" in lower:
        return "it runs code of its own to load, which halfbyte does not allow: use a Parquet or JSON version of it"
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0") or "offline" in lower
    if offline or isinstance(error, ConnectionError) or "couldn't reach" in lower or "connect" in lower:
        return "the Hub cannot be reached and it is not in the local cache: check the network, or download it first"
    if type(error).__name__ == "DatasetNotFoundError" or "doesn't exist on the hub" in lower:
        return "no such file or folder here, and no such data set on the Hub (or it is private: `hf auth login`)"
    return f"cannot be loaded ({type(error).__name__}: {text[:200]})"


def _choose_split(dataset: str, splits: list[str], asked: str | None, evaluation: bool) -> str:
    if asked is not None:
        wanted: tuple[str, ...] = (asked,)
    else:
        wanted = _EVAL_SPLITS if evaluation else ("train",)
    for candidate in wanted:
        if candidate in splits:
            return candidate
    raise UsageError(f"{dataset}: no split {' or '.join(map(repr, wanted))}; it has {', '.join(map(repr, splits))}")
