"""A config.json for a GGUF file: llama.cpp's metadata in transformers' words, and the tensors' names in Hugging Face's.

llama.cpp keeps some of a model's facts in its own code (Gemma's activation, which layers slide, Gemma's
attention scale by size), so those are written out here per family. Sources: llama.cpp's converter and
loader, transformers' configuration classes.
"""

import math
import re
from typing import Any

import torch

from halfbyte.errors import UsageError
from halfbyte.models.gguf_file import GgufFile

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")
PERMUTED = ("llama",)
"""Architectures whose q and k rows llama.cpp reorders, because its RoPE rotates neighbouring pairs."""
PLUS_ONE = ("gemma", "gemma2", "gemma3")
"""Architectures whose norm weights are stored with 1 added."""
WRITTEN_AS = {"mistral": "llama", "gemma3_text": "gemma3"}
"""Families (`spec.FAMILIES`) whose architecture in a GGUF file has another name."""
NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# No dimension of a real model comes near.
_MOST, _MOST_LAYERS = 1 << 24, 4096
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")


def hugging_face_name(architecture: str, name: str) -> str | None:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`; None for a tensor that the family has not."""
    match = _BLOCK_NAME.fullmatch(name)
    if match is None:
        stem, _, suffix = name.rpartition(".")
        return f"{_TOP[stem]}.{suffix}" if stem in _TOP else None
    part = _parts(architecture).get(match[2])
    return None if part is None else f"model.layers.{match[1]}.{part}.{match[3]}"


def gguf_name(architecture: str, name: str) -> str | None:
    """`model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`: `hugging_face_name` the other way round."""
    stem, _, suffix = name.rpartition(".")
    tops = {ours: theirs for theirs, ours in _TOP.items()}
    if stem in tops:
        return f"{tops[stem]}.{suffix}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if match is None or suffix not in ("weight", "bias"):
        return None
    part = {ours: theirs for theirs, ours in _parts(architecture).items()}.get(match[2])
    return None if part is None else f"blk.{match[1]}.{part}.{suffix}"


def _parts(architecture: str) -> dict[str, str]:
    """GGUF's names of a block's parts -> Hugging Face's, for one architecture."""
    table = _BLOCK | (_SANDWICH if architecture in ("gemma2", "gemma3") else {})
    return table | ({"ffn_up": "mlp.gate_up_proj"} if architecture == "phi3" else {})


def config_from_gguf(file: GgufFile, rope_tensor: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The config that transformers would have written for this model.

    rope_tensor: those of NOT_WEIGHTS that the file has, float32.
    """
    architecture = file.need("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UsageError(
            f"{file.path} holds a model of architecture {architecture!r}; GGUF files of {', '.join(ARCHITECTURES)} "
            "can be read. Use the model's Hugging Face folder instead"
        )
    if isinstance(parts := file.get("split.count", 0), int) and parts > 1:
        raise UsageError(
            f"{file.path} is one of {parts} parts: join them with llama.cpp's `llama-gguf-split --merge` and give that"
        )
    if file.get(f"{architecture}.expert_count", 0):
        raise UsageError(
            f"{file.path} is a mixture of experts, which is not read from GGUF: use the model's Hugging Face folder"
        )
    keys = _Keys(file, architecture)
    config = _common(keys)
    config |= _FAMILY[architecture](keys, config)
    rope = config.pop("rope")
    _scale_rope(keys, rope, rope_tensor, config)
    if architecture == "gemma3":
        config["rope_parameters"] = {
            "full_attention": rope,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": keys.number("rope.freq_base_swa", 10000.0),
            },
        }
    else:
        config["rope_parameters"] = rope
    return config


class _Keys:
    """The architecture's own metadata keys, without their prefix."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.get(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        return self.file.need(f"{self.architecture}.{key}")

    def size(self, key: str, default: int | None = None, most: int = _MOST) -> int:
        """A whole number, or an array with the same one for each layer. `default` where there is none, or 0."""
        full = f"{self.architecture}.{key}"
        values = self.file.array(full)
        if len(set(values)) > 1:
            raise UsageError(f"{self.file.path}: {full} differs from layer to layer, which the decoder does not serve")
        value = values[0] if values else self.get(key) or default
        if value is None:
            value = self.need(key)
        if type(value) is not int or not 0 < value <= most:
            raise UsageError(f"{self.file.path}: {full} is {value!r}, and should be a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.need(key) if default is None else self.get(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            full = f"{self.architecture}.{key}"
            raise UsageError(f"{self.file.path}: {full} is {value!r}, and should be a number above 0")
        return float(value)

    def token_id(self, name: str) -> int | None:
        value = self.file.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and type(value) is not int:
            raise UsageError(f"{self.file.path}: tokenizer.ggml.{name}_token_id is {value!r}, and should be a number")
        return value


def _common(keys: _Keys) -> dict[str, Any]:
    file = keys.file
    heads, hidden = keys.size("attention.head_count"), keys.size("embedding_length")
    tokens = len(file.array("tokenizer.ggml.tokens")) or keys.size("vocab_size")
    embedding = file.tensors.get("token_embd.weight")
    config: dict[str, Any] = {
        "vocab_size": embedding.shape[0] if embedding and len(embedding.shape) == 2 else tokens,
        "hidden_size": hidden,
        "intermediate_size": keys.size("feed_forward_length"),
        "num_hidden_layers": keys.size("block_count", most=_MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.size("attention.head_count_kv", heads),
        "head_dim": keys.size("attention.key_length", max(1, hidden // heads)),
        "max_position_embeddings": keys.size("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope": {"rope_type": "default", "rope_theta": keys.number("rope.freq_base", 10000.0)},
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = keys.token_id(key)
    return config


def _llama(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    tensors = keys.file.tensors
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }


def _qwen2(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "use_sliding_window": False,
    }


def _qwen3(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in keys.file.tensors,
        "use_sliding_window": False,
    }


def _phi3(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    rotated = keys.size("rope.dimension_count", config["head_dim"])
    original = keys.size("rope.scaling.original_context_length", config["max_position_embeddings"])
    return {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "hidden_act": "silu",
        "sliding_window": keys.get("attention.sliding_window") or None,  # llama.cpp's converter writes 0 for none
        "original_max_position_embeddings": original,
        "rope": config["rope"] | {"partial_rotary_factor": rotated / config["head_dim"]},
    }


def _gemma(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "gemma",
        "architectures": ["GemmaForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }


def _gemma2(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    return {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(config, largest_layers=46),
        "sliding_window": keys.get("attention.sliding_window", 4096),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0),
        "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)],
    }


def _gemma3(keys: _Keys, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    pattern = keys.file.array(f"{keys.architecture}.attention.sliding_window_pattern")
    slides = [bool(value) for value in pattern]
    if not slides:
        period = keys.size("attention.sliding_window_pattern", 6)
        slides = [bool((i + 1) % period) for i in range(layers)]
    if len(slides) != layers:
        raise UsageError(f"{keys.file.path}: the sliding-window pattern has {len(slides)} entries for {layers} layers")
    return {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": _query_scalar(config, largest_layers=62),
        "sliding_window": keys.get("attention.sliding_window", 4096),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
    }


_FAMILY = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}


def _query_scalar(config: dict[str, Any], largest_layers: int) -> int:
    """Gemma scales queries by head_dim^-1/2, its 27B models by (hidden / heads)^-1/2.

    GGUF does not say; llama.cpp knows the 27B models by their number of layers.
    """
    if config["num_hidden_layers"] == largest_layers:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config["head_dim"])


def _scale_rope(keys: _Keys, rope: dict[str, Any], tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Fill in RoPE scaling from the metadata, Llama 3.1's `rope_freqs` or Phi-3's factor tensors."""
    kind = keys.get("rope.scaling.type", "none")
    original = keys.get("rope.scaling.original_context_length")
    long, short = (tensors.get(f"rope_factors_{length}.weight") for length in ("long", "short"))
    if "rope_freqs.weight" in tensors:
        rope |= _llama3_scaling(keys, tensors["rope_freqs.weight"], rope["rope_theta"], config["head_dim"])
    elif long is not None and short is not None:
        rope |= {
            "rope_type": "longrope",
            "long_factor": long.flatten().tolist(),
            "short_factor": short.flatten().tolist(),
            "original_max_position_embeddings": config.get("original_max_position_embeddings", original),
        }
    elif kind == "linear":
        rope |= {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    elif kind == "yarn":
        rope |= {"rope_type": "yarn", "factor": keys.number("rope.scaling.factor")}
        if original:
            rope["original_max_position_embeddings"] = original
        if (attention := keys.get("rope.scaling.attn_factor")) is not None:  # times llama.cpp's own
            rope["attention_factor"] = float(attention) * (0.1 * math.log(rope["factor"]) + 1)
        for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if keys.get(f"rope.scaling.{theirs}") is not None:
                rope[ours] = keys.number(f"rope.scaling.{theirs}")
    elif kind not in ("none", "longrope"):
        raise UsageError(f"{keys.file.path}: RoPE scaling {kind!r} cannot be read; use the Hugging Face folder")


def _llama3_scaling(keys: _Keys, factors: torch.Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """Recover Llama 3.1's scaling from the per-frequency divisors that llama.cpp stores.

    Its converter writes, for wavelength w: 1 below original / high_freq_factor, `factor` above original /
    low_freq_factor, and in between 1 / ((1 - s) / factor + s) with s = (original / w - low) / (high - low).
    The published models all use low 1, high 4 and original 8,192; other values are refused, not guessed.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = float(factors.max())
    count = factors.numel()
    if factors.ndim != 1 or count * 2 > head_dim:
        raise UsageError(f"{keys.file.path}: rope_freqs {list(factors.shape)} is not for heads of {head_dim} features")
    wavelength = 2 * math.pi * theta ** (torch.arange(count, dtype=torch.float64) * 2 / head_dim)
    smooth = (original / wavelength - low) / (high - low)
    middle = 1 / ((1 - smooth) / factor + smooth)
    expected = torch.where(wavelength > original / low, factor, torch.where(wavelength < original / high, 1.0, middle))
    if not torch.allclose(factors.double(), expected, rtol=1e-4):
        raise UsageError(
            f"{keys.file.path}: its rope_freqs are not Llama 3.1's (original context 8192, frequency factors 1 and 4): "
            "use the Hugging Face folder, whose config.json states the scaling"
        )
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
