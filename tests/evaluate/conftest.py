"""A tiny random model of either kind with a byte-level tokenizer, and transformers' own model of the same weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from halfbyte.models.decoder import Decoder
from halfbyte.models.fallback import Fallback
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
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


@dataclass(frozen=True)
class Tiny:
    """Our model, transformers' with the same weights, and a tokenizer for both."""

    model: Decoder | Fallback
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def make_tiny(name: str, folder: Path) -> Tiny:
    """One of `families.FAMILIES` with the byte-level vocabulary, or GPT-2, which the decoder does not serve."""
    if name == "gpt2":
        config: Any = GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=256)
        config.bos_token_id = config.eos_token_id = None
    else:
        config = families.config(name)
        config.vocab_size = VOCAB
    reference = families.make_model(config)
    reference.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    loaded = load_model(ModelOptions(model=str(folder)), None, torch.float32, "cpu")
    assert isinstance(loaded.model, Fallback if name == "gpt2" else Decoder)
    return Tiny(loaded.model.eval(), reference, byte_tokenizer())


@pytest.fixture(scope="session", params=["gemma3-small", "qwen2-sliding", "llama3-gqa", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(request.param, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """For tests that need one model, whichever."""
    return make_tiny("llama3-gqa", tmp_path_factory.mktemp("model"))
