"""Model folders: every layout that checkpoints come in, and one clear line for every way one can be broken."""

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from halfbyte.errors import UsageError
from halfbyte.models.source import ModelSource, open_source
from halfbyte.models.spec import ModelSpec
from tests.models.families import BASE, FAMILIES, GEMMA, config, make_model


def same(source: ModelSource, state: dict[str, torch.Tensor]) -> None:
    for name, expected in state.items():
        found = source.read(name)
        assert found.dtype == expected.dtype == source.info(name).dtype
        assert torch.equal(found, expected)
        if expected.dim() == 2:
            rows = expected.shape[0]
            assert torch.equal(source.read_rows(name, rows // 3, rows - 1), expected[rows // 3 : rows - 1])


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_as_transformers_saves_it(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = make_model(config(family), dtype=dtype)
    model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    same(source, {n: t for n, t in model.state_dict().items() if n in source.tensors()})
    spec = ModelSpec.from_config(source.config)
    assert {name: info.shape for name, info in source.tensors().items()} == dict(spec.tensors())
    assert (source.kind, source.revision, source.name) == ("folder", None, str(tmp_path))


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return make_model(config("llama3-gqa"))


@pytest.fixture
def folder(model: transformers.PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(model: transformers.PreTrainedModel, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


def test_shards_are_one_model(model: transformers.PreTrainedModel, folder: Path, sharded: Path) -> None:
    one, many = open_source(str(folder)), open_source(str(sharded))
    same(many, model.state_dict())
    assert one.tensors() == many.tensors()
    assert one.fingerprint == many.fingerprint


def test_a_bare_body_gets_its_prefix(model: transformers.PreTrainedModel, tmp_path: Path) -> None:
    model.model.save_pretrained(tmp_path)
    source = open_source(str(tmp_path))
    same(source, {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"})


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_a_multimodal_wrapper_gives_its_language_model(prefix: str, tmp_path: Path) -> None:
    made = transformers.Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 6})
    state = make_model(made).state_dict()
    del state["lm_head.weight"]  # tied
    renamed = {
        name.replace("model.", prefix, 1) if prefix.startswith("model.") else prefix + name: tensor
        for name, tensor in state.items()
    }
    save_file({**renamed, "vision_tower.patch.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    whole = {"model_type": "gemma3", "text_config": made.to_dict(), "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    source = open_source(str(tmp_path))
    same(source, state)
    assert set(source.tensors()) - set(state) == {"vision_tower.patch.weight"}
    assert ModelSpec.from_config(source.config).family == "gemma3_text"


def test_a_single_file_by_another_name(model: transformers.PreTrainedModel, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    same(open_source(str(folder)), model.state_dict())


def test_generation_defaults(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert open_source(str(folder)).generation == {"eos_token_id": [2, 7]}
    (folder / "generation_config.json").unlink()
    assert open_source(str(folder)).generation == {}


def test_fingerprint_sees_names_shapes_and_every_byte(folder: Path) -> None:
    before = open_source(str(folder)).fingerprint
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert open_source(str(folder)).fingerprint != before
    data[-1] ^= 1
    path.write_bytes(bytes(data).replace(b"q_proj", b"x_proj"))
    assert open_source(str(folder)).fingerprint != before
    path.write_bytes(bytes(data))
    assert open_source(str(folder)).fingerprint == before


def test_large_models_are_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.models.model_source.FULL_HASH_BYTES", 1000)
    assert open_source(str(folder)).fingerprint.startswith("sha256-sampled:")


def quantized_by_transformers(folder: Path, out: Path, double: bool, quant_type: str = "nf4") -> Any:
    made = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=made, dtype=torch.bfloat16)
    model.save_pretrained(out)
    return model


@pytest.mark.parametrize(("double", "quant_type"), [(True, "nf4"), (False, "nf4"), (True, "fp4")])
def test_a_bitsandbytes_folder(double: bool, quant_type: str, tmp_path: Path) -> None:
    made = transformers.Qwen2Config(**{**BASE, "hidden_size": 192, "intermediate_size": 320, "head_dim": 32})
    plain = make_model(made)
    plain.save_pretrained(tmp_path / "plain")
    theirs = quantized_by_transformers(tmp_path / "plain", tmp_path / "bnb", double, quant_type)
    source = open_source(str(tmp_path / "bnb"))
    spec = ModelSpec.from_config(source.config)
    assert {name: info.shape for name, info in source.tensors().items()} == dict(spec.tensors())
    for linear in spec.linears():
        name = f"{linear.name}.weight"
        held, module = source.prequantized(name), theirs.get_submodule(linear.name)
        assert held is not None
        assert held.format == f"{quant_type}{'+dq' if double else ''}"
        exact = _dequantized(module)
        assert torch.equal(held.dequantize(torch.float32), exact)
        assert torch.equal(source.read(name), exact.bfloat16())
        assert torch.equal(source.read_rows(name, 3, 11), exact.bfloat16()[3:11])
    assert source.prequantized("model.norm.weight") is None
    assert (source.blocks, open_source(str(tmp_path / "plain")).blocks) == ("bitsandbytes", None)
    assert source.fingerprint != open_source(str(tmp_path / "plain")).fingerprint


def _dequantized(module: Any) -> torch.Tensor:
    """bitsandbytes' own values in float32: its CPU path is wrong for some widths, so code by code."""
    state = module.weight.quant_state
    packed = module.weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: state.shape.numel()].int()
    absmax = state.absmax
    if state.nested:
        nested = state.state2
        scale = nested.absmax.repeat_interleave(nested.blocksize)[: absmax.numel()]
        absmax = nested.code[absmax.int()] * scale + state.offset.float()
    scale = absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes] * scale).view(state.shape)


# -- what can be wrong with a folder ------------------------------------------------------------------------------


def fails(path: Path | str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value)
    assert str(path).split("/")[-1] in str(caught.value)


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "is not a model folder: it has no config.json")
    fails(tmp_path / "nowhere", "does not exist: give a model folder")
    (tmp_path / "notes.txt").write_text("hello")
    fails(tmp_path / "notes.txt", "is not a model")
    with pytest.raises(UsageError, match="revision 'x' is for Hub models"):
        open_source(str(tmp_path), revision="x")


def test_an_adapter_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    fails(tmp_path, r"is an adapter.*\(org/base\).*adapter_path")


def test_a_file_of_a_folder(folder: Path) -> None:
    fails(folder / "model.safetensors", f"give its folder, {folder}")


def test_a_folder_of_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    fails(tmp_path, r"holds GGUF files: name one, for example .*a\.gguf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": ', r"config\.json, line 1: not JSON"),
        ('{\n"model_type": llama}', r"config\.json, line 2"),
        ("[1]", "should hold a JSON object and holds a list"),
        ("{}", "has no model_type"),
        ('{"model_type": 3}', "has no model_type"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_broken_configs(text: str, message: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        open_source(str(folder))


def test_config_that_is_not_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(UsageError, match=r"config\.json"):
        open_source(str(folder))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "aqlm", "bits": 2}, "'aqlm'"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes 8-bit"),
    ],
)
def test_foreign_quantization_is_named(quantization: dict[str, Any], message: str, folder: Path) -> None:
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**plain, "quantization_config": quantization}))
    with pytest.raises(UsageError, match=rf"config\.json: the model is quantized with {message}.*use the original"):
        open_source(str(folder))


def test_pickles_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    fails(folder, r"has a config\.json but no weights")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    fails(folder, r"only as pickles \(pytorch_model\.bin\).*never loaded.*safetensors")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UsageError, match=rf"{shard.name} is missing.*download"):
        open_source(str(sharded))


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    fails(sharded, "no model.safetensors.index.json")


