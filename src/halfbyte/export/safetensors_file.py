"""A model's safetensors files: which tensors go where. Writing and reading them piece by piece is `tensorfile`'s."""

import json
from collections.abc import Sequence

from halfbyte.tensorfile import DTYPE_CODES, Planned, write_file

__all__ = ["DTYPE_CODES", "INDEX", "SINGLE", "Planned", "plan_shards", "shard_index", "write_file"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def plan_shards(tensors: Sequence[Planned], shard_bytes: int) -> dict[str, list[Planned]]:
    """File name -> its tensors, in order; transformers' names. A tensor larger than a shard gets one of its own."""
    shards: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def shard_index(shards: dict[str, list[Planned]]) -> str:
    """The text of model.safetensors.index.json."""
    weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
