"""GGUF files as llama.cpp reads them: the same logits, the same token ids; and as we read them back."""

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from halfbyte.errors import DoesNotFit, HalfbyteError, UsageError
from halfbyte.export import gguf_writer
from halfbyte.export.gguf_container import header, string
from halfbyte.export.gguf_metadata import limits
from halfbyte.export.gguf_types import QUANTIZATIONS, types_of
from halfbyte.export.gguf_writer import write_gguf
from halfbyte.export.merge import Delta, plan_tensors
from halfbyte.export.safetensors_file import Planned
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.gguf_source import GgufSource
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.models.tokenizer import from_gguf
from halfbyte.quant import QuantOptions
from tests.evaluate.conftest import VOCAB, byte_tokenizer
from tests.export import served
from tests.models import families
from tests.models.families import LLAMA3_SCALING, error
from tests.models.test_gguf_tokenizer import AWKWARD, QWEN2, SPLITS, sentences, spm, spm_fields
from tests.models.test_gguf_tokenizer import write as write_vocabulary

__all__ = ["spm"]  # a fixture

FLOAT32 = 3e-5
"""Largest difference of two float32 computations of these models, in units of the logits' root mean square."""
HALF_GELU = 5e-3
"""And where llama.cpp looks GELU up in a table of half-precision numbers: Gemma."""


@dataclass(frozen=True)
class Case:
    """A configuration that llama.cpp can express, and how many tokens it computes as we do (its windows differ)."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    tokens: int = 40
    n_ctx: int = 256
    bound: float = FLOAT32

    def config(self) -> transformers.PretrainedConfig:
        kind, arguments = families.FAMILIES[self.family]
        made: transformers.PretrainedConfig = getattr(transformers, kind)(
            **{**arguments, "vocab_size": VOCAB, **self.changes}
        )
        return made


LONGROPE = {**families.LONGROPE, "original_max_position_embeddings": 256}
LONG = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256, "rope_parameters": LONGROPE}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_GEMMA3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
PERIOD = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(5)]
CASES = {
    "llama1": Case("llama1-mha"),
    "llama2-tied": Case("llama2-mha-tied"),
    "llama3": Case("llama3-gqa"),
    "llama3.1": Case(
        "llama3-gqa", {"rope_parameters": {**LLAMA3_SCALING, "original_max_position_embeddings": 8192}}, tokens=200
    ),
    "llama-head-dim": Case("llama3-head-dim"),
    "llama-biases": Case("llama-biases"),
    "codellama": Case("codellama"),
    "llama-linear": Case("llama-linear"),
    "llama-dynamic": Case("llama-dynamic", tokens=32),
    "llama-yarn": Case("llama-yarn", tokens=200),
    "llama-yarn-attention": Case(
        "llama-yarn", {"rope_parameters": {**YARN, "beta_fast": 24.0, "beta_slow": 1.0, "attention_factor": 1.3}}
    ),
    "mistral": Case("mistral-full"),
    "mistral-sliding": Case("mistral-sliding", tokens=8),
    "phi3": Case("phi3"),
    "phi3-sliding": Case("phi3-sliding", tokens=11),
    "phi3-short": Case("phi3-longrope", LONG, tokens=200),
    # Angles of 300 radians are a multiple of 1.5e-5 in float32, and the two multiply in another order.
    "phi3-long": Case("phi3-longrope", LONG, tokens=300, n_ctx=512, bound=10 * FLOAT32),
    "qwen2": Case("qwen2"),
    "qwen2-tied": Case("qwen2-tied"),
    "qwen2-sliding": Case("qwen2-sliding", tokens=8),
    "qwen2-yarn": Case("qwen2-yarn", tokens=200),
    "qwen3": Case("qwen3"),
    "qwen3-tied": Case("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "gemma": Case("gemma1"),
    "gemma2": Case("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": Case("gemma3-small", {"query_pre_attn_scalar": 16}),
    "gemma3-linear": Case("gemma3", {"query_pre_attn_scalar": 16, "rope_parameters": LINEAR_GEMMA3}),
    "gemma3-pattern": Case(
        "gemma3", {"query_pre_attn_scalar": 16, "num_hidden_layers": 5, "layer_types": PERIOD, "sliding_window": 8}
    ),
}


def save(config: transformers.PretrainedConfig, folder: Path, tokenizer: Any = None) -> PreTrainedModel:
    """transformers' random model of a configuration as a float32 folder with a tokenizer."""
    model = families.make_model(config)
    model.save_pretrained(folder)
    (byte_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return model


def export(folder: Path, out: Path, quantization: str = "f32", template: str | None = None) -> Path:
    source = open_source(str(folder))
    planned = plan_tensors(ModelOptions(model=str(folder)), source, {}, None, torch.float32)
    write_gguf(out, planned, source, quantization, template)
    return out


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Any, Path, Path]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("model")
    model = save(case.config(), folder / "hf")
    return case, model, folder / "hf", export(folder / "hf", folder / "model.gguf")


