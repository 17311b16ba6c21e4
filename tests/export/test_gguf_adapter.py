"""GGUF adapters: llama.cpp with the base file and `--lora` computes what our model with the adapter computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from halfbyte.adapters import LoraOptions, load_adapter
from halfbyte.errors import UsageError
from halfbyte.export.gguf_adapter import write_gguf_adapter
from halfbyte.export.merge import Delta, read_deltas
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from tests.evaluate.conftest import VOCAB
from tests.export import served
from tests.export.conftest import LORA, make_adapter
from tests.export.test_gguf_writer import FLOAT32, HALF_GELU, Case, export, save
from tests.models.families import error

PATTERNS = LoraOptions(
    lora_r=4,
    lora_alpha=12,
    use_rslora=True,
    rank_pattern={"q_proj": 3, "layers.1.mlp.down_proj": 7},
    alpha_pattern={"k_proj": 5.0, "layers.0.mlp.up_proj": 20.0},
)
CASES = {
    "llama": (Case("llama3-head-dim"), LORA),
    "llama-patterns": (Case("llama-biases"), PATTERNS),
    "mistral": (Case("mistral-full"), LORA),
    "phi3": (Case("phi3"), LORA),
    "qwen2-tied": (Case("qwen2-tied"), PATTERNS),
    "qwen3": (Case("qwen3"), LORA),
    "gemma": (Case("gemma1"), LORA),
    "gemma2": (Case("gemma2", {"query_pre_attn_scalar": 16}), LORA),
    "gemma3": (Case("gemma3-small", {"query_pre_attn_scalar": 16}), PATTERNS),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_our_logits(name: str, tmp_path: Path) -> None:
    case, options = CASES[name]
    save(case.config(), tmp_path / "hf")
    make_adapter(tmp_path / "hf", tmp_path / "adapter", options=options)
    base = export(tmp_path / "hf", tmp_path / "base.gguf")
    write_gguf_adapter(tmp_path / "a.gguf", read_deltas(tmp_path / "adapter"), open_source(str(tmp_path / "hf")), name)
    ids = torch.randint(0, VOCAB, (30,), generator=torch.Generator().manual_seed(1))
    loaded = load_model(ModelOptions(model=str(tmp_path / "hf")), None, torch.float32, "cpu").model
    plain = loaded.logits(ids)
    load_adapter(loaded, tmp_path / "adapter")
    ours = loaded.logits(ids)
    bound = HALF_GELU if name.startswith("gemma") else FLOAT32
    assert error(plain, ours) > 20 * bound  # the adapter does something
    assert error(served.logits(base, ids, lora=tmp_path / "a.gguf"), ours) < bound


def small() -> dict[str, Delta]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 60, generator=generator)
    return {
        "model.layers.0.mlp.up_proj": Delta(a, torch.randn(88, 2, generator=generator), 3.0),
        "model.layers.1.self_attn.v_proj": Delta(a[:1], torch.randn(48, 1, generator=generator), 2.0),
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("base")
    save(Case("qwen3").config(), folder)
    return open_source(str(folder))


def test_scaling_is_folded_into_b(source: Any, tmp_path: Path) -> None:
    deltas = small()
    write_gguf_adapter(tmp_path / "a.gguf", deltas, source, "mine")
    file = GgufFile(tmp_path / "a.gguf")
    said = {k: file.get(k) for k in ("general.type", "adapter.type", "general.architecture", "general.name")}
    assert list(said.values()) == ["adapter", "lora", "qwen3", "mine"]
    alpha = file.get("adapter.lora.alpha")
    assert alpha == 6  # 3 * rank 2; the other one, 2 * rank 1, is a third of it
    for name, linear in (
        ("blk.0.ffn_up", "model.layers.0.mlp.up_proj"),
        ("blk.1.attn_v", "model.layers.1.self_attn.v_proj"),
    ):
        read = []
        for letter in "ab":
            tensor = file.tensors[f"{name}.weight.lora_{letter}"]
            raw = file.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
            read.append(torch.frombuffer(bytearray(raw), dtype=torch.float32).view(tensor.shape))
        rank = read[0].shape[0]
        torch.testing.assert_close(read[1] @ read[0] * (alpha / rank), deltas[linear].rows(0, 999))


def test_half_precision(source: Any, tmp_path: Path) -> None:
    write_gguf_adapter(tmp_path / "a.gguf", small(), source, "mine", "f16")
    file = GgufFile(tmp_path / "a.gguf")
    assert {tensor.type_name for tensor in file.tensors.values()} == {"F16"}
    large = {"model.layers.0.mlp.up_proj": Delta(torch.full((1, 60), 1e5), torch.ones(88, 1), 1.0)}
    with pytest.raises(UsageError, match=r"blk\.0\.ffn_up\.weight\.lora_a cannot be written as F16: a value of 100000"):
        write_gguf_adapter(tmp_path / "b.gguf", large, source, "mine", "f16")
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize(
    ("deltas", "message"),
    [
        ({}, "changes no linear"),
        (
            {"model.layers.9.mlp.up_proj": Delta(torch.ones(1, 60), torch.ones(88, 1), 1.0)},
            r"layers\.9\.mlp\.up_proj, for",
        ),
        ({"model.embed_tokens": Delta(torch.ones(1, 60), torch.ones(VOCAB, 1), 1.0)}, "model.embed_tokens, for which"),
        (
            {"model.layers.0.mlp.up_proj": Delta(torch.ones(1, 64), torch.ones(88, 1), 1.0)},
            "88 x 64, the model's linear",
        ),
        (
            {"model.layers.0.mlp.up_proj": Delta(torch.full((1, 60), float("nan")), torch.ones(88, 1), 1.0)},
            "lora_a cannot be written as F32: a value is not finite",
        ),
    ],
)
def test_adapters_that_do_not_fit(deltas: dict[str, Delta], message: str, source: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        write_gguf_adapter(tmp_path / "a.gguf", deltas, source, "mine")
    assert list(tmp_path.iterdir()) == []


def test_other_models_and_types(source: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'q8_0' is not a type for a GGUF adapter: choose f32 or f16"):
        write_gguf_adapter(tmp_path / "a.gguf", small(), source, "mine", "q8_0")
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=1, n_head=4, n_positions=64)
    save(config, tmp_path / "gpt2")
    with pytest.raises(UsageError, match="is a gpt2 model, which halfbyte does not write as GGUF"):
        write_gguf_adapter(tmp_path / "a.gguf", small(), open_source(str(tmp_path / "gpt2")), "mine")


def test_a_head_of_its_own_can_be_adapted(source: Any, tmp_path: Path) -> None:
    head = {"lm_head": Delta(torch.randn(2, 60), torch.randn(VOCAB, 2), 0.5)}
    write_gguf_adapter(tmp_path / "a.gguf", head, source, "mine")
    base = export(source.path, tmp_path / "base.gguf")
    ids = torch.arange(20)
    changed, plain = served.logits(base, ids, lora=tmp_path / "a.gguf"), served.logits(base, ids)
    assert error(changed, plain) > 0.1
