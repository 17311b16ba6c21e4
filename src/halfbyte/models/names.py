"""Checkpoint tensor names to the names of the family's text model in transformers.

Multimodal wrappers put a prefix before the language model, and a folder saved from the bare model
(AutoModel) has none of the outer one.
"""

from collections.abc import Container

_PREFIXES = (
    ("model.language_model.", "model."),  # transformers 5's wrappers
    ("language_model.model.", "model."),  # transformers 4's
    ("language_model.lm_head.", "lm_head."),
)
_BARE = ("embed_tokens.", "layers.", "norm.")


def normalised(name: str, names: Container[str]) -> str:
    """`name` as the text model calls it; `names` are all of the checkpoint's. A vision tower keeps its own."""
    for prefix, ours in _PREFIXES:
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    if "embed_tokens.weight" in names and name.startswith(_BARE):
        return "model." + name
    return name
