"""GPTQ and AWQ folders as bases: what is read from them, what is kept, and what is refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfbyte.adapters import LoraOptions, attach
from halfbyte.batch import Batch
from halfbyte.errors import UsageError
from halfbyte.export import merged_tensors
from halfbyte.export.merged_tensors import base_is_the_sources_own
from halfbyte.linear import segments
from halfbyte.models.decoder import Decoder
from halfbyte.models.fallback import Fallback
from halfbyte.models.group_folder import GroupFolder
from halfbyte.models.load import build_decoder as build_from
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import ModelSource, open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.plan.memory import Job, base_bytes
from halfbyte.quant import DenseWeight, GroupWeight, QuantOptions
from tests.models import families
from tests.models.group_files import FORMS, SIZES, Form, change_config, write_group_folder
from tests.quant.group_codes import exact

IDS = torch.arange(1, 40)
Q = "model.layers.0.self_attn.q_proj"


def make_model(family: str = "llama3-head-dim") -> Any:
    config = families.config(family)
    config.vocab_size = 136  # whole words of codes
    for key, value in SIZES.items():
        if not (family == "phi3" and key == "head_dim"):  # there it follows from the others
            setattr(config, key, value)
    return families.make_model(config)


def write(tmp_path: Path, form: Form, family: str = "llama3-head-dim") -> Path:
    write_group_folder(make_model(family), tmp_path / "model", form)
    return tmp_path / "model"


def build(folder: Path, quant: QuantOptions | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    source = open_source(str(folder))
    return build_from(source, ModelSpec.from_config(source.config), quant, dtype, torch.device("cpu"))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_read(form: str, tmp_path: Path) -> None:
    model = make_model()
    plain = model.state_dict()
    made = write_group_folder(model, tmp_path, FORMS[form])
    source = open_source(str(tmp_path))
    spec = ModelSpec.from_config(source.config)
    assert {name: info.shape for name, info in source.tensors().items()} == dict(spec.tensors())
    assert set(made) == {linear.name for linear in spec.linears()}
    assert source.prequantized_bytes().keys() == {f"{name}.weight" for name in made}
    assert source.blocks == FORMS[form].method
    for name, codes in made.items():
        held = source.prequantized(f"{name}.weight")
        assert isinstance(held, GroupWeight)
        assert held.format == f"{FORMS[form].method}-{FORMS[form].bits}bit"
        assert held.nbytes == source.prequantized_bytes()[f"{name}.weight"]
        assert (held.group_of is not None) == FORMS[form].act_order
        expected = exact(codes).float()
        assert torch.equal(held.dequantize(torch.float32), expected)
        assert torch.equal(source.read(f"{name}.weight"), expected)  # config.json says float32
        assert torch.equal(source.read_rows(f"{name}.weight", 3, 11), expected[3:11])
        assert not source.reads_rows(f"{name}.weight")
    norm = "model.norm.weight"
    assert source.prequantized(norm) is None
    assert torch.equal(source.read(norm), plain[norm])
    assert source.reads_rows(norm)


@pytest.mark.parametrize(
    ("family", "form"),
    [("llama3-head-dim", form) for form in FORMS]
    + [(family, form) for family in ("qwen2", "gemma3-small", "phi3") for form in ("gptq-act-order", "awq")],
)
def test_a_base_to_train_on(family: str, form: str, tmp_path: Path) -> None:
    """The codes are kept, whoever multiplies sees the file's values, and the plan knows their size."""
    folder = write(tmp_path, FORMS[form], family)
    kept, plain = build(folder, QuantOptions()), build(folder)
    source = open_source(str(folder))
    for name, segment in segments(kept).items():
        assert isinstance(segment.weight, GroupWeight)
        assert isinstance(segments(plain)[name].weight, DenseWeight)
    assert error(kept.logits(IDS), plain.logits(IDS)) < 1e-5
    assert_planned(source, kept)


