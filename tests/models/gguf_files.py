"""Writes a transformers model as a GGUF file the way llama.cpp's converter does, in any of ggml's types."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

_ARCHITECTURE = {"mistral": "llama", "gemma3_text": "gemma3"}


def architecture_of(model: PreTrainedModel) -> str:
    kind = model.config.model_type
    return _ARCHITECTURE.get(kind, kind)


def llama3_factors(config: Any) -> torch.Tensor:
    """The divisor of each rotary frequency, as the converter computes it from config.json (Llama 3.1's report)."""
    rope, dim = config.rope_parameters, config.head_dim
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    out = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(rope["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(out)


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Halves (p, p + d / 2) of each head to neighbours (2p, 2p + 1)."""
    return rows.view(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def write_metadata(writer: gguf.GGUFWriter, architecture: str, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = config.rope_parameters
    if architecture == "gemma3":
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if original := rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    ):
        writer.add_rope_scaling_orig_ctx_len(original)
    if getattr(config, "sliding_window", None) and architecture in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    vocabulary: Callable[[gguf.GGUFWriter, int], None] | None = None,
) -> None:
    """Matrices in `kind` where their rows divide into its blocks, else (and all vectors) float32.

    `vocabulary` writes the tokenizer of that many tokens; by default made-up words.
    """
    config, architecture = model.config, architecture_of(model)
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, architecture, config)
    (vocabulary or _made_up_words)(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(_arch(architecture), config.num_hidden_layers)
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config).numpy())
    if config.rope_parameters.get("rope_type") == "longrope":
        for which in ("long", "short"):
            values = np.array(config.rope_parameters[f"{which}_factor"], dtype=np.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", values)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = tensor.detach().float()
        if architecture == "llama" and ".q_proj." in name:
            value = permuted(value, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            value = permuted(value, config.num_key_value_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        stem, suffix = name.rsplit(".", 1)
        block = gguf.GGML_QUANT_SIZES[kind][0]
        own = kind if value.dim() == 2 and value.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quants.quantize(value.numpy(), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _made_up_words(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>"] + [f"t{i}" for i in range(size - 3)]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _arch(architecture: str) -> gguf.MODEL_ARCH:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
