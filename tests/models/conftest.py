"""Builds our decoder from a transformers model's weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.linear import segments
from halfbyte.models.decoder import Decoder, Norm
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import DenseWeight, Weight


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build_decoder(model: Any, dtype: torch.dtype = torch.float32, trainable: bool = False) -> Decoder:
    """Our decoder with the weights of `model`, transformers' own; `trainable` makes every tensor a parameter."""
    state = {name: value.detach().to(dtype) for name, value in model.state_dict().items()}

    def weight(name: str, _quantizable: bool) -> Weight:
        return DenseWeight(state[name].clone(), trainable=trainable)

    decoder = Decoder.build(ModelSpec.from_config(model.config.to_dict()), weight, lambda name: state[name], dtype)
    if trainable:
        for parameter in trained(decoder).values():
            parameter.requires_grad_(True)
    return decoder


def trained(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Every parameter of the decoder's base model by its Hugging Face name."""
    found: dict[str, Any] = {"model.embed_tokens.weight": decoder.embed.trainable_tensor()}
    if not decoder.spec.tied:
        found["lm_head.weight"] = decoder.head.trainable_tensor()
    for name, segment in segments(decoder).items():
        found[f"{name}.weight"] = segment.weight.trainable_tensor()
        if segment.bias is not None:
            found[f"{name}.bias"] = segment.bias
    for module in decoder.modules():
        if isinstance(module, Norm):
            found[f"{module.name}.weight"] = module.weight
    return found


def gradients(found: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in found.items() if parameter.grad is not None}


Build = Callable[..., Decoder]
