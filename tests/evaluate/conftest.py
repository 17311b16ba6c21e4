"""A tiny random model of either kind with a byte-level tokenizer, and transformers' own model of the same weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from halfbyte.models.decoder import Decoder
from halfbyte.models.fallback import Fallback
from halfbyte.models.model_source import ModelSource, Stored, TensorInfo
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import DenseWeight
from tests.models import families

EOS, TURN = "<eos>", "<|im_end|>"
VOCAB = 258  # 256 bytes and two special tokens


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte (GPT-2's alphabet), then `<eos>` and `<|im_end|>`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, additional_special_tokens=[TURN])


class MemorySource(ModelSource):
    """Tensors that are already here."""

    def __init__(self, config: dict[str, Any], state: dict[str, Tensor]) -> None:
        super().__init__("memory", "folder", Path("memory"), config)
        self.state = {name: value.detach() for name, value in state.items()}

    def tensors(self) -> dict[str, TensorInfo]:
        return {name: TensorInfo(tuple(value.shape), value.dtype) for name, value in self.state.items()}

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.state[name][start:stop].clone()

    def stored(self) -> Iterator[Stored]:
        raise NotImplementedError


@dataclass(frozen=True)
class Tiny:
    """Our model, transformers' with the same weights, and a tokenizer for both."""

    model: Decoder | Fallback
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def make_decoder(family: str) -> Tiny:
    """One of `families.FAMILIES` with the byte-level vocabulary."""
    config = families.config(family)
    config.vocab_size = VOCAB
    reference = families.make_model(config)
    state = reference.state_dict()
    spec = ModelSpec.from_config(config.to_dict())
    model = Decoder.build(spec, lambda name, _: DenseWeight(state[name].clone()), lambda name: state[name].clone())
    return Tiny(model.eval(), reference, byte_tokenizer())


def make_fallback() -> Tiny:
    """GPT-2, which the decoder does not serve."""
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None
    )
    reference = families.make_model(config)
    source = MemorySource(config.to_dict(), reference.state_dict())
    model = Fallback.build(source, lambda _, tensor: DenseWeight(tensor.clone()), min_share=0)
    return Tiny(model.eval(), reference, byte_tokenizer())


@pytest.fixture(params=["gemma3-small", "qwen2-sliding", "llama3-gqa", "gpt2"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return make_fallback() if request.param == "gpt2" else make_decoder(request.param)


@pytest.fixture(scope="session")
def llama() -> Tiny:
    """For tests that need one model, whichever."""
    return make_decoder("llama3-gqa")
