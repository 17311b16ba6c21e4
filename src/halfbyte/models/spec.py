"""What a decoder-only model is, from its config.json: shapes and switches, arithmetic only.

`ModelSpec` configures the one decoder (`models.decoder`), names every tensor as Hugging Face does, and is all
that the planner ever sees of a model. No weights, no torch. The families differ in a dozen switches:

    family    switches beside the common Llama shape
    llama     attention_bias, mlp_bias; RoPE scaling linear, dynamic, yarn, llama3
    mistral   one sliding window for all layers
    phi3      fused qkv_proj and gate_up_proj, partial rotary, longrope
    qwen2     biases on q, k, v; a sliding window from a given layer on
    qwen3     norms over each query and key head
    gemma     tanh-GELU, norm weights stored minus one, embeddings scaled by sqrt(hidden)
    gemma2    + norms after each block, soft-capping, every other layer sliding
    gemma3    + query-key norms, five sliding layers to one full, a RoPE of their own for the sliding ones
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.errors import UsageError

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""model_type values that the decoder serves; `gemma3` (the multimodal wrapper) is read through its text_config."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of one kind of layer.

    kind    default | linear | dynamic | yarn | llama3 | longrope
    dim     rotated features of a head (head_dim times the partial factor)
    params  the kind's own numbers, as in config.json's rope_parameters
    """

    kind: str
    theta: float
    dim: int
    max_position: int
    params: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class LinearSpec:
    """One linear: its Hugging Face name (without .weight), shape, whether it has a bias, and the group it is in."""

    name: str
    out_features: int
    in_features: int
    bias: bool
    layer: int
    group: str

    @property
    def parameters(self) -> int:
        return self.out_features * self.in_features


@dataclass(frozen=True)
class ModelSpec:
    """The shapes and switches of a decoder-only model. Sizes count elements, not bytes."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    activation: str  # "silu" | "gelu_tanh" | "gelu"
    tied: bool
    rope: RopeSpec
    local_rope: RopeSpec | None  # Gemma 3's sliding layers; None: every layer uses `rope`
    windows: tuple[int | None, ...]  # per layer: keys seen, itself included; None: all before
    attention_scale: float
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embed_scale: float | None = None
    norm_plus_one: bool = False
    sandwich_norms: bool = False
    qk_norm: bool = False
    fused: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelSpec":
        """Read a config.json. UsageError if the family is unknown, a key is missing or a shape is absurd."""
        return _read(config)

    @staticmethod
    def serves(config: Mapping[str, Any]) -> bool:
        """Whether the decoder serves this config.json (else the fallback does)."""
        return _family(config) in FAMILIES

    def rope_of(self, layer: int) -> RopeSpec:
        return self.rope if self.local_rope is None or self.windows[layer] is None else self.local_rope

    # -- the tensors, by name -------------------------------------------------------------------------------------

    def linears(self) -> list[LinearSpec]:
        """Every linear but the output head: what `all-linear` means, in forward order."""
        return [linear for layer in range(self.num_layers) for linear in self.layer_linears(layer)]

    def layer_linears(self, layer: int) -> list[LinearSpec]:
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        d, i = self.hidden_size, self.intermediate_size

        def linear(name: str, out: int, width: int, bias: bool, group: str) -> LinearSpec:
            return LinearSpec(name, out, width, bias, layer, group)

        if self.fused:
            qkv = [linear(attention + "qkv_proj", q + 2 * kv, d, self.qkv_bias, "qkv")]
            gate_up = [linear(mlp + "gate_up_proj", 2 * i, d, self.mlp_bias, "gate_up")]
        else:
            sizes = (("q_proj", q), ("k_proj", kv), ("v_proj", kv))
            qkv = [linear(attention + name, size, d, self.qkv_bias, "qkv") for name, size in sizes]
            gate_up = [linear(mlp + name, i, d, self.mlp_bias, "gate_up") for name in ("gate_proj", "up_proj")]
        return [
            *qkv,
            linear(attention + "o_proj", d, q, self.o_bias, "o"),
            *gate_up,
            linear(mlp + "down_proj", d, i, self.mlp_bias, "down"),
        ]

    def norms(self) -> list[tuple[str, int]]:
        """(name, width) of every normalisation weight."""
        names = ["input_layernorm", "post_attention_layernorm"]
        if self.sandwich_norms:
            names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        out: list[tuple[str, int]] = []
        for layer in range(self.num_layers):
            out += [(f"model.layers.{layer}.{name}", self.hidden_size) for name in names]
            if self.qk_norm:
                out += [(f"model.layers.{layer}.self_attn.{n}", self.head_dim) for n in ("q_norm", "k_norm")]
        return [*out, ("model.norm", self.hidden_size)]

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor of the checkpoint; a tied head has none of its own."""
        yield "model.embed_tokens.weight", (self.vocab_size, self.hidden_size)
        for linear in self.linears():
            yield f"{linear.name}.weight", (linear.out_features, linear.in_features)
            if linear.bias:
                yield f"{linear.name}.bias", (linear.out_features,)
        for name, width in self.norms():
            yield f"{name}.weight", (width,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab_size, self.hidden_size)

    def without_head(self) -> "ModelSpec":
        """The same body for a classifier: a tied head is one that the files need not have."""
        return replace(self, tied=True)

    # -- counts ---------------------------------------------------------------------------------------------------

    @property
    def linear_parameters(self) -> int:
        """Weights of all linears but the head: what a quantized base quantizes."""
        return sum(linear.parameters for linear in self.linears())

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def total_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied with in a forward pass: the linears and the head."""
        return self.linear_parameters + self.head_parameters


def _family(config: Mapping[str, Any]) -> str:
    family = str(config.get("model_type", ""))
    return "gemma3_text" if family == "gemma3" and "text_config" in config else family


# No dimension of a real model comes near; a hostile config must not make us allocate.
_LIMIT, _MOST_LAYERS, _HUGE = 1 << 24, 4096, 1e18


class _Config:
    """config.json with the defaults of its family and errors that name the key."""

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.config, self.defaults = config, defaults

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return self.defaults.get(key, default) if value is None else value

    def get_or_null(self, key: str) -> Any:
        """As `get`, but an explicit null in the file switches the thing off instead of asking for the default."""
        return self.config[key] if key in self.config else self.defaults.get(key)

    def size(self, key: str, default: int | None = None, most: int = _LIMIT) -> int:
        value = self.get(key, default)
        if value is None:
            raise UsageError(f"config.json has no {key}: the file is incomplete or of another kind of model")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            raise UsageError(f"config.json: {key} is {value!r}, and should be a whole number from 1 to {most}")
        return value

    def size_or_null(self, key: str) -> int | None:
        return None if self.get_or_null(key) is None else self.size(key)

    def number(self, key: str) -> float:
        return _number(key, self.get(key))

    def number_or_null(self, key: str) -> float | None:
        value = self.get_or_null(key)
        return None if value is None else _number(key, value)

    def object(self, key: str) -> dict[str, Any]:
        value = self.get(key) or {}
        if not isinstance(value, Mapping):
            raise UsageError(f"config.json: {key} is {value!r}, and should be an object")
        return dict(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.get(key)
        ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
        if not all(type(index) is int for index in ids):
            raise UsageError(f"config.json: {key} is {value!r}, and should be a token's number")
        return tuple(ids)


def _number(key: str, value: Any) -> float:
    """A positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _HUGE:
        raise UsageError(f"config.json: {key} is {value!r}, and should be a number above 0")
    return float(value)