class HalfGelu(nn.Module):
    """GELU as ggml looks it up: argument and value rounded to half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def test_llama_cpp_computes_our_logits(written: tuple[Case, PreTrainedModel, Path, Path]) -> None:
    case, model, folder, path = written
    ids = torch.randint(0, VOCAB, (case.tokens,), generator=torch.Generator().manual_seed(1))
    theirs = served.logits(path, ids, case.n_ctx)
    ours = load_model(ModelOptions(model=str(folder)), None, torch.float32, "cpu").model.logits(ids)
    gemma = "gemma" in model.config.model_type
    assert error(theirs, ours) < (HALF_GELU if gemma else case.bound)
    if gemma:
        before = [layer.mlp.act_fn for layer in model.model.layers]
        for layer in model.model.layers:
            layer.mlp.act_fn = HalfGelu()
        with torch.no_grad():
            rounded = model(ids[None]).logits[0]
        for layer, function in zip(model.model.layers, before, strict=True):
            layer.mlp.act_fn = function
        # A value at the edge between two half-precision numbers may go either way: a fiftieth of the table's error.
        assert error(theirs, rounded) < HALF_GELU / 2
        assert float((theirs - rounded).pow(2).mean().sqrt()) < 0.5 * float((theirs - ours).pow(2).mean().sqrt())


def test_we_read_our_own_file_back(written: tuple[Case, PreTrainedModel, Path, Path]) -> None:
    case, model, folder, path = written
    if case.family == "llama3-gqa" and not case.changes:
        with pytest.raises(UsageError, match=r"rope_freqs are not Llama 3\.1's"):
            open_source(str(path))
        return
    original, source = open_source(str(folder)), open_source(str(path))
    assert source.tensors().keys() == original.tensors().keys() - {"lm_head.weight"} | (
        set() if model.config.tie_word_embeddings else {"lm_head.weight"}
    )
    for name in source.tensors():
        # A norm that had one added and taken away again has lost its last bits.
        torch.testing.assert_close(source.read(name), original.read(name), rtol=0, atol=1e-6 if "norm" in name else 0)
    ours, theirs = ModelSpec.from_config(source.config), ModelSpec.from_config(_as_read(original.config))
    if case.family == "llama-dynamic":
        assert ours.rope.kind == "default"
    elif case.family == "llama-yarn" and case.changes:
        assert ours.rope.params["attention_factor"] == pytest.approx(1.3)
    else:
        assert ours == theirs
    tokenizer, expected = source.tokenizer(), byte_tokenizer()
    assert (tokenizer.eos_token, tokenizer.bos_token) == (expected.eos_token, None)
    for text in ["Hello  world\n", "a<eos>b<|im_end|>c", "Größe 東京 🙂"]:
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]


def _as_read(config: dict[str, Any]) -> dict[str, Any]:
    """With what a GGUF file cannot say: Mistral is Llama there, windows that llama.cpp ignores, float32 numbers."""
    made = {**config, "rms_norm_eps": float(np.float32(config["rms_norm_eps"]))}
    made |= {"eos_token_id": 256, "bos_token_id": None, "pad_token_id": None}
    if made["model_type"] == "mistral":
        made |= {"model_type": "llama"}
    if made["model_type"] in ("qwen2", "qwen3"):
        made["use_sliding_window"], made["layer_types"] = False, None
    rope = dict(made.get("rope_parameters") or {})
    for key in ("long_factor", "short_factor"):
        if key in rope:
            rope[key] = [float(np.float32(value)) for value in rope[key]]
    return {**made, "rope_parameters": rope}


# -- quantized files --------------------------------------------------------------------------------------------------


def wide(family: str, hidden: int = 256, layers: int = 12, **changes: Any) -> transformers.PretrainedConfig:
    """Twelve layers, so that a mixture's rule of layers shows, whatever their order; widths that K-quants take."""
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4}
    if family.startswith("gemma"):
        heads["query_pre_attn_scalar"] = heads["head_dim"]
    return Case(family, {**sizes, **heads, **changes}).config()


