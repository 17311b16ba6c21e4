"""What a model of another architecture is, from its config.json: what `models.spec` is for the decoder's families.

transformers' own model of that config is built without the memory of its parameters; its linears and all other tensors
are listed, and that list is handed out as a plain value. What a training step keeps, only the architecture's own code
knows: `models.foreign_trace` runs it on tensors without memory.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import UsageError
from halfbyte.models.fallback_load import coverage_of, empty_model, linears_of
from halfbyte.models.spec import LinearSpec

# Keys of config.json that say how large something is, as many architectures call it, and the most that is believed.
_SIZES = (
    "vocab_size", "hidden_size", "d_model", "n_embd", "d_kv", "d_ff", "intermediate_size", "ffn_dim", "n_inner",
    "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size", "head_dim", "n_positions", "max_position_embeddings",
    "num_attention_heads", "num_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads",
    "num_key_value_heads", "num_kv_heads",
)  # fmt: skip
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
           "num_decoder_layers")  # fmt: skip
_LARGEST, _DEEPEST = 1 << 24, 4096
_HEADS = ("lm_head.", "embed_out.", "output.")


@dataclass(frozen=True)
class ForeignSpec:
    """Shapes of a model that transformers' own code runs (`models.fallback`, `models.seq2seq`). Elements, not bytes.

    matrices   every linear but the output head, [out, in] whatever way around the file has it
    others     (name, shape) of everything else, each tensor once: embeddings, norms, biases, a head of its own
    head       the output head's tensor, or the embedding that it is tied to: (words, features)
    coverage   share of the body's parameters in `matrices`: the rest stays 16-bit and without adapters
    config     config.json, to run the model with
    """

    model_type: str
    encoder_decoder: bool
    matrices: tuple[LinearSpec, ...]
    others: tuple[tuple[str, tuple[int, ...]], ...]
    head: tuple[int, int]
    coverage: float
    config: Mapping[str, Any] = field(compare=False, repr=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ForeignSpec":
        """UsageError for an architecture that transformers does not know, or one that cannot be built as it is told."""
        return _read(config)

    @property
    def vocab_size(self) -> int:
        return self.head[0]

    @property
    def hidden_size(self) -> int:
        return self.head[1]

    def linears(self) -> list[LinearSpec]:
        """Every linear but the output head: what `all-linear` means."""
        return list(self.matrices)

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every tensor; what is tied is there once."""
        for linear in self.matrices:
            yield f"{linear.name}.weight", (linear.out_features, linear.in_features)
        yield from self.others

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return not any(shape == self.head and name.startswith(_HEADS) for name, shape in self.others)

    @property
    def linear_parameters(self) -> int:
        return sum(linear.parameters for linear in self.matrices)

    @property
    def total_parameters(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    @property
    def head_parameters(self) -> int:
        return math.prod(self.head)


def build(config: Mapping[str, Any]) -> Any:
    """transformers' model of a config on the meta device: modules and shapes, no memory. UsageError if it has none."""
    check_sizes(config)
    auto = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    with torch.device("meta"):
        return empty_model(config, torch.float32, auto)


def check_sizes(config: Mapping[str, Any]) -> None:
    """UsageError for a size that no model has: building one layer after another for a hostile number never ends."""
    for keys, most in ((_SIZES, _LARGEST), (_DEPTHS, _DEEPEST)):
        for key in keys:
            value = config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
                raise UsageError(f"config.json: {key} is {value!r}, and should be a whole number from 1 to {most}")


def _read(config: Mapping[str, Any]) -> ForeignSpec:
    model = build(config)
    found = linears_of(model)
    linears, inside = [], set()
    for name, module in found.items():
        weight = module.get_parameter("weight")
        out, width = weight.shape
        if isinstance(module, Conv1D):
            out, width = width, out
        linears.append(LinearSpec(name, int(out), int(width), module.bias is not None, _layer(name), ""))
        inside.add(id(weight))
    others = [(name, tuple(p.shape)) for name, p in model.named_parameters() if id(p) not in inside]
    head = model.get_output_embeddings()
    words, features = (int(size) for size in head.weight.shape)
    own = any(p is head.weight for p in model.get_input_embeddings().parameters())
    if own and config.get("tie_word_embeddings") is False:
        # T5 1.1 and Flan-T5: transformers 5 ties the empty model, and unties it when it reads a head of the file's own.
        others.append(("lm_head.weight", (words, features)))
    return ForeignSpec(
        model_type=str(config.get("model_type")),
        encoder_decoder=bool(config.get("is_encoder_decoder")),
        matrices=tuple(linears),
        others=tuple(others),
        head=(words, features),
        coverage=coverage_of(model, found).share,
        config=dict(config),
    )


def _layer(name: str) -> int:
    """The first number in a module's name: `decoder.block.3.layer.0` is in layer 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