# transformers' own defaults, for keys that a config.json may leave out.
_GEMMA = {"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    "mistral": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "phi3": {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "head_dim": 128,
    },
    "gemma": {**_GEMMA, "max_position_embeddings": 8192},
    "gemma2": {
        **_GEMMA,
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": {
        **_GEMMA,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    family = _family(config)
    if family not in FAMILIES:
        raise UsageError(
            f"config.json: model_type {config.get('model_type')!r} is not one that the decoder serves "
            f"({', '.join(FAMILIES)})"
        )
    if "text_config" in config:
        inner = _Config(config, {}).object("text_config")
        config = {**{k: v for k, v in config.items() if k != "text_config"}, **inner}
    c = _Config(config, _DEFAULTS[family])
    hidden, heads = c.size("hidden_size"), c.size("num_attention_heads")
    layers = c.size("num_hidden_layers", most=_MOST_LAYERS)
    kv_heads = c.size("num_key_value_heads", heads)
    head_dim = c.size("head_dim", hidden // heads if hidden >= heads else None)
    if heads % kv_heads:
        raise UsageError(f"config.json: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
    gemma = family.startswith("gemma")
    capped = family in ("gemma2", "gemma3_text")
    scalar = c.number("query_pre_attn_scalar") if capped else float(head_dim)
    rope, local_rope = _ropes(family, c, head_dim)
    attention_bias = bool(c.get("attention_bias", False))
    if bool(c.get("use_bidirectional_attention", False)):
        raise UsageError("config.json: use_bidirectional_attention is an encoder's switch; halfbyte trains decoders")
    return ModelSpec(
        family=family,
        vocab_size=c.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=c.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=c.size("max_position_embeddings"),
        norm_eps=c.number("rms_norm_eps"),
        activation=_activation(family, c),
        tied=bool(c.get("tie_word_embeddings", False)),
        rope=rope,
        local_rope=local_rope,
        windows=_windows(family, c, layers),
        attention_scale=scalar**-0.5,
        attention_softcap=c.number_or_null("attn_logit_softcapping") if capped else None,
        final_softcap=c.number_or_null("final_logit_softcapping") if capped else None,
        embed_scale=math.sqrt(hidden) if gemma else None,
        norm_plus_one=gemma,
        sandwich_norms=capped,
        qk_norm=family in ("qwen3", "gemma3_text"),
        fused=family == "phi3",
        qkv_bias=True if family == "qwen2" else attention_bias and family not in ("mistral", "phi3"),
        o_bias=attention_bias and family not in ("mistral", "phi3", "qwen2"),
        mlp_bias=bool(c.get("mlp_bias", False)) and family == "llama",
        bos_token_id=next(iter(c.token_ids("bos_token_id")), None),
        eos_token_ids=c.token_ids("eos_token_id"),
        pad_token_id=next(iter(c.token_ids("pad_token_id")), None),
    )


def _activation(family: str, c: _Config) -> str:
    name = c.get("hidden_activation") if family in ("gemma2", "gemma3_text") else None
    name = name or c.get("hidden_act", "silu")
    if family.startswith("gemma") and name == "gelu":
        name = "gelu_pytorch_tanh"  # a legacy value of the official files, meant as the tanh form
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise UsageError(f"config.json: hidden_act {name!r} is not one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]


def _windows(family: str, c: _Config, layers: int) -> tuple[int | None, ...]:
    """The window of each layer, in tokens, the token itself included."""
    window = c.size_or_null("sliding_window")
    types = c.get("layer_types")
    if family in ("mistral", "phi3"):
        types = ["sliding_attention"] * layers
    elif family in ("qwen2", "qwen3"):
        window = window if c.get("use_sliding_window", False) else None
        first = c.get("max_window_layers")
        if type(first) is not int:
            raise UsageError(f"config.json: max_window_layers is {first!r}, and should be a whole number")
        types = types or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    elif family in ("gemma2", "gemma3_text"):
        name = "sliding_window_pattern" if c.get("sliding_window_pattern") is not None else "_sliding_window_pattern"
        period = 2 if family == "gemma2" else c.size(name, 6)
        types = types or ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)]
    else:
        types = ["full_attention"] * layers
    if not isinstance(types, list) or len(types) != layers:
        count = len(types) if isinstance(types, list) else "no"
        raise UsageError(f"config.json: layer_types has {count} entries for {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _ropes(family: str, c: _Config, head_dim: int) -> tuple[RopeSpec, RopeSpec | None]:
    """(global rope, rope of sliding layers or None) from either spelling of config.json.

    transformers 5 writes `rope_parameters` (for Gemma 3 one per layer type), 4 wrote `rope_theta`,
    `rope_scaling` and `rope_local_base_freq`.
    """
    params, scaling = c.object("rope_parameters"), c.object("rope_scaling")
    if family == "gemma3_text":
        if "full_attention" in params:
            nested = _Config(params, {})
            full, local = nested.object("full_attention"), nested.object("sliding_attention")
        else:
            full = {"rope_theta": c.get("rope_theta", 1e6), **scaling, **params}
            local = {"rope_theta": c.get("rope_local_base_freq", 1e4)}
        return _rope(c, {"rope_theta": 1e6, **full}, head_dim), _rope(c, {"rope_theta": 1e4, **local}, head_dim)
    merged = {"rope_theta": c.get("rope_theta", 1e4), "partial_rotary_factor": c.get("partial_rotary_factor", 1.0)}
    return _rope(c, {**merged, **scaling, **params}, head_dim), None


_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}

_ROPE_NUMBERS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)


def _rope(c: _Config, params: dict[str, Any], head_dim: int) -> RopeSpec:
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    kind = {"su": "longrope", "mrope": "default"}.get(str(kind), str(kind))
    if kind not in _ROPE_NEEDS:
        raise UsageError(f"config.json: RoPE scaling {kind!r} is not one of {', '.join(_ROPE_NEEDS)}")
    for key in _ROPE_NEEDS[kind]:
        if params.get(key) is None:
            raise UsageError(f"config.json: RoPE scaling {kind!r} needs {key}")
    theta = _number("rope_theta", params.pop("rope_theta"))
    partial = _number("partial_rotary_factor", params.pop("partial_rotary_factor", None) or 1.0)
    max_position = c.size("max_position_embeddings")
    if kind in ("yarn", "llama3", "longrope"):
        original = c.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
        params["original_max_position_embeddings"] = original or max_position
    dim = int(head_dim * partial)
    if not 0 < dim <= head_dim or dim % 2:
        raise UsageError(
            f"config.json: RoPE cannot turn {dim} of a head's {head_dim} features: an even number is needed"
        )
    _check_rope(kind, theta, dim, params)
    return RopeSpec(kind, theta, dim, max_position, params)


def _check_rope(kind: str, theta: float, dim: int, params: Mapping[str, Any]) -> None:
    """UsageError for numbers that the formulas of `models.rope` have no result for."""
    values = {key: _number(key, params[key]) for key in _ROPE_NUMBERS if params.get(key) is not None}
    for key in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors = params[key]
        if not isinstance(factors, list) or len(factors) != dim // 2:
            count = len(factors) if isinstance(factors, list) else "no"
            raise UsageError(f"config.json: {key} has {count} factors, and should have {dim // 2}")
        for factor in factors:
            _number(key, factor)
    original = values.get("original_max_position_embeddings", 2)
    wrong = {
        "dynamic": dim <= 2,
        "yarn": theta <= 1,
        "llama3": values.get("high_freq_factor") == values.get("low_freq_factor"),
        "longrope": original <= 1,
    }
    if wrong.get(kind):
        raise UsageError(f"config.json: RoPE scaling {kind!r} cannot be computed from its numbers ({dict(params)})")