MIXTURES = {
    "llama": wide("llama1-mha"),
    "tied": wide("qwen2-tied"),
    "fused": wide("phi3"),
    "gemma3": wide("gemma3-small"),
    "fallback": wide("qwen3", hidden=320),
    "odd": wide("qwen2", hidden=96, intermediate_size=88),
}


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0", "q4_0", "q4_k_m", "q5_k_m", "q6_k"])
@pytest.mark.parametrize("name", MIXTURES)
def test_types_are_those_of_llama_cpp(name: str, quantization: str, tmp_path: Path) -> None:
    if name == "odd" and quantization in ("q8_0", "q4_0"):
        pytest.skip("llama.cpp's quantizer refuses rows that no block of 32 divides")
    config = MIXTURES[name]
    save(config, tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "f32.gguf")
    served.quantize(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", QUANTIZATIONS[quantization].file_type)
    theirs = {name: tensor.type_name for name, tensor in GgufFile(tmp_path / "theirs.gguf").tensors.items()}
    assert types_of(ModelSpec.from_config(config.to_dict()), quantization) == theirs


@pytest.mark.parametrize("quantization", [q for q in QUANTIZATIONS if q != "f32"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "fallback", "odd"])
def test_quantized_files_compute_what_they_hold(name: str, quantization: str, tmp_path: Path) -> None:
    """llama.cpp rounds activations to 8 bits for quantized weights: near, not equal, to the dequantized file."""
    config = copy.deepcopy(MIXTURES[name])
    config.num_hidden_layers = 2  # a dozen random layers make a small difference a large one
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:2]
    save(config, tmp_path / "hf")
    path = export(tmp_path / "hf", tmp_path / "model.gguf", quantization)
    source = open_source(str(path))
    types = {name: tensor.type_name for name, tensor in source.file.tensors.items()}  # type: ignore[attr-defined]
    assert types == types_of(ModelSpec.from_config(source.config), quantization)
    assert source.file.get("general.file_type") == QUANTIZATIONS[quantization].file_type  # type: ignore[attr-defined]
    ids = torch.randint(0, VOCAB, (24,), generator=torch.Generator().manual_seed(2))
    ours = load_model(ModelOptions(model=str(path)), None, torch.float32, "cpu").model.logits(ids)
    theirs = served.logits(path, ids)
    assert nn.functional.cosine_similarity(ours, theirs, dim=1).min() > 0.995


