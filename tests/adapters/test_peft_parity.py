"""The same adapter file in PEFT and in halfbyte gives the same logits, whoever wrote it, on 32-bit and 4-bit bases."""

from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from halfbyte.adapters import LoraOptions, attach, disabled, load_adapter, save_adapter
from halfbyte.errors import UsageError
from halfbyte.linear import segments
from halfbyte.models.fallback import Fallback
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from halfbyte.quant import BlockWeight, QuantOptions
from tests.models.conftest import build_decoder
from tests.models.families import BASE, config, error, make_batch, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call

CLOSE = 5e-5
"""Logits of two float32 programs, in units of their root mean square; the adapters here are large on purpose."""
FAMILIES = ["llama3-gqa", "phi3", "gemma3-small", "qwen3"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lora_r": 4, "lora_alpha": 12},
    "rslora": {"lora_r": 9, "lora_alpha": 5, "use_rslora": True},
    "some-modules": {"lora_r": 3, "target_modules": "o_proj,down_proj"},
    "one-layer": {"lora_r": 3, "target_modules": r"model\.layers\.1\.(self_attn|mlp)\.\w+_proj"},
    "patterns": {
        "lora_r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"o_proj": 7, "layers.0.mlp.down_proj": 2},
        "alpha_pattern": {"down_proj": 3, "model.layers.1.self_attn.o_proj": 20},
    },
    "patterns-rslora": {
        "lora_r": 4,
        "use_rslora": True,
        "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"o_proj": 1},
    },
}


def random_b(model: nn.Module, seed: int = 0) -> None:
    """B is zero at the start, and an adapter of zeros proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def their_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits.float()


def peft_config(options: LoraOptions) -> peft.LoraConfig:
    """The same options as PEFT spells them."""
    targets: Any = options.target_modules
    if isinstance(targets, str) and "," in targets:
        targets = targets.split(",")
    return peft.LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        target_modules=targets,
        use_rslora=options.use_rslora,
        rank_pattern=options.rank_pattern,
        alpha_pattern=options.alpha_pattern,
        task_type="CAUSAL_LM",
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", list(OPTIONS))
def test_ours_in_peft(family: str, kind: str, tmp_path: Path) -> None:
    model = make_model(config(family))
    ids = make_batch((29,)).input_ids
    base = their_logits(model, ids)
    ours = build_decoder(model)
    options = LoraOptions(**OPTIONS[kind])
    attach(ours, options)
    random_b(ours)
    save_adapter(ours, tmp_path, options, base="tiny")
    theirs = their_logits(peft.PeftModel.from_pretrained(model, tmp_path), ids)
    assert error(theirs, base) > 0.1  # the adapter does something
    assert error(ours.logits(ids), theirs) < CLOSE
    with disabled(ours):
        assert error(ours.logits(ids), base) < CLOSE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", list(OPTIONS))
def test_pefts_in_ours(family: str, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)  # PEFT draws A: some draws amplify both sides' float32 rounding beyond what CLOSE allows
    model = make_model(config(family))
    ids = make_batch((29,)).input_ids
    ours = build_decoder(model)
    theirs = peft.get_peft_model(model, peft_config(LoraOptions(**OPTIONS[kind])))
    random_b(theirs)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    adapted = {name for name, segment in segments(ours).items() if segment.adapter is not None}
    assert adapted == {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert error(ours.logits(ids), their_logits(theirs, ids)) < CLOSE


def test_bf16_file_in_peft(tmp_path: Path) -> None:
    """An adapter saved in bf16 means the same to both."""
    model = make_model(config("llama3-gqa"))
    ids = make_batch((29,)).input_ids
    writer, reader = build_decoder(model), build_decoder(model)
    options = LoraOptions(lora_r=4, adapter_dtype="bfloat16")
    attach(writer, options)
    random_b(writer)
    save_adapter(writer, tmp_path, options, base="tiny")
    load_adapter(reader, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    assert error(reader.logits(ids), their_logits(theirs, ids)) < CLOSE


def gpt2(folder: Path) -> tuple[Any, Fallback]:
    made = transformers.GPT2Config(vocab_size=133, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    model = make_model(made)
    model.save_pretrained(folder)
    return model, Fallback.build(open_source(str(folder)))


def test_conv1d_both_ways(tmp_path: Path) -> None:
    """GPT-2 keeps its weights transposed; an adapter's factors have the same shapes all the same."""
    model, ours = gpt2(tmp_path / "base")
    ids = make_batch((29,)).input_ids
    options = LoraOptions(lora_r=4)
    attach(ours, options)
    random_b(ours)
    save_adapter(ours, tmp_path / "ours", options, base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours")
    assert error(ours.logits(ids), their_logits(theirs, ids)) < CLOSE
    theirs.save_pretrained(tmp_path / "theirs")
    _, again = gpt2(tmp_path / "base")
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again.logits(ids), ours.logits(ids))


