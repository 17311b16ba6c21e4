"""Which ggml type each tensor of a model gets: llama.cpp's quantizer's choice, as a value.

Source: llama.cpp, src/llama-quant.cpp (`llama_tensor_get_type`). A mixture such as Q4_K_M spends more bits where a
model is most sensitive: the output head, and in some layers the values and the feed-forward's way down.
"""

from dataclasses import dataclass

from halfbyte.errors import UsageError
from halfbyte.export.gguf_names import architecture_of, gguf_tensor_name
from halfbyte.models.spec import ModelSpec
from halfbyte.quant.gguf_encode import block_of


@dataclass(frozen=True)
class Quantization:
    """A file type: `base` for most matrices; `mixed`: some get Q6_K; `file_type`: llama.cpp's number for it."""

    base: str
    file_type: int
    mixed: bool = False


QUANTIZATIONS = {
    "f32": Quantization("F32", 0),
    "f16": Quantization("F16", 1),
    "bf16": Quantization("BF16", 32),
    "q8_0": Quantization("Q8_0", 7),
    "q4_0": Quantization("Q4_0", 2),
    "q4_k_m": Quantization("Q4_K", 15, mixed=True),
    "q5_k_m": Quantization("Q5_K", 17, mixed=True),
    "q6_k": Quantization("Q6_K", 18),
}
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that are not whole blocks of 256."""


def find_quantization(name: str) -> Quantization:
    """UsageError for a name that is none of QUANTIZATIONS (any case)."""
    found = QUANTIZATIONS.get(name.lower())
    if found is None:
        raise UsageError(f"{name!r} is not a GGUF quantization: choose one of {', '.join(QUANTIZATIONS)}")
    return found


def types_of(spec: ModelSpec, quantization: str) -> dict[str, str]:
    """GGUF tensor name -> ggml type, for every tensor of the model. Vectors are always F32."""
    chosen = find_quantization(quantization)
    types = {}
    for hf_name, shape in spec.tensors():
        name = gguf_tensor_name(spec, hf_name)
        if len(shape) == 1:
            types[name] = "F32"
        elif chosen.base in ("F32", "F16", "BF16"):
            types[name] = chosen.base
        else:
            types[name] = _fitting(_wanted(spec, chosen, name, shape[1]), shape[1])
    return types


def _wanted(spec: ModelSpec, chosen: Quantization, name: str, columns: int) -> str:
    """The type, whether or not the rows fit its blocks."""
    if name == "output.weight" or (spec.tied and name == "token_embd.weight"):
        return "Q8_0" if chosen.base == "Q8_0" or columns % block_of(chosen.base)[0] else "Q6_K"
    if not chosen.mixed or not name.startswith("blk."):
        return chosen.base
    _, layer, part, _ = name.split(".")
    if part in ("attn_v", "attn_qkv", "ffn_down") and _more_bits(int(layer), spec.num_layers):
        return "Q6_K"
    if part in ("attn_v", "attn_qkv") and chosen.base == "Q4_K" and _is_70b(spec):
        return "Q5_K"
    return chosen.base


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's `use_more_bits`: the first and last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _is_70b(spec: ModelSpec) -> bool:
    """llama.cpp knows a 70B model by its 80 layers; eight query heads share its values, which are small."""
    architecture = architecture_of(spec)
    return spec.num_layers == 80 and (
        architecture == "qwen2" or (architecture == "llama" and spec.num_heads != spec.num_kv_heads)
    )


def _fitting(type_name: str, columns: int) -> str:
    if columns % block_of(type_name)[0] == 0:
        return type_name
    fallback = _FALLBACK.get(type_name, "F16")
    return fallback if columns % block_of(fallback)[0] == 0 else "F16"
