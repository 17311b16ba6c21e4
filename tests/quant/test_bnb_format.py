"""The 4-bit state dict against bitsandbytes itself, and a whole model against transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.ops import levels
from halfbyte.quant import BlockWeight, QuantOptions, bnb_keys, quantize

NAME = "model.layers.0.mlp.down_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def theirs(weight: Tensor, quant_type: str, nested: bool, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The state dict that bitsandbytes' own layer saves for `weight`, named NAME."""
    from bitsandbytes.nn import Linear4bit

    out_features, in_features = weight.shape
    layer = Linear4bit(
        in_features, out_features, bias=False, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    layer.weight.data = weight.clone()
    layer.to("cpu")
    return {NAME + key.removeprefix("weight"): value for key, value in layer.state_dict().items()}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_keys_dtypes_shapes_and_bits(quant_type, nested, dtype):
    x = torch.randn(40, 96, dtype=dtype)
    expected = theirs(x, quant_type, nested)
    ours = quantize(x, QuantOptions(quant_type=quant_type, double_quant=nested)).to_bnb(NAME)
    assert list(ours) == list(expected)
    for key, value in expected.items():
        assert ours[key].dtype == value.dtype, key
        if nested and key.endswith(".absmax"):
            # The CPU backend of bitsandbytes finds 8-bit codes by a coarse table: a few are not the nearest.
            assert ours[key].shape == value.shape
            assert (ours[key].int() - value.int()).abs().max() <= 1
        else:
            assert torch.equal(ours[key], value), key


@pytest.mark.parametrize("nested", [False, True])
def test_there_and_back(nested):
    x = torch.randn(37, 75, dtype=torch.bfloat16)
    weight = quantize(x, QuantOptions(quant_type="fp4", blocksize=128, double_quant=nested))
    again = BlockWeight.from_bnb(weight.to_bnb(NAME), NAME)
    assert (again.shape, again.format, again.blocksize, again.dtype) == (weight.shape, weight.format, 128, x.dtype)
    assert torch.equal(again.dequantize(torch.float32), weight.dequantize(torch.float32))


def test_nibbles_stored_as_bf16_are_the_same_nibbles():
    # FSDP wants float parameters, so bitsandbytes can show the bytes as bf16 (`quant_storage`).
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    stored = theirs(x, "nf4", True, torch.bfloat16)
    assert stored[NAME].dtype == torch.bfloat16
    plain = BlockWeight.from_bnb(theirs(x, "nf4", True), NAME)
    assert torch.equal(BlockWeight.from_bnb(stored, NAME).codes, plain.codes)


def test_the_offset_is_float32_whatever_the_file_says():
    tensors = quantize(torch.randn(64, 64), QuantOptions()).to_bnb(NAME)
    plain = json.loads(bytes(tensors[STATE].tolist()))
    plain["nested_dtype"], plain["nested_offset"] = "bfloat16", 0.123456789
    tensors[STATE] = torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)
    offset = BlockWeight.from_bnb(tensors, NAME).nested_offset
    assert offset is not None
    assert offset.dtype == torch.float32
    assert offset.item() == pytest.approx(0.123456789, rel=1e-7)


def test_the_files_own_maps_are_honoured_and_written_back():
    weight = quantize(torch.randn(64, 64), QuantOptions())
    tensors = weight.to_bnb(NAME)
    tensors[f"{NAME}.quant_map"] = levels.levels("nf4") * 0.5
    tensors[f"{NAME}.nested_quant_map"] = levels.dynamic_map() * 0.25
    odd = BlockWeight.from_bnb(tensors, NAME)
    assert odd.table is not None
    assert odd.nested_table is not None
    assert weight.nested_absmax is not None
    assert weight.nested_offset is not None
    constants = levels.dynamic_map()[weight.absmax.int()] * 0.25 * weight.nested_absmax + weight.nested_offset
    high_low = torch.stack([weight.codes >> 4, weight.codes & 15], 1).view(64, 64)
    expected = (levels.levels("nf4") * 0.5)[high_low.int()] * constants.view(64, 1)
    assert torch.equal(odd.dequantize(torch.float32), expected)
    back = odd.to_bnb(NAME)
    assert all(torch.equal(back[key], value) for key, value in tensors.items())
    usual = BlockWeight.from_bnb(weight.to_bnb(NAME), NAME)
    assert usual.table is None
    assert usual.nested_table is None


