"""What a step keeps, found without memory, against what the fallback itself keeps: bytes of tensors that are alive."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from halfbyte.adapters import LoraOptions, attach
from halfbyte.batch import IGNORE, Batch
from halfbyte.models.fallback import Fallback
from halfbyte.models.foreign_spec import ForeignSpec
from halfbyte.models.foreign_trace import Layout, Unknown, _Counts, _Live, trace
from halfbyte.models.seq2seq import Seq2Seq
from halfbyte.models.source import open_source
from halfbyte.quant import QuantOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing.*:FutureWarning")

WIDE: dict[str, Any] = {"vocab_size": 600, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256}
WIDE |= {"bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", WIDE),
    "bloom": ("BloomConfig", {"vocab_size": 600, "hidden_size": 128, "n_layer": 3, "n_head": 4}),
    "falcon": (
        "FalconConfig",
        {
            "vocab_size": 600, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
            "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "bos_token_id": 1, "eos_token_id": 2,
        },
    ),
    "t5": (
        "T5Config",
        {
            "vocab_size": 600, "d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
    "bart": (
        "BartConfig",
        {
            "vocab_size": 600, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
            "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
            "decoder_start_token_id": 2, "forced_eos_token_id": None,
        },
    ),
}  # fmt: skip
RANK, LENGTHS, ANSWER = 8, (128, 100, 60), 48


def build(name: str, folder: Path, dtype: torch.dtype) -> Any:
    kind, arguments = MODELS[name]
    config = getattr(transformers, kind)(**arguments)
    pair = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if pair else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(folder)
    source = open_source(str(folder))
    made = (Seq2Seq if pair else Fallback).build(source, QuantOptions(), dtype, "cpu", 0)
    if isinstance(made, Seq2Seq):
        made.begin_with(source.config)
    attach(made, LoraOptions(lora_r=RANK))
    return made


def batch_of(pair: bool) -> Batch:
    """Rows of unlike lengths, all supervised; of a pair the last tokens are the answer."""
    lengths = tuple(n + ANSWER for n in LENGTHS) if pair else LENGTHS
    ids = torch.randint(3, 600, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(ids, IGNORE)
    start = 0
    for length in lengths:
        first = length - ANSWER - 1 if pair else 0
        targets[start + first : start + length - 1] = ids[start + first + 1 : start + length]
        start += length
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Batch(ids, positions, targets, lengths, sources=LENGTHS if pair else ())


def alive(model: Any, batch: Batch) -> tuple[int, int]:
    """(peak, between forward and backward) bytes of tensors beside parameters, of one step."""
    model.loss(batch)[0].backward()  # whatever is made once
    for parameter in model.parameters():
        parameter.grad = None
    live = _Live({t.untyped_storage() for t in (*model.parameters(), *model.buffers())}, _Counts())
    with live:
        loss, _ = model.loss(batch)
        kept = live.bytes
        loss.backward()
    return live.peak, kept


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_trace_is_what_a_step_keeps(name: str, checkpointing: bool, tmp_path: Path) -> None:
    model = build(name, tmp_path, torch.float32)
    model.train()
    model.checkpointing = checkpointing
    pair = isinstance(model, Seq2Seq)
    batch = batch_of(pair)
    peak, kept = alive(model, batch)
    adapters = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    spec = ForeignSpec.from_config(open_source(str(tmp_path)).config)
    layout = Layout(
        rows=len(LENGTHS),
        longest=LENGTHS[0],
        answer=ANSWER if pair else 0,
        dtype=torch.float32,
        adapted=frozenset(linear.name for linear in spec.linears()),
        rank=RANK,
        checkpointing=checkpointing,
        supervised=1.0 if pair else (sum(LENGTHS) - len(LENGTHS)) / (len(LENGTHS) * LENGTHS[0]),
    )
    found = trace(spec.config, layout)
    # Beside it a step holds the factors as they are computed with, and at last their gradients: the plan has both.
    assert peak <= found.peak + 2 * adapters
    assert found.peak <= 1.06 * peak
    if not checkpointing:  # else masks and indices are most of what little stands between
        assert found.kept == pytest.approx(kept, rel=0.06, abs=adapters)


def layout(**changes: Any) -> Layout:
    spec = ForeignSpec.from_config(transformers.GPT2Config(**WIDE).to_dict())
    names = frozenset(linear.name for linear in spec.linears())
    values: dict[str, Any] = {"rows": 2, "longest": 64, "answer": 0, "dtype": torch.float32, "adapted": names}
    return Layout(**(values | changes))


def test_what_is_left_out_is_not_kept() -> None:
    config = transformers.GPT2Config(**WIDE).to_dict()
    whole, bare = trace(config, layout()), trace(config, layout(adapted=frozenset()))
    tokens, widths = 128, 3 * (128 + 128 + 128 + 512)
    # The input of the first linear of a block is the output of a norm that nobody else keeps, as is attention's output.
    assert 0 < whole.kept - bare.kept <= 4 * tokens * (widths + 12 * 16)
    assert trace(config, layout(training=False)).kept < 0.1 * bare.kept
    assert trace(config, layout(checkpointing=True)).kept < 0.5 * whole.kept
    assert trace(config, layout(dtype=torch.bfloat16)).kept < 0.7 * whole.kept


def test_operations_are_those_of_the_shapes() -> None:
    config = transformers.GPT2Config(**WIDE).to_dict()
    spec = ForeignSpec.from_config(config)
    found = trace(config, layout())
    assert found.linear == 2 * 2 * spec.linear_parameters * 128
    head = 2 * 2 * spec.head_parameters * 128
    attention = 3.5 * 4 * 3 * 2 * 64**2 * 128  # layers, rows, pairs of tokens, features
    assert found.other == head + attention
    assert trace(config, layout(checkpointing=True)).linear == pytest.approx(1.5 * found.linear)


def test_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 100 billion parameters and a micro-batch of a terabyte."""
    config = transformers.GPT2Config(**(WIDE | {"n_embd": 32768, "n_layer": 8, "n_positions": 65536})).to_dict()
    found = trace(config, layout(rows=16, longest=65536))
    assert found.kept > 10**12


def test_code_that_asks_for_values_is_unknown() -> None:
    small = transformers.MixtralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    ).to_dict()  # fmt: skip
    with pytest.raises(Unknown):
        trace(small, layout())