# -- a 4-bit base: bitsandbytes in transformers against ours ------------------------------------------------------

# Every size divides by 64: bitsandbytes' CPU kernels of 0.50.2 are wrong or crash elsewhere.
SIZES = {**BASE, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}


def quantized_pair(folder: Path, quant_type: str, double_quant: bool, saved: bool) -> tuple[Any, Any]:
    """(transformers' model quantized by bitsandbytes, ours of the same weights).

    saved: ours reads the 4-bit checkpoint that transformers wrote; else both quantize the same 32-bit folder.
    """
    make_model(transformers.LlamaConfig(**{**SIZES, "head_dim": 32})).save_pretrained(folder / "base")
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base",
        quantization_config=four_bit,
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation="eager",
    )
    if saved:
        model.save_pretrained(folder / "four-bit")
    path = folder / ("four-bit" if saved else "base")
    quant = QuantOptions(quant_type=quant_type, double_quant=double_quant)
    return model, decoder_of(path, quant)


def decoder_of(path: Path, quant: QuantOptions) -> Any:
    from halfbyte.models.load import build_decoder as build
    from halfbyte.models.spec import ModelSpec

    source = open_source(str(path))
    return build(source, ModelSpec.from_config(source.config), quant, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("double_quant", "saved"), [(False, False), (False, True), (True, True)])
def test_quantized_base(quant_type: str, double_quant: bool, saved: bool, tmp_path: Path) -> None:
    """Equal dequantized weights; equal logits with ours in PEFT and with PEFT's in ours."""
    model, ours = quantized_pair(tmp_path, quant_type, double_quant, saved)
    for name, segment in segments(ours).items():
        assert isinstance(segment.weight, BlockWeight)
        theirs_4bit = model.get_submodule(name).weight
        dense = bitsandbytes.functional.dequantize_4bit(theirs_4bit.data, theirs_4bit.quant_state)
        assert torch.equal(segment.weight.dequantize(torch.float32), dense), name
    ids = make_batch((29,)).input_ids
    options = LoraOptions(lora_r=4, lora_alpha=12)
    attach(ours, options)
    random_b(ours)
    save_adapter(ours, tmp_path / "adapter", options, base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    theirs.train()  # their evaluation mode repacks the weights for a kernel that rounds to bf16
    assert error(ours.logits(ids), their_logits(theirs, ids)) < CLOSE
    random_b(theirs, seed=1)
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(ours, tmp_path / "theirs")
    assert error(ours.logits(ids), their_logits(theirs, ids)) < CLOSE


def test_double_quantization_on_the_way_in_is_near(tmp_path: Path) -> None:
    """bitsandbytes' CPU code finds 8-bit codes by a table and misses the nearest for some; nothing else differs."""
    model, ours = quantized_pair(tmp_path, "nf4", True, False)
    for name, segment in segments(ours).items():
        theirs_4bit = model.get_submodule(name).weight
        dense = bitsandbytes.functional.dequantize_4bit(theirs_4bit.data, theirs_4bit.quant_state)
        assert error(segment.weight.dequantize(torch.float32), dense) < 2e-2, name


# -- what does not fit --------------------------------------------------------------------------------------------


def test_another_models_adapter(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(make_model(config("qwen3")), peft_config(LoraOptions(lora_r=4)))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="trained on another base"):
        load_adapter(build_decoder(make_model(config("llama3-gqa"))), tmp_path)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True. was passed", "ignore:.*invalid shape. .*lora_B.bias")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_bias": True}, "bias on lora_B"),
        ({"trainable_token_indices": [5, 6]}, "trainable tokens"),
    ],
)
def test_pefts_variants_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Files that PEFT really writes for arithmetic that we do not compute."""
    made = peft.LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM", **changes)
    peft.get_peft_model(make_model(config("llama3-gqa")), made).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_adapter(build_decoder(make_model(config("llama3-gqa"))), tmp_path)


def test_loaded_through_the_public_loader(tmp_path: Path) -> None:
    """The same, from a folder with a tokenizer, through `load_model`."""
    model = make_model(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path / "base")
    tokenizers_of(tmp_path / "base")
    loaded = load_model(ModelOptions(model=str(tmp_path / "base"), device="cpu"), QuantOptions(), torch.float32)
    options = LoraOptions(lora_r=4)
    attach(loaded.model, options)
    random_b(loaded.model)
    save_adapter(loaded.model, tmp_path / "adapter", options, base=str(tmp_path / "base"))
    for name, segment in segments(loaded.model).items():
        model.get_submodule(name).weight.data = segment.weight.dequantize(torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    ids = make_batch((29,)).input_ids
    assert error(loaded.model.logits(ids), their_logits(theirs, ids)) < CLOSE


def tokenizers_of(folder: Path) -> None:
    """A word-level tokenizer, the smallest that loads."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(3, 133)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<unk>")), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
