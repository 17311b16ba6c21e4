"""A model's shape and switches as a GGUF file's metadata: what llama.cpp's converter writes for it.

llama.cpp keeps some of a family's facts in its own code. A model that differs there computes something else in
llama.cpp, so it is refused here; where it differs only beyond some length, `limits` says so.

Sources: llama.cpp's conversion/*.py and src/models/*.cpp.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.export.gguf_container import Fields, float32, string, uint32
from halfbyte.export.gguf_names import architecture_of
from halfbyte.models.rope import frequencies
from halfbyte.models.spec import ModelSpec, RopeSpec

_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""llama.cpp knows Gemma's 27B models by their layers; they scale queries by (hidden / heads)^-1/2."""
_ROPE_KINDS = {
    "llama": ("default", "linear", "dynamic", "yarn", "llama3"),
    "qwen2": ("default", "linear", "dynamic", "yarn"),
    "qwen3": ("default", "linear", "dynamic", "yarn"),
    "phi3": ("default", "longrope"),
    "gemma": ("default", "linear"),
    "gemma2": ("default", "linear"),
    "gemma3": ("default", "linear"),
}
_GEMMA3_PERIOD = 6


def metadata(spec: ModelSpec) -> Fields:
    """The architecture's own keys. UsageError for a model that llama.cpp would compute differently."""
    architecture = architecture_of(spec)
    check_expressible(spec)
    keys: Fields = {
        "context_length": uint32(spec.max_position),
        "embedding_length": uint32(spec.hidden_size),
        "block_count": uint32(spec.num_layers),
        "feed_forward_length": uint32(spec.intermediate_size),
        "attention.head_count": uint32(spec.num_heads),
        "attention.head_count_kv": uint32(spec.num_kv_heads),
        "attention.key_length": uint32(spec.head_dim),
        "attention.value_length": uint32(spec.head_dim),
        "attention.layer_norm_rms_epsilon": float32(spec.norm_eps),
        "vocab_size": uint32(spec.vocab_size),
        "rope.dimension_count": uint32(spec.rope.dim),
        "rope.freq_base": float32(spec.rope.theta),
    }
    keys |= _rope(spec.rope)
    window = max((window or 0 for window in spec.windows), default=0)
    if architecture == "phi3":
        keys["attention.sliding_window"] = uint32(window)
        if spec.rope.kind == "default":
            keys["rope.scaling.original_context_length"] = uint32(spec.max_position)
    if architecture in ("gemma2", "gemma3"):
        keys["attention.sliding_window"] = uint32(window)
    if spec.local_rope is not None:
        keys["rope.freq_base_swa"] = float32(spec.local_rope.theta)
        if (period := _period(spec)) != _GEMMA3_PERIOD:
            keys["attention.sliding_window_pattern"] = uint32(period)
    if spec.attention_softcap is not None:
        keys["attn_logit_softcapping"] = float32(spec.attention_softcap)
    if spec.final_softcap is not None:
        keys["final_logit_softcapping"] = float32(spec.final_softcap)
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def extra_tensors(spec: ModelSpec) -> dict[str, Tensor]:
    """Tensors that no checkpoint has: RoPE's divisors of Llama 3.1 and Phi-3, float32 [dim / 2]."""
    if spec.rope.kind == "llama3":
        plain = frequencies(RopeSpec("default", spec.rope.theta, spec.rope.dim, spec.rope.max_position), 1)[0]
        return {"rope_freqs.weight": plain / frequencies(spec.rope, 1)[0]}
    if spec.rope.kind == "longrope":
        params = spec.rope.params
        return {
            f"rope_factors_{which}.weight": torch.tensor(params[f"{which}_factor"], dtype=torch.float32)
            for which in ("long", "short")
        }
    return {}


def limits(spec: ModelSpec) -> list[str]:
    """Where llama.cpp leaves the trained model's path, in sentences for the user; [] for most models."""
    found = []
    windows = {window for window in spec.windows if window is not None and window < spec.max_position}
    if windows and architecture_of(spec) in ("llama", "qwen2", "qwen3", "phi3"):
        found.append(
            f"llama.cpp ignores this model's sliding window: texts of more than {min(windows)} tokens are computed "
            "differently than in training"
        )
    if spec.rope.kind == "dynamic":
        found.append(f"llama.cpp does not stretch RoPE beyond {spec.max_position} tokens as this model does")
    if spec.rope.kind == "longrope":
        old = spec.rope.params["original_max_position_embeddings"]
        found.append(
            f"llama.cpp chooses the long RoPE factors by its context size, not the text's length: run it with at most "
            f"{old} tokens of context (-c {old}) for texts that fit"
        )
    return found