def test_an_index_that_lies(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    last = sorted(set(index["weight_map"].values()))[-1]
    name = next(name for name, shard in index["weight_map"].items() if shard != last)
    for value, message in (("../../etc/passwd", "not a file beside it"), (last, f"has no tensor {name}")):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], name: value}}))
        with pytest.raises(UsageError, match=message):
            open_source(str(sharded))
    for broken in ({}, {"weight_map": []}, {"weight_map": {"a": 1}}):
        path.write_text(json.dumps(broken))
        with pytest.raises(UsageError, match=r"index\.json has no weight_map"):
            open_source(str(sharded))


def test_a_half_written_file_at_every_length(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for length in (0, 1, 7, 8, 9, 8 + header // 2, 8 + header, 8 + header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UsageError, match=r"model\.safetensors.*(download|copy)") as caught:
            open_source(str(folder))
        assert "\n" not in str(caught.value)
    path.write_bytes(whole + b"x")
    fails_with = pytest.raises(UsageError, match="half-written")
    with fails_with:
        open_source(str(folder))


def hostile(header: object, data: int = 16) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def tensor(dtype: object = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    return {"t": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 62) + b"{}",
        hostile(b"not json"),
        hostile(b"[]"),
        hostile(b"[" * 50_000),
        hostile({"t": 1}),
        hostile({"t": {}}),
        hostile(tensor("F99")),
        hostile(tensor(["F32"])),
        hostile(tensor(shape=[-4])),
        hostile(tensor(shape=[1 << 40, 1 << 40], offsets=(0, 1 << 82))),
        hostile(tensor(shape="4")),
        hostile(tensor(shape=[True])),
        hostile(tensor(offsets=(0, 12))),
        hostile(tensor(offsets=(-16, 0))),
        hostile(tensor(offsets=(4, 20))),
        hostile(tensor(offsets=(0,))),
        hostile(tensor(offsets=("0", "16"))),
        hostile({**tensor(), "u": tensor()["t"]}),
    ],
)
def test_hostile_headers(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match=r"model\.safetensors") as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32))
def test_damaged_headers_never_escape(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    base = tmp_path_factory.getbasetemp() / "damaged"
    if not base.exists():
        base.mkdir()
        (base / "config.json").write_text('{"model_type": "llama"}')
        save_file({f"t{i}": torch.ones(3, 4) for i in range(3)}, base / "original")
    data, chance = bytearray((base / "original").read_bytes()), random.Random(seed)
    for _ in range(chance.randrange(1, 4)):
        data[chance.randrange(len(data) - 144)] = chance.randrange(256)
    (base / "model.safetensors").write_bytes(bytes(data))
    try:
        source = open_source(str(base))
        for name in source.tensors():
            source.read(name)
    except UsageError:
        pass


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    source = open_source(str(folder))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(UsageError, match="cut off while it was read"):
        [source.read(name) for name in source.tensors()]


def test_a_broken_bitsandbytes_tensor_is_named(tmp_path: Path) -> None:
    made = transformers.Qwen2Config(**{**BASE, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16})
    make_model(made).save_pretrained(tmp_path / "plain")
    quantized_by_transformers(tmp_path / "plain", tmp_path / "bnb", double=True)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "bnb" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for change, message in (
        ({f"{name}.absmax": None}, "absmax is missing"),
        ({f"{name}.quant_state.bitsandbytes__nf4": torch.tensor([1, 2], dtype=torch.uint8)}, "bitsandbytes__nf4"),
        ({name: state[name][:-3].contiguous()}, "bytes"),
    ):
        shutil.copytree(tmp_path / "bnb", tmp_path / "broken", dirs_exist_ok=True)
        broken = {k: v for k, v in {**state, **change}.items() if v is not None}
        save_file(broken, tmp_path / "broken" / "model.safetensors")
        with pytest.raises(UsageError, match=message) as caught:
            open_source(str(tmp_path / "broken")).read(name)
        assert str(tmp_path / "broken") in str(caught.value)
