"""Tiny random models of every family that the decoder must serve, made by transformers, and the reference they give.

Sizes are chosen to be awkward: head counts that are not powers of two, widths that no block size divides, windows
and RoPE limits shorter than the test's sequences, so that every switch of a configuration changes the numbers.
Norms, biases and embeddings are random too: a one or a zero would hide a missing or a doubled factor.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig, PreTrainedModel

from halfbyte.batch import IGNORE, Batch

VOCAB = 133
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 60,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**BASE, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 10_000.0, **values}


def _factors(n: int, low: float, high: float) -> list[float]:
    return [low + (high - low) * i / (n - 1) for i in range(n)]


LLAMA3_SCALING = _rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
) | {"rope_theta": 500_000.0}
# Phi-3's partial rotary embedding covers 8 of 10 dimensions of a head here: 4 frequencies.
LONGROPE = _rope(
    "longrope",
    short_factor=_factors(4, 1.0, 1.6),
    long_factor=_factors(4, 1.2, 6.0),
    original_max_position_embeddings=48,
    partial_rotary_factor=0.8,
)

# family name -> (transformers' configuration class, its arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama1-mha": ("LlamaConfig", {**BASE, "num_key_value_heads": 6, "rms_norm_eps": 1e-6}),
    "llama2-mha-tied": ("LlamaConfig", {**BASE, "num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama3-gqa": ("LlamaConfig", {**BASE, "rope_parameters": LLAMA3_SCALING}),
    "llama3-head-dim": ("LlamaConfig", {**BASE, "head_dim": 16, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "llama-biases": ("LlamaConfig", {**BASE, "attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("LlamaConfig", {**BASE, "hidden_act": "gelu_pytorch_tanh"}),
    "codellama": ("LlamaConfig", {**BASE, "rope_parameters": _rope("default") | {"rope_theta": 1e6}}),
    "llama-linear": ("LlamaConfig", {**BASE, "rope_parameters": _rope("linear", factor=4.0)}),
    "llama-dynamic": (
        "LlamaConfig",
        {**BASE, "max_position_embeddings": 32, "rope_parameters": _rope("dynamic", factor=2.0)},
    ),
    "llama-yarn": (
        "LlamaConfig",
        {**BASE, "rope_parameters": _rope("yarn", factor=4.0, original_max_position_embeddings=64)},
    ),
    "llama-yarn-mscale": (
        "LlamaConfig",
        {
            **BASE,
            "rope_parameters": _rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                beta_fast=24.0,
                beta_slow=2.0,
                mscale=0.7,
                mscale_all_dim=1.3,
                truncate=False,
            ),
        },
    ),
    "mistral-sliding": ("MistralConfig", {**BASE, "sliding_window": 8}),
    "mistral-full": ("MistralConfig", {**BASE, "sliding_window": None, "head_dim": 14}),
    "phi3": ("Phi3Config", {**BASE, "sliding_window": None}),
    "phi3-sliding": ("Phi3Config", {**BASE, "sliding_window": 11}),
    # Sequences of the test (up to 53 tokens) fall on both sides of the 48 tokens where the long factors begin.
    "phi3-longrope": ("Phi3Config", {**BASE, "original_max_position_embeddings": 48, "rope_parameters": LONGROPE}),
    "gemma1": ("GemmaConfig", {**BASE, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "gemma1-mqa-biases": (
        "GemmaConfig",
        {**BASE, "head_dim": 24, "num_key_value_heads": 1, "attention_bias": True},
    ),
    "gemma2": (
        "Gemma2Config",
        {
            **GEMMA,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma2-no-caps": (
        "Gemma2Config",
        {**GEMMA, "sliding_window": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "sliding_window": 8,
            "query_pre_attn_scalar": 20,
            "rope_parameters": {
                "sliding_attention": _rope("default"),
                "full_attention": _rope("linear", factor=8.0) | {"rope_theta": 1e6},
            },
        },
    ),
    "gemma3-small": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 6, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", {**BASE, "rope_parameters": _rope("default") | {"rope_theta": 1e6}}),
    "qwen2-tied": ("Qwen2Config", {**BASE, "tie_word_embeddings": True}),
    "qwen2-sliding": (
        "Qwen2Config",
        {**BASE, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2-yarn": (
        "Qwen2Config",
        {**BASE, "rope_parameters": _rope("yarn", factor=4.0, original_max_position_embeddings=32)},
    ),
    "qwen3": ("Qwen3Config", {**BASE, "head_dim": 16, "rope_parameters": _rope("default") | {"rope_theta": 1e6}}),
    "qwen3-tied-bias": ("Qwen3Config", {**BASE, "head_dim": 12, "attention_bias": True, "tie_word_embeddings": True}),
}
# RoPE whose frequencies depend on how long the sequence has become: transformers rotates what is in the key-value
# cache with one set and what follows with another, so that its own cached logits differ from its uncached ones.
LENGTH_DEPENDENT_ROPE = {"llama-dynamic", "phi3-longrope"}


def config(name: str) -> PretrainedConfig:
    """A fresh configuration of the family `name`."""
    kind, arguments = FAMILIES[name]
    made: PretrainedConfig = getattr(transformers, kind)(**arguments)
    return made


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Give every parameter random values of a scale at which the model computes something: activations near one."""
    generator = torch.Generator().manual_seed(seed)
    heads = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    seen: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            values = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in heads:
                values *= 1.5 / parameter.shape[1] ** 0.5
            elif parameter.dim() >= 2:
                values *= 1.3 / parameter.shape[-1] ** 0.5
            elif name.endswith("bias"):
                values *= 0.2
            else:  # a norm: Gemma adds one to it, the others do not
                values = 0.3 * values + (0.0 if "gemma" in model.config.model_type else 1.0)
            parameter.copy_(values)


