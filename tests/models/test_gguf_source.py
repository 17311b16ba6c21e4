"""GGUF files of every family against the transformers model that they were written from, and the two real ones."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from halfbyte.errors import UsageError
from halfbyte.models.gguf_config import hugging_face_name
from halfbyte.models.gguf_source import GgufSource
from halfbyte.models.source import open_source
from halfbyte.models.spec import ModelSpec
from tests.models.families import BASE, GEMMA, LLAMA3_SCALING, config, make_model
from tests.models.gguf_files import llama3_factors, write_gguf

FAMILIES = [
    "llama1-mha",
    "llama2-mha-tied",
    "llama3-head-dim",
    "llama-biases",
    "codellama",
    "llama-linear",
    "llama-yarn",
    "mistral-full",
    "phi3",
    "phi3-sliding",
    "phi3-longrope",
    "gemma1",
    "qwen2",
    "qwen2-tied",
    "qwen2-yarn",
    "qwen3",
    "qwen3-tied-bias",
]


def special(name: str) -> transformers.PretrainedConfig:
    """Configurations that a GGUF file can express, where those of `families` set what llama.cpp takes for granted."""
    if name == "llama3.1":
        scaling = {**LLAMA3_SCALING, "original_max_position_embeddings": 8192}
        return transformers.LlamaConfig(**BASE, rope_parameters=scaling)
    if name == "gemma2":
        return transformers.Gemma2Config(
            **GEMMA,
            sliding_window=8,
            query_pre_attn_scalar=16,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
        )
    if name == "gemma3":
        return transformers.Gemma3TextConfig(
            **{**GEMMA, "num_hidden_layers": 6}, sliding_window=8, query_pre_attn_scalar=16
        )
    assert name == "gemma3-linear"
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    return transformers.Gemma3TextConfig(
        **{**GEMMA, "num_hidden_layers": 7}, sliding_window=8, query_pre_attn_scalar=16, rope_parameters=rope
    )


@pytest.fixture(params=[*FAMILIES, "llama3.1", "gemma2", "gemma3", "gemma3-linear"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[transformers.PreTrainedModel, Path]:
    made = config(request.param) if request.param in FAMILIES else special(request.param)
    model = make_model(made)
    write_gguf(model, tmp_path / "model.gguf")
    return model, tmp_path / "model.gguf"


def test_every_tensor_and_the_config_come_back(written: tuple[transformers.PreTrainedModel, Path]) -> None:
    model, path = written
    source = open_source(str(path))
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert set(source.tensors()) == set(state)
    for name, expected in state.items():
        found = source.read(name)
        assert source.info(name).shape == found.shape
        # A norm that had one added and taken away again has lost its last bits.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if "norm" in name else 0)
    ours, theirs = ModelSpec.from_config(source.config), ModelSpec.from_config(_as_read(model))
    assert ours == theirs


def _as_read(model: transformers.PreTrainedModel) -> dict[str, object]:
    """The model's config with what a GGUF file cannot say: Mistral is Llama there, eps and factors are float32."""
    made = model.config.to_dict()
    made["rms_norm_eps"] = float(np.float32(made["rms_norm_eps"]))
    made["eos_token_id"], made["bos_token_id"] = 2, 1
    if made["model_type"] == "mistral":
        made["model_type"] = "llama"
    for key in ("long_factor", "short_factor"):
        if key in made["rope_parameters"]:
            made["rope_parameters"][key] = [float(np.float32(value)) for value in made["rope_parameters"][key]]
    return made


