"""The 4-bit folder in transformers' and bitsandbytes' hands: the same weights, bit for bit, and the same answers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from halfbyte.errors import UsageError
from halfbyte.export import bnb_folder
from halfbyte.export.bnb_folder import quantization_config, write_bnb_folder
from halfbyte.export.deltas import read_deltas
from halfbyte.export.merged_tensors import plan_tensors
from halfbyte.export.planned_source import PlannedSource
from halfbyte.export.safetensors_file import Planned
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import ModelSource, open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import BlockWeight, QuantOptions, quantize
from tests.evaluate.conftest import VOCAB, byte_tokenizer
from tests.export.conftest import Trained, make_adapter, make_trained
from tests.models import families

# bitsandbytes' CPU kernels need whole blocks in a row and rows by 32: for other widths its dequantization is wrong and
# its packed product refuses. What the files hold there is compared in tests/quant.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
IDS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0))
DOUBLE = QuantOptions(quant_type="nf4", blocksize=64, double_quant=True)
PLAIN = QuantOptions(quant_type="fp4", blocksize=128, double_quant=False)


def wide(name: str, folder: Path, quant: QuantOptions | None = DOUBLE) -> Trained:
    """A family's random model in SIZES, and an adapter on it."""
    config = families.config(name)
    config.update({**SIZES, "vocab_size": VOCAB} | ({"head_dim": 32} if "gemma" in name else {}))
    model = families.make_model(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    return Trained(folder / "base", model, make_adapter(folder / "base", folder / "adapter", quant))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return wide("llama3-gqa", tmp_path_factory.mktemp("wide"))


def planned_of(
    trained: Trained, dtype: torch.dtype = torch.bfloat16, quant: QuantOptions | None = DOUBLE
) -> tuple[list[Planned], ModelSource]:
    source = open_source(str(trained.folder))
    return plan_tensors(trained.options, source, read_deltas(trained.adapter), quant, dtype), source


def in_transformers(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", attn_implementation="eager")


def their_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every 4-bit weight of a loaded model as bitsandbytes dequantizes it."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, dequantize_4bit(module.weight.data, module.weight.quant_state)


@pytest.mark.parametrize("quant", [DOUBLE, PLAIN], ids=["nf4+dq", "fp4"])
@pytest.mark.parametrize("name", ["llama3-gqa", "gemma3-small", "phi3", "qwen2"])
def test_transformers_loads_the_weights_that_we_dequantize(name: str, quant: QuantOptions, tmp_path: Path) -> None:
    trained = wide(name, tmp_path, quant)
    planned, source = planned_of(trained, quant=quant)
    (tmp_path / "out").mkdir()
    write_bnb_folder(tmp_path / "out", planned, source, quant, trained.adapter)
    theirs = in_transformers(tmp_path / "out")
    ours = PlannedSource(planned, source)
    seen = 0
    for linear, weight in their_weights(theirs):
        expected = quantize(ours.read(f"{linear}.weight"), quant).dequantize(torch.bfloat16)
        assert torch.equal(weight, expected), linear
        seen += 1
    assert seen == len(ModelSpec.from_config(source.config).linears())
    state = theirs.state_dict()
    for tensor in planned:
        if tensor.name.endswith(("embed_tokens.weight", "norm.weight", "lm_head.weight", ".bias")):
            assert torch.equal(state[tensor.name], ours.read(tensor.name)), tensor.name


@pytest.mark.parametrize("name", ["llama3-gqa", "gemma3-small"])
def test_both_programs_say_the_same(name: str, tmp_path: Path) -> None:
    trained = wide(name, tmp_path)
    planned, source = planned_of(trained, torch.float32)
    (tmp_path / "out").mkdir()
    write_bnb_folder(tmp_path / "out", planned, source, DOUBLE, trained.adapter)
    loaded = load_model(ModelOptions(model=str(tmp_path / "out")), DOUBLE, torch.float32, "cpu")
    assert any(isinstance(module, BlockWeight) for module in loaded.model.modules())
    ours = loaded.model.logits(IDS)  # type: ignore[operator]
    model = in_transformers(tmp_path / "out", torch.float32)
    model.train()  # the same without dropout; in evaluation its CPU kernels round the blocks' constants to bfloat16
    with torch.no_grad():
        theirs = model(IDS[None]).logits[0]
    torch.testing.assert_close(theirs.float(), ours, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(trained.folder, dtype=torch.float32)(IDS[None]).logits[0]
    assert (theirs - base).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids


def test_linears_that_the_pattern_leaves_out_stay_16_bit(llama: Trained, tmp_path: Path) -> None:
    quant = DOUBLE.model_copy(update={"quant_pattern": {"o_proj": "bf16", "layers.1.mlp.down_proj": "fp4"}})
    planned, source = planned_of(llama, quant=None)
    write_bnb_folder(tmp_path, planned, source, quant, llama.adapter)
    theirs = in_transformers(tmp_path)
    names = [name for name, _ in their_weights(theirs)]
    assert not any(name.endswith(("o_proj", "lm_head")) for name in names)
    assert len(names) == 12
    ours = PlannedSource(planned, source)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(theirs.state_dict()[name], ours.read(name))
    fp4 = dict(their_weights(theirs))["model.layers.1.mlp.down_proj"]
    expected = quantize(ours.read("model.layers.1.mlp.down_proj.weight"), quant.model_copy(update=dict(PLAIN)))
    assert fp4.shape == expected.shape
    kept = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert kept == ["lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in range(2))]


def test_the_file_is_streamed_in_order_and_aligned(gemma: Trained, tmp_path: Path) -> None:
    planned, source = planned_of(gemma)
    write_bnb_folder(tmp_path, planned, source, DOUBLE, gemma.adapter)
    file = tmp_path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    assert entries.pop("__metadata__") == {"format": "pt"}
    widths = {"U8": 1, "BF16": 2, "F32": 4}
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        assert start == at, name
        assert (8 + length + start) % widths[entry["dtype"]] == 0, name
        at = stop
    assert 8 + length + at == len(raw)
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == set(entries)


def test_shards_have_an_index(llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, source = planned_of(llama)
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    write_bnb_folder(tmp_path / "one", planned, source, DOUBLE, llama.adapter)
    monkeypatch.setattr(bnb_folder, "_SHARD_BYTES", 100_000)
    write_bnb_folder(tmp_path / "many", planned, source, DOUBLE, llama.adapter)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = load_file(tmp_path / "one" / "model.safetensors")
    many = {k: v for path in (tmp_path / "many").glob("*.safetensors") for k, v in load_file(path).items()}
    assert len(set(index["weight_map"].values())) > 1
    assert index["weight_map"].keys() == many.keys() == one.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert all(torch.equal(many[key], one[key]) for key in one)
    ours, theirs = dict(their_weights(in_transformers(tmp_path / "one"))), in_transformers(tmp_path / "many")
    assert all(torch.equal(weight, ours[name]) for name, weight in their_weights(theirs))


def test_what_bitsandbytes_lacks_is_refused(llama: Trained, tmp_path: Path) -> None:
    planned, source = planned_of(llama)
    pattern = DOUBLE.model_copy(update={"quant_pattern": {"up_proj": "int8"}})
    for quant in (QuantOptions(quant_type="int4"), QuantOptions(quant_type="e2m1"), pattern):
        with pytest.raises(UsageError, match=r"know nf4 and fp4, not (int|e2m1)"):
            write_bnb_folder(tmp_path, planned, source, quant, llama.adapter)
    assert not any(tmp_path.iterdir())


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    trained = make_trained("gpt2", tmp_path)
    planned, source = planned_of(trained, quant=None)
    with pytest.raises(UsageError, match="this is a gpt2: merge it, and load the folder with load_in_4bit"):
        write_bnb_folder(tmp_path / "adapter", planned, source, DOUBLE, trained.adapter)


def test_the_config_says_what_transformers_writes() -> None:
    from transformers import BitsAndBytesConfig

    ours = quantization_config(DOUBLE, "bfloat16")
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    assert all(theirs[key] == value for key, value in ours.items())
