"""What a GGUF file calls a model's architecture and tensors, with errors for what it has no name for."""

from halfbyte.errors import UsageError
from halfbyte.models.gguf_config import WRITTEN_AS, gguf_name
from halfbyte.models.spec import ModelSpec


def architecture_of(spec: ModelSpec) -> str:
    """llama.cpp's name of the family; Mistral is Llama there."""
    return WRITTEN_AS.get(spec.family, spec.family)


def gguf_tensor_name(spec: ModelSpec, name: str) -> str:
    """The GGUF name of a tensor (with its `.weight` or `.bias`). UsageError where llama.cpp has none."""
    found = gguf_name(architecture_of(spec), name)
    if found is None:
        raise UsageError(f"{name} has no place in a GGUF file of architecture {architecture_of(spec)}")
    return found


def heads_in(spec: ModelSpec, name: str) -> int:
    """Heads whose rows llama.cpp reorders in this tensor (it rotates neighbouring pairs); 0: none."""
    if architecture_of(spec) != "llama":
        return 0
    if ".self_attn.q_proj." in f"{name}.":
        return spec.num_heads
    return spec.num_kv_heads if ".self_attn.k_proj." in f"{name}." else 0