def check_expressible(spec: ModelSpec) -> None:
    """UsageError for a switch that llama.cpp has fixed otherwise in the family's code."""
    architecture = architecture_of(spec)
    gemma = architecture.startswith("gemma")

    def refuse(what: str) -> None:
        raise UsageError(f"a GGUF file of architecture {architecture} cannot say that the model has {what}")

    if spec.activation != ("gelu_tanh" if gemma else "silu"):
        refuse(f"the activation {spec.activation}")
    if spec.rope.kind not in _ROPE_KINDS[architecture]:
        refuse(f"RoPE scaling {spec.rope.kind!r}")
    if spec.rope.kind == "yarn" and not _usual_yarn(spec.rope):
        refuse("YaRN with a ramp of its own (beta_fast, beta_slow or truncate)")
    if spec.rope.dim != spec.head_dim and architecture != "phi3":
        refuse("partial rotary embedding")
    if spec.local_rope is not None and (spec.local_rope.kind != "default" or spec.local_rope.dim != spec.head_dim):
        refuse("a scaled RoPE in its sliding layers")
    if (spec.qkv_bias and architecture not in ("llama", "qwen2")) or (spec.o_bias and architecture != "llama"):
        refuse("biases in its attention")
    if architecture == "phi3" and spec.num_heads * spec.head_dim != spec.hidden_size:
        refuse("heads that are not hidden_size wide together")
    if gemma:
        _check_gemma(spec, architecture, refuse)


def _usual_yarn(rope: RopeSpec) -> bool:
    """Whether YaRN's ramp is that of beta_fast 32 and beta_slow 1: llama.cpp reads others for few architectures."""
    usual = {key: value for key, value in rope.params.items() if key not in ("beta_fast", "beta_slow", "truncate")}
    theirs = frequencies(RopeSpec("yarn", rope.theta, rope.dim, rope.max_position, usual), 1)[0]
    return bool(torch.equal(frequencies(rope, 1)[0], theirs))


def _check_gemma(spec: ModelSpec, architecture: str, refuse: Callable[[str], None]) -> None:
    if not spec.tied and architecture != "gemma3":
        refuse("an output head of its own")
    scale: float = spec.head_dim
    if spec.num_layers == _LAYERS_OF_27B.get(architecture):
        scale = spec.hidden_size // spec.num_heads
    if not math.isclose(spec.attention_scale, float(scale) ** -0.5, rel_tol=1e-6):
        refuse(f"query_pre_attn_scalar {spec.attention_scale**-2:g} (it takes {scale} for granted)")
    if architecture == "gemma2":
        if spec.attention_softcap is None or spec.final_softcap is None:
            refuse("no soft-capping")
        if [w is None for w in spec.windows] != [bool(i % 2) for i in range(spec.num_layers)]:
            refuse("other layers sliding than every other one")
    if architecture == "gemma3":
        if spec.attention_softcap is not None:
            refuse("attention soft-capping")
        if all(window is None for window in spec.windows):
            refuse("no sliding window")
        if _period(spec) == 0:
            refuse("sliding layers in no regular pattern")


def _period(spec: ModelSpec) -> int:
    """Every how many layers one sees everything; 0: no such number."""
    full = [window is None for window in spec.windows]
    periods: list[int] = [_GEMMA3_PERIOD, *range(2, len(full) + 2)]
    for period in periods:
        if full == [(i + 1) % period == 0 for i in range(len(full))]:
            return period
    return 0


def _rope(rope: RopeSpec) -> Fields:
    p = rope.params
    if rope.kind == "linear":
        return {"rope.scaling.type": string("linear"), "rope.scaling.factor": float32(p["factor"])}
    if rope.kind == "longrope":
        return {
            "rope.scaling.original_context_length": uint32(p["original_max_position_embeddings"]),
            "rope.scaling.attn_factor": float32(frequencies(rope, 1)[1]),
        }
    if rope.kind != "yarn":
        return {}
    keys = {
        "rope.scaling.type": string("yarn"),
        "rope.scaling.factor": float32(p["factor"]),
        "rope.scaling.original_context_length": uint32(p["original_max_position_embeddings"]),
    }
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if p.get(ours) is not None:
            keys[f"rope.scaling.{theirs}"] = float32(p[ours])
    own = 0.1 * math.log(p["factor"]) + 1 if p["factor"] > 1 else 1.0  # llama.cpp's, on which attn_factor comes
    attention = frequencies(rope, 1)[1]
    if not math.isclose(attention, own, rel_tol=1e-6):
        keys["rope.scaling.attn_factor"] = float32(attention / own)
    return keys