def test_rows_are_the_rows_of_the_whole(written: tuple[transformers.PreTrainedModel, Path]) -> None:
    source = open_source(str(written[1]))
    for name, info in source.tensors().items():
        whole, rows = source.read(name), info.shape[0]
        for start, stop in ((0, 1), (rows // 3, rows - 1), (rows - 1, rows), (2, 2)):
            assert torch.equal(source.read_rows(name, start, stop), whole[start:stop])


@pytest.mark.parametrize("family", ["llama3-head-dim", "gemma3-small", "qwen2"])
def test_transformers_reads_the_same_file_as_the_same_model(family: str, tmp_path: Path) -> None:
    """Guards the writer of these tests as much as the reader: transformers' own GGUF code is the third party."""
    write_gguf(make_model(config(family)), tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    source = open_source(str(tmp_path / "model.gguf"))
    for name in source.tensors():
        torch.testing.assert_close(source.read(name), theirs.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q5_1", "Q8_0"])
def test_types_are_read_as_they_are_and_blocks_as_bfloat16(kind: str, tmp_path: Path) -> None:
    made = transformers.LlamaConfig(**{**BASE, "hidden_size": 96, "intermediate_size": 64, "head_dim": 16})
    write_gguf(make_model(made), tmp_path / "model.gguf", Kind[kind])
    source = GgufSource("m", tmp_path / "model.gguf")
    dtype = {"F16": torch.float16}.get(kind, torch.bfloat16)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    for tensor in reader.tensors:
        name = hugging_face_name("llama", tensor.name)
        assert name is not None
        if "norm" in name or ".q_proj" in name or ".k_proj" in name:
            continue
        expected = torch.from_numpy(gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type))
        assert source.info(name).dtype == dtype
        assert torch.equal(source.read(name), expected.to(dtype))


def test_llama3_scaling_of_another_context_is_refused(tmp_path: Path) -> None:
    """Only the published constants can be recovered from the divisors; others must not be guessed."""
    made = transformers.LlamaConfig(**BASE, rope_parameters=LLAMA3_SCALING)
    assert llama3_factors(made).max() == 8
    write_gguf(make_model(made), tmp_path / "model.gguf")
    with pytest.raises(UsageError, match=r"model\.gguf.*rope_freqs.*Hugging Face folder"):
        open_source(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("layers", [1, 2])
def test_a_missing_tensor_is_named(layers: int, tmp_path: Path) -> None:
    made = transformers.Qwen3Config(**{**BASE, "num_hidden_layers": layers, "head_dim": 16})
    model = make_model(made)
    write_gguf(model, tmp_path / "model.gguf")
    source = open_source(str(tmp_path / "model.gguf"))
    with pytest.raises(UsageError, match=rf"model\.gguf has no tensor model\.layers\.{layers}\.mlp\.up_proj\.weight"):
        source.read(f"model.layers.{layers}.mlp.up_proj.weight")


def write_one(path: Path, architecture: str, **tensors: np.ndarray) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in tensors.items():
        writer.add_tensor(name.replace("__", "."), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    write_one(tmp_path / "m.gguf", "mamba", token_embd__weight=np.zeros((4, 4), np.float32))
    with pytest.raises(UsageError, match=r"m\.gguf holds a model of architecture 'mamba'; GGUF files of llama, qwen2"):
        open_source(str(tmp_path / "m.gguf"))


def test_missing_metadata_is_named(tmp_path: Path) -> None:
    write_one(tmp_path / "m.gguf", "llama", token_embd__weight=np.zeros((4, 4), np.float32))
    with pytest.raises(UsageError, match=r"m\.gguf has no llama\.attention\.head_count in its metadata"):
        open_source(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("llama.expert_count", 8, "mixture of experts"), ("split.count", 3, "is one of 3 parts: join them")],
)
def test_what_is_more_than_one_plain_model(key: str, value: int, message: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match=message):
        open_source(str(tmp_path / "m.gguf"))


def test_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    model = make_model(config("qwen2-tied"))
    write_gguf(model, tmp_path / "a.gguf")
    write_gguf(model, tmp_path / "b.gguf")
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    write_gguf(model, tmp_path / "c.gguf")
    a, b, c = (open_source(str(tmp_path / f"{name}.gguf")).fingerprint for name in "abc")
    assert a == b
    assert a != c
    assert a.startswith("sha256:")


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("fixture", ["gemma_gguf", "qwen_gguf"])
def test_a_real_config_is_the_one_that_transformers_reads(fixture: str, request: pytest.FixtureRequest) -> None:
    """Half a minute each in transformers; what differs in spelling must not differ in meaning."""
    path = request.getfixturevalue(fixture)
    theirs = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    ours = GgufSource(path.name, path).config
    assert ModelSpec.from_config(ours) == ModelSpec.from_config(theirs.to_dict())
    made = transformers.AutoConfig.for_model(**ours).to_dict()
    differ = {key for key, value in theirs.to_dict().items() if key not in made or made[key] != value}
    assert differ <= {"architectures", "_name_or_path", "_model_name_or_path", "unk_token_id"}


@pytest.mark.real_model
@pytest.mark.parametrize("fixture", ["gemma_gguf", "qwen_gguf"])
def test_a_real_file_equals_the_gguf_package(fixture: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture)
    source = GgufSource(path.name, path)
    spec = ModelSpec.from_config(source.config)
    assert {n: i.shape for n, i in source.tensors().items()} == dict(spec.tensors())
    gemma = source.architecture == "gemma3"
    kinds = set()
    for tensor in source.file.tensors.values():
        ours = hugging_face_name(source.architecture, tensor.name)
        assert ours is not None
        rows = min(tensor.shape[0], 64)
        size = tensor.nbytes // tensor.shape[0] * rows
        raw = np.fromfile(path, dtype=np.uint8, count=size, offset=tensor.offset)
        values = gguf.quants.dequantize(raw, Kind[tensor.type_name]).reshape(rows, *tensor.shape[1:])
        expected = torch.from_numpy(values) - (1 if gemma and "norm" in ours else 0)
        assert torch.equal(source.read_rows(ours, 0, rows), expected.to(source.info(ours).dtype))
        kinds.add(tensor.type_name)
    assert kinds >= ({"Q4_K", "Q5_0", "Q6_K", "Q8_0", "F32"} if gemma else {"Q4_K", "Q6_K", "F32"})
