"""The models that people start from, as shapes: enough to plan with before anything is downloaded.

An entry of models.yaml holds the fields of the model's config.json that decide memory and time, the Hub id that it
belongs to, and the number of parameters that its publisher states; a test computes the number from the shapes.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from halfbyte.errors import UsageError
from halfbyte.plan.catalog.names import nearest, plain
from halfbyte.yamlfile import read_yaml

FILE = Path(__file__).with_name("models.yaml")


@dataclass(frozen=True)
class Model:
    """One entry.

    name        as it is written on the command line
    hub         the Hub id of the weights
    parameters  as published, embeddings included, tied ones once
    config      what ModelSpec, or transformers, reads of its config.json
    """

    name: str
    hub: str
    parameters: int
    config: dict[str, Any]


def models() -> dict[str, Model]:
    """Every entry by name, in the file's order."""
    return dict(_models())


@cache
def _models() -> dict[str, Model]:
    found = {}
    for name, entry in read_yaml(FILE).items():
        value = dict(entry.value)
        found[name] = Model(name, str(value.pop("hub")), int(value.pop("parameters")), value)
    return found


def find(name: str) -> Model | None:
    """The entry of that name or Hub id, however it is spelled; None where there is none."""
    wanted = plain(name)
    return next((m for m in _models().values() if wanted in (m.name, plain(m.hub))), None)


def find_model(name: str) -> dict[str, Any]:
    """config.json of a model by its name here. UsageError with the nearest names for one that is not."""
    found = find(name)
    if found is None:
        raise UsageError(f"{name!r} is not a model of the catalogue: {nearest(name, _models())}")
    return dict(found.config)