def test_a_gguf_source_is_written_again(tmp_path: Path) -> None:
    """Its tokenizer's keys are copied byte for byte, but for the template; Llama's rows are reordered twice."""
    save(Case("llama1-mha").config(), tmp_path / "hf")
    first = export(tmp_path / "hf", tmp_path / "first.gguf", "f16", "{{ old }}")
    second = export(first, tmp_path / "second.gguf", "f16", "{{ new }}")
    third = export(first, tmp_path / "third.gguf", "f16")
    files = [GgufFile(path) for path in (first, second, third)]
    assert [file.get("tokenizer.chat_template") for file in files] == ["{{ old }}", "{{ new }}", None]
    for file in files[1:]:
        keys = [key for key in file.keys_of("tokenizer.") if key != "tokenizer.chat_template"]
        assert len(keys) == 9
        assert all(file.raw(key) == files[0].raw(key) for key in keys)
        for name, tensor in file.tensors.items():
            with file.path.open("rb") as ours, first.open("rb") as theirs:
                ours.seek(tensor.offset)
                theirs.seek(files[0].tensors[name].offset)
                assert ours.read(tensor.nbytes) == theirs.read(tensor.nbytes), name


def _own_blocks(folder: Path, name: str, quantization: str) -> tuple[Path, GgufSource]:
    config = copy.deepcopy(MIXTURES[name])
    config.num_hidden_layers = 2
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:2]
    save(config, folder / "hf")
    base = export(folder / "hf", folder / "base.gguf", quantization)
    source = open_source(str(base))
    assert isinstance(source, GgufSource)
    return base, source


@pytest.mark.parametrize("quantization", ["q4_0", "q8_0", "q4_k_m", "q5_k_m", "q6_k"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "fallback"])
def test_a_files_own_blocks_are_kept(name: str, quantization: str, tmp_path: Path) -> None:
    """Merged with nothing, a quantized file comes back with the same values, drawn levels or not."""
    base, source = _own_blocks(tmp_path, name, quantization)
    planned = plan_tensors(ModelOptions(model=str(base)), source, {}, QuantOptions(), torch.float32)
    write_gguf(tmp_path / "again.gguf", planned, source, quantization, None)
    again = open_source(str(tmp_path / "again.gguf"))
    assert isinstance(again, GgufSource)
    for tensor in source.file.tensors.values():
        assert again.file.tensors[tensor.name].type_name == tensor.type_name
    for tensor_name, info in source.tensors().items():
        own = source.prequantized(tensor_name) if len(info.shape) == 2 else None
        same = again.prequantized(tensor_name) if own is not None else None
        if own is not None and same is not None:
            assert torch.equal(own.dequantize(torch.float32), same.dequantize(torch.float32)), tensor_name
        else:
            assert torch.equal(source.read(tensor_name), again.read(tensor_name)), tensor_name


@pytest.mark.parametrize("name", ["llama", "fallback"])
def test_a_small_update_survives_in_the_files_own_blocks(name: str, tmp_path: Path) -> None:
    """An update of two hundredths of a step is there in the mean; the nearest level would be the base's."""
    base, source = _own_blocks(tmp_path, name, "q4_0")
    linears = ModelSpec.from_config(source.config).linears()
    torch.manual_seed(0)
    deltas = {
        x.name: Delta(torch.randn(4, x.in_features) / 500, torch.randn(x.out_features, 4) / 100, 1.0) for x in linears
    }
    plan = partial(plan_tensors, ModelOptions(model=str(base)), source)
    write_gguf(tmp_path / "merged.gguf", plan(deltas, QuantOptions(), torch.float32), source, "q4_0", None)
    merged = open_source(str(tmp_path / "merged.gguf"))
    along = moved = 0.0
    for linear in linears:
        before, after = (s.prequantized(f"{linear.name}.weight") for s in (source, merged))
        assert before is not None
        assert after is not None
        wanted = deltas[linear.name].rows(0, linear.out_features)
        found = after.dequantize(torch.float32) - before.dequantize(torch.float32)
        along += float((found * wanted).sum())
        moved += float((wanted * wanted).sum())
    assert 0.85 < along / moved < 1.15