def test_keys_are_grouped_by_weight():
    nested, flat = (
        quantize(torch.randn(8, 64), QuantOptions()),
        quantize(torch.randn(8, 64), QuantOptions(double_quant=False)),
    )
    tensors = (
        nested.to_bnb("a.weight") | flat.to_bnb("b.weight") | {"norm.weight": torch.ones(8), "b.bias": torch.ones(8)}
    )
    groups = bnb_keys(tensors)
    assert list(groups) == ["a.weight", "b.weight"]
    assert set(groups["a.weight"]) == set(nested.to_bnb("a.weight"))
    assert set(groups["b.weight"]) == set(flat.to_bnb("b.weight"))
    assert groups["a.weight"][0] == "a.weight"


def _plain(**changes: object) -> Tensor:
    plain = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
    plain |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
    plain = {key: value for key, value in (plain | changes).items() if value != "absent"}
    return torch.tensor(list(json.dumps(plain).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (STATE, None, "neither is there: not a whole bitsandbytes"),
        (NAME, None, f"{NAME} is missing"),
        (f"{NAME}.absmax", None, r"\.absmax is missing"),
        (f"{NAME}.quant_map", None, r"\.quant_map is missing"),
        (f"{NAME}.nested_quant_map", None, r"\.nested_quant_map is missing"),
        (STATE.replace("nf4", "fp4"), _plain(), "both are there"),
        (STATE, torch.zeros(10), "the uint8 bytes of a JSON object"),
        (STATE, torch.tensor(list(b"{not json"), dtype=torch.uint8), "__nf4: Invalid JSON"),
        (STATE, torch.tensor([255, 254], dtype=torch.uint8), "__nf4: Invalid JSON"),
        (STATE, torch.tensor(list(b"[]"), dtype=torch.uint8), "__nf4: "),
        (STATE, _plain(quant_type="fp4"), "its quant_type says fp4"),
        (STATE, _plain(quant_type="int4"), "quant_type: "),
        (STATE, _plain(blocksize=100), "blocksize: .*one of 32, 64"),
        (STATE, _plain(dtype="float8"), "dtype: "),
        (STATE, _plain(shape=[64]), "shape"),
        (STATE, _plain(shape=[64, -64]), "shape"),
        (STATE, _plain(shape="absent"), "shape: Field required"),
        (STATE, _plain(shape=[64, 66]), r"2048 bytes, but a shape of \[64, 66\] needs 2112"),
        (STATE, _plain(nested_offset="absent"), "nested_offset or nested_blocksize is missing"),
        (STATE, _plain(nested_offset=float("nan")), "nested_offset: "),
        (NAME, torch.zeros(2047, 1, dtype=torch.uint8), "2047 bytes"),
        (f"{NAME}.absmax", torch.zeros(63, dtype=torch.uint8), r"\[63\], torch.uint8 \[64\] is needed"),
        (f"{NAME}.absmax", torch.zeros(64), "torch.uint8"),
        (f"{NAME}.nested_absmax", torch.zeros(2), r"\[1\] is needed"),
        (f"{NAME}.nested_absmax", torch.zeros(1, dtype=torch.bfloat16), "torch.float32"),
        (f"{NAME}.nested_absmax", torch.tensor([torch.inf]), "NaN or infinite"),
        (f"{NAME}.quant_map", torch.zeros(15), r"\[16\] is needed"),
        (f"{NAME}.quant_map", torch.full((16,), torch.nan), "NaN or infinite"),
    ],
)
def test_a_malformed_file_is_one_clear_error(key, value, message):
    tensors = quantize(torch.randn(64, 64), QuantOptions()).to_bnb(NAME)
    tensors = {k: v for k, v in (tensors | {key: value}).items() if v is not None}
    with pytest.raises(UsageError, match=message) as caught:
        BlockWeight.from_bnb(tensors, NAME)
    assert "\n" not in str(caught.value)
    assert NAME in str(caught.value)


