"""Shapes of other architectures from config.json: what the fallback holds, and one line for what cannot be."""

import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from halfbyte.errors import UsageError
from halfbyte.linear import segments
from halfbyte.models.fallback import Fallback
from halfbyte.models.foreign_spec import ForeignSpec
from halfbyte.models.seq2seq import Seq2Seq
from halfbyte.models.source import open_source
from tests.models import test_fallback, test_seq2seq

DECODERS, PAIRS = test_fallback.ARCHITECTURES, test_seq2seq.ARCHITECTURES


@pytest.mark.parametrize("name", [*DECODERS, *PAIRS])
def test_shapes_are_the_ones_of_the_model_that_is_built(name: str, tmp_path: Path) -> None:
    if name in PAIRS:
        test_seq2seq.write_pair(name, tmp_path)
        built: Any = Seq2Seq.build(open_source(str(tmp_path)))
    else:
        test_fallback.write_model(*DECODERS[name], tmp_path)
        built = Fallback.build(open_source(str(tmp_path)))
    spec = ForeignSpec.from_config(open_source(str(tmp_path)).config)
    assert spec.encoder_decoder == (name in PAIRS)
    found = {s.name: (s.out_features, s.in_features, s.bias is not None) for s in segments(built).values()}
    assert {x.name: (x.out_features, x.in_features, x.bias) for x in spec.linears()} == found
    tensors = {id(p): p.numel() for p in built.parameters()}
    weights = sum(s.weight.shape[0] * s.weight.shape[1] for s in segments(built).values())
    inside = {id(p) for s in segments(built).values() for p in s.weight.parameters()}
    assert spec.linear_parameters == weights
    assert spec.total_parameters == weights + sum(n for key, n in tensors.items() if key not in inside)
    assert spec.coverage == pytest.approx(built.coverage.share, abs=1e-6)
    assert spec.head == tuple(built.model.get_output_embeddings().weight.shape)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_counted(tied: bool) -> None:
    """T5 1.1: transformers ties the empty model whatever config.json says, and unties it when it reads the files."""
    config = transformers.T5Config(**test_seq2seq.T5).to_dict() | {"tie_word_embeddings": tied}
    spec = ForeignSpec.from_config(config)
    assert spec.tied == tied
    assert sum(shape == spec.head for _, shape in spec.tensors()) == 2 - tied


GPT2 = transformers.GPT2Config(**test_fallback.GPT2).to_dict()
T5 = transformers.T5Config(**test_seq2seq.T5).to_dict()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt5"}, r"model_type 'gpt5' is not an architecture that transformers knows"),
        ({}, r"model_type '' is not an architecture"),
        ({"model_type": "vit"}, r"is not a decoder-only language model"),
        ({**GPT2, "is_encoder_decoder": True}, r"'gpt2' is not an encoder-decoder"),
        ({**GPT2, "n_embd": -3}, r"n_embd is -3, and should be a whole number from 1"),
        ({**GPT2, "n_embd": 10**12}, r"n_embd is 1000000000000"),
        ({**GPT2, "n_embd": "wide"}, r"n_embd is 'wide'"),
        ({**GPT2, "n_layer": 10**9}, r"n_layer is 1000000000, and should be a whole number from 1 to 4096"),
        ({**GPT2, "n_layer": 0}, r"n_layer is 0"),
        ({**GPT2, "n_layer": True}, r"n_layer is True"),
        ({**GPT2, "vocab_size": 2.5}, r"vocab_size is 2.5"),
        ({**GPT2, "n_head": 7}, r"transformers cannot build a gpt2 model of it: .*divisible"),
        ({**T5, "num_heads": -1}, r"num_heads is -1"),
        ({**T5, "feed_forward_proj": "magic-x-y"}, r"transformers refuses it for a t5 model"),
        ({**GPT2, "activation_function": "magic"}, r"transformers cannot build a gpt2 model of it"),
    ],
)
def test_what_cannot_be_built_is_one_line(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        ForeignSpec.from_config(config)
    assert not re.search(r"[\n\r]", str(caught.value))
