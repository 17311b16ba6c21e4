"""A tiny decoder with random weights, dense or quantized."""

import torch
from torch import Tensor

from halfbyte.models.decoder import Decoder
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import DenseWeight, QuantOptions, Weight, quantize

CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny(format: str = "fp32", seed: int = 0) -> Decoder:
    spec = ModelSpec.from_config(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) / 8 for name, shape in spec.tensors()}

    def weight(name: str, quantizable: bool) -> Weight:
        if format == "nf4" and quantizable:
            return quantize(values[name], QuantOptions())
        return DenseWeight(values[name])

    def tensor(name: str) -> Tensor:
        return values[name] + 1 if "norm" in name else values[name]

    return Decoder.build(spec, weight, tensor)