def test_the_checkpoint_that_bitsandbytes_corrupts_after_evaluation_is_refused():
    # FACTS of 0.50.2: `state_dict()` after an evaluation on AVX512-BF16 holds a transposed bf16 absmax.
    tensors = quantize(torch.randn(64, 128), QuantOptions(double_quant=False)).to_bnb(NAME)
    tensors[f"{NAME}.absmax"] = tensors[f"{NAME}.absmax"].view(64, 2).T.bfloat16()
    with pytest.raises(UsageError, match="a known fault of bitsandbytes"):
        BlockWeight.from_bnb(tensors, NAME)


@pytest.mark.parametrize("quant_type", ["int4", "int8"])
def test_formats_that_bitsandbytes_lacks_are_not_written(quant_type):
    with pytest.raises(UsageError, match=f"know nf4 and fp4, not {quant_type}"):
        quantize(torch.randn(8, 64), QuantOptions(quant_type=quant_type)).to_bnb(NAME)


def _tiny_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype="bfloat16",
    )
    return LlamaForCausalLM(config).bfloat16()


def _save_quantized(model: torch.nn.Module, folder: Path, options: QuantOptions) -> dict[str, BlockWeight]:
    """Write `model` as a bitsandbytes 4-bit folder: all linears but the head, and the rest in bf16."""
    weights: dict[str, BlockWeight] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("_proj.weight"):
            weights[name] = quantize(tensor, options)
            tensors |= weights[name].to_bnb(name)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict()
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": options.quant_type,
        "bnb_4bit_use_double_quant": options.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return weights


QUANTIZATIONS = [("nf4", True), ("nf4", False), ("fp4", True)]
# transformers and bitsandbytes warn of their own future, not of ours.
THEIRS = pytest.mark.filterwarnings("ignore")


@THEIRS
@pytest.mark.parametrize(("quant_type", "nested"), QUANTIZATIONS)
def test_transformers_loads_what_we_write(tmp_path, quant_type, nested):
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    weights = _save_quantized(_tiny_llama(), tmp_path, QuantOptions(quant_type=quant_type, double_quant=nested))
    assert len(weights) == 14
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    for name, weight in weights.items():
        layer = loaded.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, bitsandbytes.nn.Linear4bit)
        value = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, weight.dequantize(torch.bfloat16)), name
    reference = _tiny_llama()
    for name, weight in weights.items():
        reference.get_parameter(name).data = weight.dequantize(torch.bfloat16)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, atol=0.02, rtol=0.02)


@THEIRS
@pytest.mark.parametrize(("quant_type", "nested"), QUANTIZATIONS)
def test_we_load_what_transformers_writes(tmp_path, quant_type, nested):
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    _tiny_llama().save_pretrained(tmp_path / "plain")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config, device_map="cpu")
    model.save_pretrained(tmp_path / "quantized")
    tensors = load_file(tmp_path / "quantized" / "model.safetensors")
    names = list(bnb_keys(tensors))
    assert len(names) == 14
    for name in names:
        state = model.get_submodule(name.removesuffix(".weight")).weight
        expected = bitsandbytes.functional.dequantize_4bit(state.data, state.quant_state)
        weight = BlockWeight.from_bnb(tensors, name)
        assert weight.format == quant_type + ("+dq" if nested else "")
        assert torch.equal(weight.dequantize(weight.dtype), expected), name
        source = _tiny_llama().get_parameter(name).data
        ours = quantize(source, QuantOptions(quant_type=quant_type, double_quant=nested))
        assert torch.equal(ours.codes, weight.codes), name