def test_what_the_file_says_about_itself(tmp_path: Path) -> None:
    save(Case("qwen2").config(), tmp_path / "hf")
    (tmp_path / "hf" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    heard = []
    source = open_source(str(tmp_path / "hf"))
    planned = plan_tensors(ModelOptions(model=source.name), source, {}, None, torch.bfloat16)
    out = tmp_path / "new" / "tuned.gguf"
    write_gguf(out, planned, source, "q8_0", "{{ 1 }}", lambda done, total: heard.append((done, total)))
    file = GgufFile(out)
    said = {
        key: file.get(f"general.{key}")
        for key in ("architecture", "type", "name", "license", "file_type", "quantization_version")
    }
    assert said == {
        "architecture": "qwen2",
        "type": "model",
        "name": "tuned",
        "license": "apache-2.0",
        "file_type": 7,
        "quantization_version": 2,
    }
    total = sum(tensor.nbytes for tensor in file.tensors.values())
    assert heard[-1] == (total, total)
    assert sorted(heard) == heard
    assert [p.name for p in out.parent.iterdir()] == ["tuned.gguf"]
    # The gguf package, a third party, reads the same.
    reader = gguf.GGUFReader(out)
    assert {t.name: t.tensor_type.name for t in reader.tensors} == {n: t.type_name for n, t in file.tensors.items()}
    assert reader.fields["qwen2.context_length"].contents() == 256


# -- tokenizers -------------------------------------------------------------------------------------------------------


def spm_tokenizer(spm: sentencepiece.SentencePieceProcessor, folder: Path, **changes: Any) -> Any:
    """A SentencePiece model as a fast tokenizer; `tests.models.test_gguf_tokenizer` shows that they agree."""
    fields = {**spm_fields(spm), **changes}
    source = write_vocabulary(folder / "vocabulary.gguf", "llama", **fields)
    return from_gguf(source)


def byte_level(pre: str) -> PreTrainedTokenizerFast:
    """A trained byte-level BPE with the pre-tokenizer of a family, special tokens and one that is not special."""
    inner = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    if pre == "gpt-2":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(sentences(3000), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


TEXTS = [*sentences(200, seed=5), *AWKWARD, "a<|end|>b <|im_start|> c<tool>\n", "</s>x <s>y"]


def assert_same_ids(path: Path, tokenizer: Any, texts: list[str]) -> None:
    with served.llama(path) as model:
        for text in texts:
            expected = tokenizer(text)["input_ids"]
            assert model.tokenize(text.encode(), add_bos=True, special=True) == expected, text


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2"])
def test_byte_level_ids(pre: str, tmp_path: Path) -> None:
    tokenizer = byte_level(pre)
    config = Case("qwen2", {"vocab_size": len(tokenizer) + 5}).config()  # five rows that no token has
    save(config, tmp_path / "hf", tokenizer)
    path = export(tmp_path / "hf", tmp_path / "model.gguf")
    file = GgufFile(path)
    assert file.get("tokenizer.ggml.pre") == pre
    assert file.get("tokenizer.ggml.add_bos_token") is False
    assert file.array("tokenizer.ggml.tokens")[-1] == f"[PAD{config.vocab_size - 1}]"
    texts = [text for text in TEXTS if pre != "qwen2" or "\u0301" not in text]  # llama.cpp does not normalize to NFC
    assert_same_ids(path, tokenizer, texts)
    again = open_source(str(path)).tokenizer()
    assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in texts)


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True)])
def test_sentencepiece_ids(spm: sentencepiece.SentencePieceProcessor, bos: bool, eos: bool, tmp_path: Path) -> None:
    tokenizer = spm_tokenizer(spm, tmp_path, add_bos_token=bos, add_eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    save(Case("llama1-mha", {"vocab_size": len(tokenizer) + 3}).config(), tmp_path / "hf", tokenizer)
    path = export(tmp_path / "hf", tmp_path / "model.gguf")
    file = GgufFile(path)
    assert file.get("tokenizer.ggml.model") == "llama"
    assert (file.get("tokenizer.ggml.add_bos_token"), file.get("tokenizer.ggml.add_eos_token")) == (bos, eos)
    assert file.get("tokenizer.ggml.add_space_prefix") is True
    # llama.cpp gives nothing but BOS for no text at all; transformers the ▁ that it puts before it.
    texts = [text for text in TEXTS if text.strip(" ")]
    with served.llama(path) as model:
        for text in texts:
            expected = tokenizer(text)["input_ids"]
            assert model.tokenize(text.encode(), add_bos=True, special=True) == expected, text


def test_gemma_ids(spm: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    """No space before the text; merges in the order of the ids."""
    source = write_vocabulary(tmp_path / "v.gguf", "gemma3", **spm_fields(spm))
    tokenizer = from_gguf(source)
    config = Case("gemma3-small", {"query_pre_attn_scalar": 16, "vocab_size": len(tokenizer)}).config()
    save(config, tmp_path / "hf", tokenizer)
    path = export(tmp_path / "hf", tmp_path / "model.gguf")
    assert GgufFile(path).get("tokenizer.ggml.add_space_prefix") is False
    assert_same_ids(path, tokenizer, [text for text in TEXTS if text])


def phi3_tokenizer(spm: sentencepiece.SentencePieceProcessor, folder: Path, strips: tuple[str, ...]) -> Any:
    """With Phi-3's special tokens; those of `strips` take the whitespace behind them away."""
    tokenizer = spm_tokenizer(spm, folder)
    texts = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|end|>"]
    added = [transformers.AddedToken(t, rstrip=t in strips, normalized=False, special=True) for t in texts]
    tokenizer.backend_tokenizer.add_special_tokens(added)
    return tokenizer


def test_whitespace_after_special_tokens(spm: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    """Phi-3's tokenizer drops it, and llama.cpp does so for models that are called Phi-3."""
    tokenizer = phi3_tokenizer(spm, tmp_path, ("</s>", "<|user|>", "<|end|>"))
    save(Case("phi3", {"vocab_size": len(tokenizer)}).config(), tmp_path / "hf", tokenizer)
    path = export(tmp_path / "hf", tmp_path / "model.gguf")
    assert GgufFile(path).get("general.name") == "model (Phi-3)"
    assert_same_ids(path, tokenizer, ["<|user|>\n a fox", "a <|user|>  b<|end|>\nc", "<s> a", "<|endoftext|> a"])
    assert GgufFile(export(tmp_path / "hf", tmp_path / "phi3.gguf")).get("general.name") == "phi3"


def test_whitespace_that_stays(tmp_path: Path) -> None:
    """A file that its user calls after Phi-3 must not be taken for one with its tokenizer."""
    save(Case("phi3").config(), tmp_path / "hf")
    path = export(tmp_path / "hf", tmp_path / "my-phi-3-tuned.gguf")
    assert GgufFile(path).get("general.name") == "my-phi 3-tuned"
    assert_same_ids(path, byte_tokenizer(), ["<eos> a", "a<|im_end|>\n b"])


def test_whitespace_after_some_tokens_is_refused(spm: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    tokenizer = phi3_tokenizer(spm, tmp_path, ("<|user|>",))
    save(Case("phi3", {"vocab_size": len(tokenizer)}).config(), tmp_path / "hf", tokenizer)
    with pytest.raises(UsageError, match=r"drops whitespace after <\|user\|>"):
        export(tmp_path / "hf", tmp_path / "model.gguf")


def test_the_models_own_ends_are_kept(tmp_path: Path) -> None:
    save(Case("llama1-mha").config(), tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [257, 256]}')
    file = GgufFile(export(tmp_path / "hf", tmp_path / "model.gguf"))
    assert file.get("tokenizer.ggml.eos_token_id") == 256
    assert file.get("tokenizer.ggml.eot_token_id") == 257


# -- what cannot be written -------------------------------------------------------------------------------------------


def changed(change: Any) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    change(tokenizer)
    return tokenizer


def _set(**parts: Any) -> Any:
    def change(tokenizer: Any) -> None:
        for name, value in parts.items():
            setattr(tokenizer.backend_tokenizer, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set(model=models.Unigram([("a", 0.0), ("<eos>", -1.0)], 0)), "is a Unigram model"),
        (_set(pre_tokenizer=pre_tokenizers.Whitespace()), "neither byte-level nor SentencePiece"),
        (_set(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "puts a space before the text"),
        (_set(normalizer=normalizers.Lowercase()), "normalizes text with Lowercase"),
        (
            _set(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(r"\w+"), "isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                )
            ),
            "regular expression that llama.cpp has no name for",
        ),
        (
            _set(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Digits(),
                        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                    ]
                )
            ),
            "cuts text in several steps",
        ),
        (lambda t: setattr(t, "eos_token", None), "has no token that ends a text"),
        (lambda t: t.add_tokens([transformers.AddedToken("<x>", lstrip=True)]), "drops text before the token '<x>'"),
    ],
)
def test_tokenizers_that_llama_cpp_cannot_have(change: Any, message: str, tmp_path: Path) -> None:
    config = Case("llama1-mha", {"eos_token_id": None, "vocab_size": 300}).config()
    save(config, tmp_path / "hf", changed(change))
    for name in ("generation_config.json",):
        (tmp_path / "hf" / name).unlink(missing_ok=True)
    with pytest.raises(UsageError, match=message) as caught:
        export(tmp_path / "hf", tmp_path / "model.gguf")
    assert str(tmp_path / "hf") in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


def test_merges_that_are_not_sentencepieces(spm: sentencepiece.SentencePieceProcessor, tmp_path: Path) -> None:
    tokenizer = spm_tokenizer(spm, tmp_path)
    save(Case("llama1-mha", {"vocab_size": len(tokenizer)}).config(), tmp_path / "hf", tokenizer)
    path = tmp_path / "hf" / "tokenizer.json"
    inner = Tokenizer.from_file(str(path))
    text = json.loads(inner.to_str())
    made = {}
    for pair in text["model"]["merges"]:
        made.setdefault("".join(pair), []).append(pair)
    text["model"]["merges"].remove(next(pairs for pairs in made.values() if len(pairs) > 1)[-1])
    path.write_text(json.dumps(text))
    with pytest.raises(UsageError, match=r"does not join .* as SentencePiece would"):
        export(tmp_path / "hf", tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama-gelu", {}, "llama cannot say that the model has the activation gelu_tanh"),
        ("llama-yarn-mscale", {}, "YaRN with a ramp of its own"),
        ("llama-yarn", {"rope_parameters": {**YARN, "beta_slow": 2.0}}, "YaRN with a ramp of its own"),
        ("gemma1-mqa-biases", {}, "gemma cannot say that the model has biases"),
        ("qwen3-tied-bias", {}, "qwen3 cannot say that the model has biases"),
        ("gemma2", {}, "query_pre_attn_scalar 20"),
        ("gemma2-no-caps", {"query_pre_attn_scalar": 16}, "no soft-capping"),
        ("gemma3", {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 9.0}, "attention soft-capping"),
        (
            "gemma3",
            {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 4},
            "in no regular pattern",
        ),
        ("gemma1", {"tie_word_embeddings": False}, "an output head of its own"),
        ("qwen2", {"rope_parameters": LLAMA3_SCALING}, "RoPE scaling 'llama3'"),
        ("llama1-mha", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.4}}, "partial rotary"),
        ("phi3", {"head_dim": 16}, "heads that are not hidden_size wide"),
    ],
)
def test_models_that_llama_cpp_computes_differently(
    family: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    kind, arguments = families.FAMILIES[family]
    config = getattr(transformers, kind)(**{**arguments, **changes, "vocab_size": VOCAB})
    config.save_pretrained(tmp_path / "hf")
    spec = ModelSpec.from_config(config.to_dict())
    with pytest.raises(UsageError, match=message):
        gguf_writer.metadata(spec)


def test_an_unknown_family(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=1, n_head=4, n_positions=64)
    save(config, tmp_path / "hf")
    with pytest.raises(UsageError, match="is a gpt2 model, which halfbyte does not write as GGUF"):
        write_gguf(tmp_path / "x.gguf", [], open_source(str(tmp_path / "hf")), "f16", None)


def test_an_unknown_quantization_and_an_incomplete_plan(tmp_path: Path) -> None:
    save(Case("qwen3").config(), tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"))
    with pytest.raises(UsageError, match="'q3_k_s' is not a GGUF quantization: choose one of f32, f16"):
        write_gguf(tmp_path / "x.gguf", [], source, "q3_k_s", None)
    planned = plan_tensors(ModelOptions(model=source.name), source, {}, None, torch.float32)
    with pytest.raises(UsageError, match=r"tensor model\.norm\.weight is missing, the config says \(60,\)"):
        write_gguf(tmp_path / "x.gguf", [t for t in planned if t.name != "model.norm.weight"], source, "f32", None)


@pytest.mark.parametrize(
    ("value", "quantization", "message"),
    [
        (
            float("nan"),
            "f32",
            r"model\.layers\.1\.mlp\.up_proj\.weight cannot be written as F32: a value is not finite",
        ),
        (1e5, "f16", r"up_proj\.weight cannot be written as F16: a value of 100000 is beyond half precision"),
    ],
)
def test_weights_that_do_not_fit_leave_nothing(value: float, quantization: str, message: str, tmp_path: Path) -> None:
    save(Case("qwen3").config(), tmp_path / "hf")
    source = open_source(str(tmp_path / "hf"))
    planned = plan_tensors(ModelOptions(model=source.name), source, {}, None, torch.float32)

    def spoiled(tensor: Planned) -> Planned:
        def rows() -> Iterator[Tensor]:
            for piece in tensor.rows():
                yield torch.full_like(piece, value)

        return Planned(tensor.name, tensor.shape, tensor.dtype, rows)

    planned = [spoiled(t) if t.name == "model.layers.1.mlp.up_proj.weight" else t for t in planned]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.gguf").write_text("before")
    with pytest.raises(HalfbyteError, match=message):
        write_gguf(tmp_path / "out" / "model.gguf", planned, source, quantization, None)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert (tmp_path / "out" / "model.gguf").read_text() == "before"


def test_a_full_disk_is_seen_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(Case("qwen3").config(), tmp_path / "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(DoesNotFit, match=r"the GGUF file .* needs 0\.00 GB"):
        export(tmp_path / "hf", tmp_path / "model.gguf")


def test_pieces_need_not_be_whole_heads() -> None:
    rows = torch.arange(24.0).view(12, 2)
    whole = gguf_writer.permuted(rows, 6)
    assert torch.equal(whole[:6, 0] / 2, torch.tensor([0.0, 3, 1, 4, 2, 5]))
    assert torch.equal(torch.cat(list(gguf_writer._reordered(iter(rows.split(5)), 6))), whole)
    with pytest.raises(ValueError, match="4 rows are no whole head of 8"):
        list(gguf_writer._reordered(iter([rows]), 8))


def test_a_header_is_padded_to_whole_blocks() -> None:
    for text in ("", "a", "ä" * 31):
        assert len(header({"general.name": string(text)}, [])) % 32 == 0


def test_limits_are_said() -> None:
    def of(name: str) -> list[str]:
        return limits(ModelSpec.from_config(CASES[name].config().to_dict()))

    assert of("qwen3") == of("gemma3") == of("mistral") == []
    assert "ignores this model's sliding window: texts of more than 8 tokens" in of("mistral-sliding")[0]
    assert "more than 11 tokens" in of("phi3-sliding")[0]
    assert "beyond 32 tokens" in of("llama-dynamic")[0]
    assert "-c 256" in of("phi3-long")[0]
