"""Ollama's store on disk: manifests and blobs, as `ollama create` leaves them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAYER = "application/vnd.ollama.image."


def add_blob(store: Path, data: bytes) -> tuple[str, int]:
    """(digest, size) of a blob, written."""
    digest = hashlib.sha256(data).hexdigest()
    path = store / "blobs" / f"sha256-{digest}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return f"sha256:{digest}", len(data)


def layer(store: Path, kind: str, data: bytes) -> dict[str, Any]:
    digest, size = add_blob(store, data)
    return {"mediaType": LAYER + kind, "digest": digest, "size": size}


def add_model(store: Path, name: str, layers: list[tuple[str, bytes]]) -> Path:
    """A manifest `host/namespace/model/tag` with its layers; returns its path."""
    config = layer(store, "json", json.dumps({"model_format": "gguf"}).encode())
    made = [layer(store, kind, data) for kind, data in layers]
    return write_manifest(store, name, {"schemaVersion": 2, "config": config, "layers": made})


def write_manifest(store: Path, name: str, manifest: Mapping[str, Any]) -> Path:
    path = store / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest))
    return path
