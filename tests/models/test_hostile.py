"""What fuzzing found (tests/fuzz.py), each as a file of its own: one printable line, never another exception."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.models.gguf_source import GgufSource
from halfbyte.models.load import build_decoder
from halfbyte.models.safetensors_source import read_json_object
from halfbyte.models.source import open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.models.tokenizer import from_folder, from_gguf
from halfbyte.quant import QuantOptions
from tests.evaluate.conftest import byte_tokenizer
from tests.models.families import FAMILIES, config

SIZES = {
    "context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64, "head_count": 4,
    "head_count_kv": 2, "layer_norm_rms_eps": 1e-6,
}  # fmt: skip


def write(path: Path, tensors: dict[str, Any] | None = None, architecture: str = "llama", **fields: Any) -> Path:
    """A GGUF file with valid sizes, but for `fields`; tensors are arrays, or (uint8 array, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**SIZES, "vocab_size": 3, **fields}.items():
        if callable(value):
            value(writer)
        elif value is not None:
            getattr(writer, f"add_{name}")(value)
    for name, value in (tensors or {}).items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(key: str, value: str) -> Callable[[Any], None]:
    """A metadata text, where a number or an array belongs."""
    return lambda writer: writer.add_string(key, value)


def array(key: str, values: list[Any]) -> Callable[[Any], None]:
    return lambda writer: writer.add_array(key, values)


def blocks(kind: str, rows: int, columns: int) -> tuple[Any, gguf.GGMLQuantizationType]:
    chosen = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[chosen]
    return np.zeros((rows, columns // block * size), np.uint8), chosen


Q = "blk.0.attn_q.weight"


def test_heads_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    source = GgufSource("x", write(tmp_path / "x.gguf", {Q: np.zeros((4, 64), np.float32)}))
    with pytest.raises(UsageError, match="has 4 rows, which are not 4 heads"):
        source.read("model.layers.0.self_attn.q_proj.weight")
    source = GgufSource("x", write(tmp_path / "x.gguf", {Q: blocks("Q8_0", 4, 64)}))
    with pytest.raises(UsageError, match="has 4 rows, which are not 4 heads"):
        source.prequantized("model.layers.0.self_attn.q_proj.weight")


def test_a_block_type_that_nobody_decodes_and_a_vector_of_blocks(tmp_path: Path) -> None:
    source = GgufSource("x", write(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": blocks("Q8_1", 64, 64)}))
    with pytest.raises(UsageError, match="type Q8_1 cannot be read"):
        source.read("model.layers.0.mlp.up_proj.weight")
    raw, kind = blocks("Q8_0", 1, 64)
    with pytest.raises(UsageError, match="is in Q8_0, and is no matrix"):
        GgufSource("x", write(tmp_path / "y.gguf", {"blk.0.ffn_up.weight": (raw[0], kind)}))


def test_64_bit_values_beside_blocks_are_no_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": blocks("Q8_0", 64, 64),
                                       "blk.0.ffn_gate.weight": np.ones((64, 64), np.float64)})  # fmt: skip
    assert GgufSource("x", path).prequantized("model.layers.0.mlp.gate_proj.weight") is None


def header(shape: tuple[int, ...]) -> bytes:
    row = struct.pack("<Q", 1) + b"t" + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + row + bytes(64)


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (1 << 62, 0)])
def test_tensors_of_nothing(shape: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(header(shape))
    with pytest.raises(UsageError, match=r"0 dimensions|is empty"):
        open_source(str(tmp_path / "x.gguf"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_count": 1 << 31}, r"block_count is 2147483648, and should be a whole number from 1 to 4096"),
        ({"head_count": 0}, "head_count"),
        ({"embedding_length": None, "x": text("llama.embedding_length", "64")}, "embedding_length is '64'"),
        ({"head_count_kv": None, "x": array("llama.attention.head_count_kv", [1, 2])}, "differs from layer"),
        ({"layer_norm_rms_eps": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"rope_freq_base": -1.0}, "rope.freq_base is -1.0"),
        ({"x": text("tokenizer.ggml.bos_token_id", "1")}, "bos_token_id is '1'"),
        ({"x": text("split.count", "2"), "head_count": 0}, "head_count"),
    ],
)  # fmt: skip
def test_metadata_of_another_type_or_size(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(str(write(tmp_path / "x.gguf", **fields)))


def test_half_of_longropes_factors_and_freqs_of_other_heads(tmp_path: Path) -> None:
    factors = np.ones(8, np.float32)
    alone = open_source(str(write(tmp_path / "x.gguf", {"rope_factors_long.weight": factors}, "phi3")))
    assert alone.config["rope_parameters"]["rope_type"] == "default"
    with pytest.raises(UsageError, match="is not for heads of 16 features"):
        open_source(str(write(tmp_path / "y.gguf", {"rope_freqs.weight": np.ones(9, np.float32)})))


TOKENS = {"tokenizer_model": "llama", "token_list": ["<unk>", "a", "b"], "token_scores": [0.0, 1.0, 2.0]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_list": None, "x": array("tokenizer.ggml.tokens", [1, 2, 3])}, "tokens holds values"),
        ({"token_list": ["<unk>", "a" * 3000, "b"]}, "texts of over 2048 characters"),
        ({"token_scores": None, "x": array("tokenizer.ggml.scores", ["a", "b", "c"])}, "scores holds values"),
        ({"token_types": None, "x": array("tokenizer.ggml.token_type", ["a", "b", "c"])}, "token_type holds values"),
        ({"x": lambda w: w.add_uint32("tokenizer.chat_template", 7)}, "chat_template is not a text"),
    ],
)  # fmt: skip
def test_vocabularies_of_other_things(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = GgufSource("x", write(tmp_path / "x.gguf", **{**TOKENS, **fields}))
    with pytest.raises(UsageError, match=message):
        from_gguf(source.file)


def test_json_that_no_parser_takes(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in (b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"a": "\xff"}', b"\xff\xfe{\x00"):
        path.write_bytes(text)
        with pytest.raises(UsageError, match="not JSON"):
            read_json_object(path)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama1-mha", {"rms_norm_eps": []}, r"rms_norm_eps is \[\], and should be a number above 0"),
        ("llama1-mha", {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ("llama1-mha", {"num_hidden_layers": 1 << 24}, "num_hidden_layers is 16777216"),
        ("llama1-mha", {"rope_parameters": {"rope_theta": "\ud800"}}, "rope_theta"),
        ("llama1-mha", {"rope_parameters": []}, None),
        ("llama1-mha", {"rope_parameters": [1]}, "should be an object"),
        ("llama1-mha", {"hidden_act": {}}, "hidden_act"),
        ("llama1-mha", {"hidden_act": ["silu"]}, "hidden_act"),
        ("llama1-mha", {"eos_token_id": [{}]}, "eos_token_id"),
        ("llama1-mha", {"bos_token_id": "1"}, "bos_token_id"),
        ("llama1-mha", {"head_dim": 7}, "an even number is needed"),
        ("llama1-mha", {"text_config": 3}, "text_config is 3"),
        ("llama-dynamic", {"head_dim": 2}, "cannot be computed"),
        ("llama-yarn", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 4.0}}, "cannot be"),
        ("llama3-gqa", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 1, "low_freq_factor": 2,
                                            "high_freq_factor": 2}}, "cannot be computed"),
        ("phi3-longrope", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0],
                                               "long_factor": [1.0]}}, "short_factor has 1 factors, and should have"),
        ("qwen2-sliding", {"max_window_layers": "1", "layer_types": None}, "max_window_layers"),
        ("gemma2", {"sliding_window": "8"}, "sliding_window"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ("gemma2", {"attn_logit_softcapping": "x"}, "attn_logit_softcapping"),
        ("gemma3-small", {"layer_types": 5}, "layer_types has no entries"),
    ],
)  # fmt: skip
def test_configs_with_other_values(family: str, change: dict[str, Any], message: str | None) -> None:
    plain = config(family).to_dict() | change
    if message is None:
        with_default = ModelSpec.from_config(plain)
        assert with_default.activation == "silu"
        return
    with pytest.raises(UsageError, match=message):
        ModelSpec.from_config(plain)