def make_model(made: PretrainedConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """transformers' own model of a configuration, eager attention, evaluation mode, random in every parameter."""
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32)
    randomize(model, seed)
    return model.to(dtype).eval()


class Float64(TorchFunctionMode):
    """Computes in float64 where transformers casts to float32 (norms, softmax, RoPE's angles).

    A model in double() still rounds at those places; with this mode around both the construction and the
    run it becomes a reference whose error is negligible beside float32's.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widen(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        if func is Tensor.type_as and args[1].dtype is torch.float32:
            return args[0].double()
        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})


@contextmanager
def float64() -> Iterator[None]:
    """Everything in float64: default dtype, explicit casts, RoPE."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            yield
    finally:
        torch.set_default_dtype(before)


def make_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that computes in float64; run it inside `float64()`."""
    with float64():
        copy = transformers.AutoModelForCausalLM.from_config(
            type(model.config).from_dict(model.config.to_dict()), attn_implementation="eager", dtype=torch.float64
        ).double()
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.copy_(values[name])
    return copy.eval()


def make_batch(lengths: tuple[int, ...], vocab: int = VOCAB, seed: int = 0) -> Batch:
    """Documents of random tokens end to end; about a third of the targets carry no loss."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(3, vocab, (total,), generator=generator)
    targets = torch.cat([ids[1:], torch.tensor([IGNORE])])
    targets[torch.rand(total, generator=generator) < 0.3] = IGNORE
    ends = torch.tensor(lengths).cumsum(0) - 1
    targets[ends] = IGNORE
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(ids, positions, targets, lengths)


@dataclass
class Reference:
    """What transformers computes for a batch, one document at a time."""

    logits: Tensor  # [T, vocab]
    loss: Tensor  # the sum over supervised tokens
    gradients: dict[str, Tensor]  # by parameter name; of what requires a gradient


def reference(model: PreTrainedModel, batch: Batch, trainable: Callable[[str], bool] = lambda _: True) -> Reference:
    """Run a transformers (or PEFT) model over the batch's documents, apart from each other, and sum the losses."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable(name))
        parameter.grad = None
    pieces = []
    for ids in batch.input_ids.split(batch.lengths):
        pieces.append(model(input_ids=ids[None], use_cache=False).logits[0])
    logits = torch.cat(pieces)
    loss = torch.nn.functional.cross_entropy(logits, batch.targets, ignore_index=IGNORE, reduction="sum")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return Reference(logits.detach(), loss.detach(), gradients)


def error(ours: Tensor, exact: Tensor) -> float:
    """The largest difference, in units of the exact values' root mean square."""
    exact = exact.double()
    return float((ours.double() - exact).abs().max() / exact.pow(2).mean().sqrt().clamp_min(1e-30))