def assert_planned(source: ModelSource, kept: Decoder, quant: QuantOptions | None = None) -> None:
    """The plan's bytes of the base are those that are held."""
    job = Job("qlora", "float32", quant or QuantOptions(), LoraOptions(), held=source.prequantized_bytes())
    held = sum(t.numel() * t.element_size() for t in {id(t): t for t in kept.buffers()}.values())
    norms = sum(p.numel() * 4 for p in kept.parameters())
    tables = sum(b.numel() * b.element_size() for n, b in kept.named_buffers() if "rotary" in n or "inv_freq" in n)
    spec = ModelSpec.from_config(source.config)
    assert abs(sum(base_bytes(spec, job)) - (held - tables + norms)) <= 0.02 * held


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("form", ["gptq", "gptq-8-act-order", "awq"])
def test_gradients_through_the_codes(form: str, tmp_path: Path) -> None:
    """An adapter on the file's codes gets the gradients that it gets on the dequantized weights."""
    folder = write(tmp_path, FORMS[form])
    batch = Batch(IDS[:-1], torch.arange(len(IDS) - 1), IDS[1:], (len(IDS) - 1,), (0,))
    grads = []
    for quant in (QuantOptions(), None):
        decoder = build(folder, quant)
        attach(decoder, LoraOptions(lora_r=4), seed=3)
        for segment in segments(decoder).values():
            assert segment.adapter is not None
            torch.nn.init.normal_(segment.adapter.lora_B, std=0.1, generator=torch.Generator().manual_seed(5))
        loss, _ = decoder.loss(batch)
        loss.backward()
        grads.append({name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() != set()
    for name, grad in grads[0].items():
        assert error(grad, grads[1][name]) < 1e-4


def test_in_other_words(tmp_path: Path) -> None:
    """Requantized where asked; a pattern's 16 bits are honoured; without quantization 16 bits."""
    folder = write(tmp_path, FORMS["gptq"])
    again = build(folder, QuantOptions(requantize=True, blocksize=32))
    assert {segment.weight.format for segment in segments(again).values()} == {"nf4+dq"}
    mixed = build(folder, QuantOptions(quant_type="int8", quant_pattern={"o_proj": "bf16"}))
    formats = {name.rsplit(".", 1)[-1]: segment.weight.format for name, segment in segments(mixed).items()}
    assert formats.pop("o_proj") == "bf16"
    assert set(formats.values()) == {"gptq-4bit"}
    change_config(folder, dtype="bfloat16")
    source = open_source(str(folder))
    assert source.info(f"{Q}.weight").dtype == torch.bfloat16
    held = source.prequantized(f"{Q}.weight")
    assert held is not None
    assert held.source_dtype == torch.bfloat16
    assert torch.equal(source.read(f"{Q}.weight"), held.dequantize(torch.float32).bfloat16())


def test_a_quantized_head(tmp_path: Path) -> None:
    folder = write(tmp_path, Form(head=True))
    kept, plain = build(folder, QuantOptions()), build(folder)
    assert kept.head.format == "gptq-4bit"
    assert plain.head.format == "fp32"
    assert_planned(open_source(str(folder)), kept)
    assert error(kept.logits(IDS), plain.logits(IDS)) < 1e-5


def test_a_quantized_head_is_copied_from_one_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, Form(head=True))
    source = open_source(str(folder))
    monkeypatch.setattr(merged_tensors, "_PIECE", 960)
    options = ModelOptions(model=str(folder))
    planned = merged_tensors.plan_tensors(options, source, {}, None, torch.bfloat16)
    (head,) = (tensor for tensor in planned if tensor.name == "lm_head.weight")
    expected = source.read(head.name).bfloat16()
    read: list[str] = []
    weight = GroupFolder.weight
    monkeypatch.setattr(GroupFolder, "weight", lambda *args: read.append(args[1]) or weight(*args))
    pieces = list(head.rows())
    assert len(pieces) == 14
    assert torch.equal(torch.cat(pieces), expected)
    assert read == [head.name]


def test_modules_that_the_file_left_alone(tmp_path: Path) -> None:
    """GPTQModel's rules that skip modules, and transformers' lists, say what the tensors' names show: they stay so."""
    folder = write(tmp_path, FORMS["gptq"])
    tensors = load_file(folder / "model.safetensors")
    value = open_source(str(folder)).read(f"{Q}.weight")
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{Q}.{suffix}"]
    save_file(tensors | {f"{Q}.weight": value}, folder / "model.safetensors", {"format": "pt"})
    rules = {"dynamic": {f"-:{Q}": {}}, "modules_in_block_to_quantize": [["self_attn.k_proj"]]}
    change_config(folder, quantization_config=Form().config | rules)
    other = "model.layers.1.self_attn.q_proj"
    kept = build(folder, QuantOptions(blocksize=32))
    assert torch.equal(segments(kept)[Q].weight.dequantize(torch.float32), value)
    assert isinstance(segments(kept)[Q].weight, DenseWeight)
    assert segments(kept)[other].weight.format == "gptq-4bit"
    source = open_source(str(folder))
    assert base_is_the_sources_own(source, QuantOptions())
    again = QuantOptions(blocksize=32, requantize=True)
    assert not base_is_the_sources_own(source, again)
    assert {segments(build(folder, again))[name].weight.format for name in (Q, other)} == {"nf4+dq"}
    asked = QuantOptions(quant_pattern={"k_proj": "fp32", "q_proj": "nf4"})  # a quantized format leaves the file's own
    assert isinstance(segments(build(folder, asked))[Q].weight, DenseWeight)
    assert_planned(source, kept)
    assert_planned(source, build(folder, asked), asked)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("form", ["gptq-asym", "awq"])
def test_other_architectures(kind: str, form: str, tmp_path: Path) -> None:
    """Through transformers' module too, also where its Conv1D lies turned around."""
    if kind == "gpt2":
        made: Any = transformers.GPT2Config(vocab_size=133, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    else:
        made = transformers.GPTNeoXConfig(
            vocab_size=133, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
    write_group_folder(families.make_model(made), tmp_path, FORMS[form])
    source = open_source(str(tmp_path))
    kept, plain = Fallback.build(source, QuantOptions()), Fallback.build(source)
    again = Fallback.build(source, QuantOptions(requantize=True))
    for name, segment in segments(kept).items():
        assert isinstance(segment.weight, GroupWeight)
        assert isinstance(segments(plain)[name].weight, DenseWeight)
        assert segments(again)[name].weight.format == "nf4+dq"
    assert error(kept.logits(IDS), plain.logits(IDS)) < 1e-5
    assert 1e-3 < error(again.logits(IDS), plain.logits(IDS)) < 1


def test_the_fingerprint_is_of_all_stored_tensors(tmp_path: Path) -> None:
    folder = write(tmp_path, FORMS["gptq-act-order"])
    before = open_source(str(folder)).fingerprint
    for suffix in ("qweight", "qzeros", "scales", "g_idx"):
        original = load_file(folder / "model.safetensors")
        changed = original | {f"{Q}.{suffix}": original[f"{Q}.{suffix}"] + 1}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        assert open_source(str(folder)).fingerprint != before, suffix
        save_file(original, folder / "model.safetensors", {"format": "pt"})


# -- what is refused --------------------------------------------------------------------------------------------------


def read_all(source: ModelSource) -> None:
    for name in source.tensors():
        source.read(name)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_all(open_source(str(folder)))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("form", "values", "message"),
    [
        ("gptq", {"bits": 3}, "GPTQ in 3 bits, which no kernel here multiplies with"),
        ("gptq", {"bits": 5}, "GPTQ in 5 bits; GPTQ in 4 or 8 bits"),
        ("gptq", {"bits": "many"}, r"quantization_config\.bits: Input should be a valid integer"),
        ("gptq", {"checkpoint_format": "marlin"}, "GPTQ packed as marlin"),
        ("gptq", {"checkpoint_format": None, "is_marlin_format": True}, "GPTQ packed as marlin"),
        ("gptq", {"pack_dtype": "int16"}, "GPTQ packed in int16"),
        ("gptq", {"dynamic": {r"+:.*\.0\..*": {"bits": 8}}}, "GPTQ with bits 8 for the modules"),
        ("gptq", {"dynamic": [1]}, r"quantization_config\.dynamic"),
        ("gptq", {"group_size": -2}, r"quantization_config\.group_size"),
        ("awq", {"version": "gemv"}, "AWQ packed as gemv"),
        ("awq", {"bits": 8}, "AWQ in 8 bits"),
        ("awq", {"zero_point": False}, "AWQ without zero points"),
        ("awq", {"quant_method": "aqlm"}, "quantized with 'aqlm'; bitsandbytes 4-bit, GPTQ, AWQ, GGUF"),
        (
            "awq",
            {"quant_method": "gptq", "version": "gptq"},
            r"the file is damaged, or config.json is of another model",
        ),
        ("gptq", {"bits": 8}, r"qzeros is \[5, 12\], and the tensors beside it and 8 bits need \[5, 24\]"),
    ],
)
def test_configs_that_are_refused(form: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, FORMS[form])
    change_config(folder, quantization_config={**FORMS[form].config, **values})
    refused(folder, message)


def test_codes_without_a_config_and_a_config_without_codes(tmp_path: Path) -> None:
    folder = write(tmp_path, FORMS["gptq"])
    change_config(folder, quantization_config=None)
    refused(folder, r"has no quantization_config of GPTQ or AWQ, and .*qweight is packed by one")
    model = make_model()
    model.save_pretrained(tmp_path / "plain")
    change_config(tmp_path / "plain", quantization_config=Form().config)
    refused(tmp_path / "plain", r"no tensor NAME\.qweight is there")


@pytest.mark.parametrize(
    ("form", "suffix", "change", "message"),
    [
        ("gptq", "qzeros", lambda t: None, r"q_proj\.qzeros is missing: the checkpoint is not whole"),
        ("gptq", "scales", lambda t: None, r"q_proj\.scales is missing"),
        ("gptq-act-order", "g_idx", lambda t: None, r"q_proj\.g_idx is missing"),
        ("gptq", "qweight", lambda t: t[:, :-8], r"q_proj\.qweight is \[12, 184\], and the tensors beside it"),
        ("gptq", "qweight", lambda t: t[:-1], r"q_proj\.g_idx is \[96\], and the tensors beside it .* \[88\]"),
        ("gptq", "qweight", lambda t: t[:0], "0 inputs"),
        ("gptq", "qweight", lambda t: t.long(), r"q_proj\.qweight holds int64"),
        ("gptq", "qweight", lambda t: t.flatten(), r"q_proj\.qweight holds int32 \[2304\], int32 in 2 dimensions"),
        ("gptq", "scales", lambda t: t.int(), r"q_proj\.scales holds int32 .* floating point in 2 dimensions"),
        ("gptq", "scales", lambda t: t[:0], "0 groups"),
        ("gptq", "scales", lambda t: t[:, :-1], "191 outputs: damaged"),
        ("gptq", "scales", lambda t: t * float("nan"), r"q_proj\.scales holds NaN or infinite values"),
        ("gptq", "g_idx", lambda t: t + 1, r"g_idx names groups beyond the 3 that"),
        ("gptq", "g_idx", lambda t: t - 1, r"g_idx names groups beyond the 3 that"),
        ("gptq", "g_idx", lambda t: t[1:], r"q_proj\.g_idx is \[95\]"),
        ("gptq-no-g-idx", "qzeros", lambda t: t[:2], r"q_proj\.qzeros is \[2, 24\], .* \[3, 24\]"),
        ("awq", "qzeros", lambda t: t[:, 1:], r"q_proj\.qzeros is \[3, 23\]"),
        ("awq", "qweight", lambda t: t[1:], "95 inputs in 3 groups"),
    ],
)
def test_damaged_tensors(
    form: str, suffix: str, change: Callable[[Tensor], Tensor | None], message: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, FORMS[form])
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(f"{Q}.{suffix}"))
    if changed is not None:
        tensors[f"{Q}.{suffix}"] = changed.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, message)


def test_both_forms_of_a_weight(tmp_path: Path) -> None:
    folder = write(tmp_path, FORMS["gptq"])
    tensors = load_file(folder / "model.safetensors") | {f"{Q}.weight": torch.zeros(192, 96)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, r"has both .*q_proj\.weight and .*q_proj\.qweight")


@pytest.mark.parametrize(("size", "message"), [(64, "64"), (10**30, "160")])
def test_no_g_idx_and_a_group_size_that_does_not_fit(size: int, message: str, tmp_path: Path) -> None:
    folder = write(tmp_path, FORMS["gptq-no-g-idx"])
    change_config(folder, quantization_config={**Form().config, "group_size": size})
    refused(folder, f"160 inputs in groups of {message} are not the 5 groups of its scales")


def test_a_truncated_file(tmp_path: Path) -> None:
    folder = write(tmp_path, FORMS["awq"])
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "half-written")