@pytest.mark.parametrize("name", ["a" * 5000, "a\x00b", "\udc80", "missing.safetensors"])
def test_a_shard_of_no_possible_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config("llama1-mha").to_dict()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UsageError, match="is missing, which"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_still_read(family: str) -> None:
    plain = json.loads(json.dumps(config(family).to_dict()))
    assert ModelSpec.from_config(plain).num_layers == plain["num_hidden_layers"]


def test_settings_of_a_tokenizer_that_only_fail_in_use(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": {"a": 1}}))
    with pytest.raises(UsageError, match="no tokenizer that transformers can load"):
        from_folder(tmp_path)


def test_messages_are_one_printable_line() -> None:
    error = UsageError("a\nb\x1b[2J\ud800\u202e" + "x" * 100_000)
    assert str(error).startswith("a b\\x1b[2J\\ud800\\u202ex")
    assert len(str(error)) <= 2100
    assert str(HalfbyteError("schön – 東京 ▁ …")) == "schön – 東京 ▁ …"
    str(error).encode()


def test_a_damaged_file_builds_nothing(tmp_path: Path) -> None:
    """The whole way, with a file whose numbers are nonsense: it computes nonsense, and does not crash."""
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"attn_k": (32, 64), "attn_v": (32, 64)}
    tensors: dict[str, Any] = {"token_embd.weight": np.full((3, 64), np.nan, np.float32)}
    tensors |= {f"blk.0.{n}.weight": blocks("Q8_0", *shapes.get(n, (64, 64))) for n in names}
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    tensors |= {n: np.full(64, np.inf, np.float32) for n in norms}
    for raw, _ in (value for value in tensors.values() if isinstance(value, tuple)):
        raw[:] = 255
    source = open_source(str(write(tmp_path / "x.gguf", tensors)))
    for quant in (None, QuantOptions()):
        model = build_decoder(source, ModelSpec.from_config(source.config), quant, torch.float32, torch.device("cpu"))
        assert model.logits(torch.arange(3)).shape == (3, 3)
