"""What `halfbyte plan -m NAME` opens: anything that can be trained, without its weights, or a name of the catalogue.

A path on this machine comes first, then a name of the catalogue (which never has a slash), then the Hub. Where the Hub
does not hand out the config of a model that the catalogue knows (it is gated, or the Hub is out of reach), the
catalogue's shapes do.
"""

import logging
from pathlib import Path

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.models import hub, ollama
from halfbyte.models.config_source import ConfigOnly, open_config
from halfbyte.models.model_source import ModelSource
from halfbyte.plan.catalog.models import Model, find, models
from halfbyte.plan.catalog.names import nearest

log = logging.getLogger(__name__)


def open_for_plan(model: str, revision: str | None = None, cache: Path | None = None) -> ModelSource:
    """A source with shapes and, when it is asked for, a tokenizer; see `models.config_source.open_config`.

    UsageError for a name that is neither, with the nearest names of the catalogue.
    """
    elsewhere = Path(model).expanduser().exists() or ollama.is_ollama_name(model)
    known = None if elsewhere else find(model)
    if known is not None and "/" not in model:
        return _from_catalogue(known, revision, cache)
    try:
        return open_config(model, revision, cache)
    except HalfbyteError as error:
        if known is not None and revision is None:
            log.warning("%s: planned with the catalogue's shapes, since %s", model, error)
            return _from_catalogue(known, revision, cache)
        if elsewhere or "/" in model:
            raise
        raise UsageError(f"{error}; nor is it a name of the catalogue: {nearest(model, models())}") from None


def _from_catalogue(entry: Model, revision: str | None, cache: Path | None) -> ModelSource:
    def fetch() -> Path:
        return hub.download(entry.hub, revision, cache, part="tokenizer").path

    return ConfigOnly(entry.name, dict(entry.config), Path(entry.hub), "catalogue", revision, fetch)
