"""Architectures that the decoder does not serve: logits, loss and LoRA gradients equal transformers' with PEFT."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from halfbyte.adapters import LoraOptions, adapter_state, attach, load_adapter, load_adapter_state
from halfbyte.batch import IGNORE, Batch
from halfbyte.errors import UsageError
from halfbyte.linear import segments
from halfbyte.models.fallback import Fallback
from halfbyte.models.fallback_load import ReplacedLinear
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from halfbyte.quant import BlockWeight, DenseWeight, QuantOptions
from tests.models.families import VOCAB, error, make_batch, randomize, reference

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
STABLELM_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt-neox": ("GPTNeoXConfig", SMALL),
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 72, "word_embed_proj_dim": 48}),
    "opt-350m": ("OPTConfig", {**SMALL, "ffn_dim": 72, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "granite": (
        "GraniteConfig",
        {**SMALL, "logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "stablelm": (
        "StableLmConfig",
        {**SMALL, "num_key_value_heads": 2, "use_qkv_bias": True, "rope_parameters": STABLELM_ROPE},
    ),
    "falcon": (
        "FalconConfig",
        {**SMALL, "ffn_hidden_size": 72, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "cohere": ("CohereConfig", {**SMALL, "logit_scale": 0.4}),
    "starcoder2": ("Starcoder2Config", {**SMALL, "num_key_value_heads": 2, "sliding_window": 7}),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": 48, "n_layer": 2, "n_head": 4}),
}
MIXTRAL = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
LENGTHS = (13, 1, 22)
QUANT = QuantOptions(quant_type="nf4")


def write_model(kind: str, arguments: dict[str, Any], folder: Path) -> Any:
    """A tiny random model of transformers, saved to `folder`."""
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**arguments), dtype=torch.float32, attn_implementation="eager"
    )
    randomize(model, 0)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Fallback]:
    """(transformers' model, ours from its files)."""
    model = write_model(*ARCHITECTURES[request.param], tmp_path)
    return model, Fallback.build(open_source(str(tmp_path)))


def test_logits_and_loss(pair: tuple[Any, Fallback]) -> None:
    model, ours = pair
    batch = make_batch(LENGTHS)
    theirs = reference(model, batch)
    assert error(ours.logits(batch.input_ids, LENGTHS), theirs.logits) < 1e-5
    loss, count = ours.loss(batch)
    assert count == batch.supervised_tokens
    assert abs(float(loss.detach() / theirs.loss) - 1) < 1e-6
    assert torch.allclose(ours.token_logprobs(batch).sum(), -theirs.loss, rtol=1e-5)


def test_every_linear_but_the_head_is_ours(pair: tuple[Any, Fallback]) -> None:
    model, ours = pair
    linears = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, linears) and module is not model.get_output_embeddings()
    }
    assert set(segments(ours)) == expected
    assert ours.coverage.share > 0.9
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients_equal_pefts(pair: tuple[Any, Fallback], checkpointing: bool, tmp_path: Path) -> None:
    model, ours = pair
    conv = bool(ours.transposed)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=conv)
    theirs = peft.get_peft_model(model, config)
    attach(ours, LoraOptions(lora_r=3, lora_alpha=5))
    generator = torch.Generator().manual_seed(1)
    state = {name: 0.2 * torch.randn(t.shape, generator=generator) for name, t in adapter_state(ours).items()}
    load_adapter_state(ours, state)
    peft.set_peft_model_state_dict(theirs, state)
    batch = make_batch(LENGTHS)
    expected = reference(theirs, batch, lambda name: "lora_" in name)
    ours.train()
    ours.checkpointing = checkpointing
    runs = []
    inside = [m for n, m in ours.named_modules() if isinstance(m, ReplacedLinear) and ".0." in n]  # of the first layer
    inside[0].register_forward_hook(lambda *_: runs.append(1))
    loss, _ = ours.loss(batch)
    loss.backward()
    assert len(runs) == (2 if checkpointing else 1)  # once more in backward
    assert abs(float(loss.detach() / expected.loss) - 1) < 1e-6
    found = {name: segment.adapter for name, segment in segments(ours).items()}
    assert len(expected.gradients) == 2 * len(found)
    for name, gradient in expected.gradients.items():
        path, factor = name.removeprefix("base_model.model.").removesuffix(".default.weight").rsplit(".", 1)
        adapter = found[path]
        assert adapter is not None
        mine = adapter.lora_A.grad if factor == "lora_A" else adapter.lora_B.grad
        assert mine is not None
        assert error(mine, gradient) < 5e-5, name


def test_cached_steps(pair: tuple[Any, Fallback]) -> None:
    _, ours = pair
    ids = make_batch((20,)).input_ids
    whole = ours.logits(ids)
    cache = ours.new_cache(40, batch=2)
    ours.logits(torch.cat([ids[:5], ids[:9]]), (5, 9), cache=cache)
    both = ours.logits(torch.stack([ids[5], ids[9]]), (1, 1), cache=cache, last_only=True)
    assert both.shape == (2, VOCAB)
    assert error(both, whole[[5, 9]]) < 2e-5
    cache.keep([1])
    cache.truncate([7])
    assert cache.lengths == [7]
    assert error(ours.logits(ids[7:12], cache=cache), whole[7:12]) < 2e-5
    assert error(ours.logits(ids[12:13], cache=cache), whole[12:13]) < 2e-5
    with pytest.raises(ValueError, match="do not fit"):
        ours.logits(ids.repeat(3), cache=cache)


def test_named_tensors_are_the_files(tmp_path: Path) -> None:
    """What a merge would write without an adapter is what was read, GPT-2's transposed weights included."""
    write_model("GPT2Config", GPT2, tmp_path)
    ours = Fallback.build(open_source(str(tmp_path)))
    assert "transformer.h.0.attn.c_attn" in ours.transposed
    files = load_file(tmp_path / "model.safetensors")
    for name, read in ours.named_tensors():
        if name != "lm_head.weight":
            assert torch.equal(read(), files[name]), name


def test_forward_has_a_graph_and_the_batch_shape(pair: tuple[Any, Fallback]) -> None:
    _, ours = pair
    attach(ours, LoraOptions(lora_r=2))
    ids = make_batch((12,)).input_ids
    logits = ours(ids.view(2, 6))
    assert logits.shape == (2, 6, VOCAB)
    assert logits.requires_grad
    assert error(ours(ids[:6]).detach(), logits[0].detach()) < 1e-5


def test_nothing_supervised(tmp_path: Path) -> None:
    write_model("GPTNeoXConfig", SMALL, tmp_path)
    ours = Fallback.build(open_source(str(tmp_path)))
    attach(ours, LoraOptions(lora_r=2))
    batch = make_batch((5, 3))
    loss, count = ours.loss(Batch(batch.input_ids, batch.position_ids, torch.full_like(batch.targets, IGNORE), (5, 3)))
    assert (float(loss.detach()), count) == (0.0, 0)
    loss.backward()


def test_quantized_base(tmp_path: Path) -> None:
    """With 4-bit weights the logits are those of transformers' model with the dequantized ones."""
    model = write_model("GPT2Config", GPT2, tmp_path)
    ours = Fallback.build(open_source(str(tmp_path)), QUANT)
    for name, segment in segments(ours).items():
        assert isinstance(segment.weight, BlockWeight)
        model.get_submodule(name).weight.data = segment.weight.dequantize(torch.float32).t().contiguous()
    batch = make_batch(LENGTHS)
    assert error(ours.logits(batch.input_ids, LENGTHS), reference(model, batch).logits) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "gpt-neox"])
def test_bitsandbytes_checkpoint(kind: str, tmp_path: Path) -> None:
    """A 4-bit folder that transformers wrote: the same blocks, also where bitsandbytes turned a Conv1D around."""
    name, arguments = ARCHITECTURES[kind]
    sizes = {"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    write_model(name, {**arguments, **sizes}, tmp_path / "base")
    left = "c_proj" if kind == "gpt2" else "dense"
    four_bit = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=[left, "lm_head", "embed_out"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=four_bit, dtype=torch.float32, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "four-bit")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()  # their evaluation mode repacks the weights for a kernel that rounds to bf16
    batch = make_batch(LENGTHS)
    ids = batch.input_ids[: LENGTHS[0]]
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0]
    source = open_source(str(tmp_path / "four-bit"))
    quantized, plain = Fallback.build(source, QUANT), Fallback.build(source)
    for name, segment in segments(quantized).items():
        assert isinstance(segment.weight, DenseWeight if name.endswith(f".{left}") else BlockWeight), name
    assert {type(segment.weight) for segment in segments(quantized).values()} == {BlockWeight, DenseWeight}
    assert not any(isinstance(segment.weight, BlockWeight) for segment in segments(plain).values())
    again = segments(Fallback.build(source, QUANT.model_copy(update={"requantize": True})))
    assert all(isinstance(segment.weight, BlockWeight) for segment in again.values())
    assert error(quantized.logits(ids), expected) < 2e-5
    assert error(plain.logits(ids), expected) < 2e-5


def test_the_count_of_parameters(tmp_path: Path) -> None:
    model = write_model("GPT2Config", GPT2, tmp_path)
    report = attach(Fallback.build(open_source(str(tmp_path))), LoraOptions(lora_r=2))
    assert report.total_parameters - report.trainable_parameters == model.num_parameters()


def test_dropout_of_the_base_is_off_in_training(tmp_path: Path) -> None:
    write_model("GPT2Config", GPT2 | {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}, tmp_path)
    ours = Fallback.build(open_source(str(tmp_path))).train()
    batch = make_batch(LENGTHS)
    assert torch.equal(ours.loss(batch)[0], ours.loss(batch)[0])


def test_fused_experts_are_refused_with_the_share(tmp_path: Path) -> None:
    write_model("MixtralConfig", MIXTRAL, tmp_path)
    with pytest.raises(UsageError, match=r"only \d+\.\d% of the .*experts\.gate_up_proj"):
        Fallback.build(open_source(str(tmp_path)), QUANT)


def test_fused_experts_run_when_asked_to(tmp_path: Path) -> None:
    """The checkpoint has one tensor an expert, transformers one for all: still the same logits."""
    model = write_model("MixtralConfig", MIXTRAL, tmp_path)
    assert Fallback.build(open_source(str(tmp_path)), QUANT, min_share=0.0).coverage.share < 0.5
    ours = Fallback.build(open_source(str(tmp_path)))
    batch = make_batch(LENGTHS)
    theirs = reference(model, batch)
    assert error(ours.logits(batch.input_ids, LENGTHS), theirs.logits) < 1e-5
    assert abs(float(ours.loss(batch)[0] / theirs.loss) - 1) < 1e-6


def test_body_only_names(tmp_path: Path) -> None:
    """GPT-2's files name their tensors without the `transformer.` in front."""
    model = write_model("GPT2Config", GPT2, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(path).items()}, path)
    ours = Fallback.build(open_source(str(tmp_path)))
    ids = make_batch((9,)).input_ids
    assert error(ours.logits(ids), model(input_ids=ids[None]).logits[0].detach()) < 1e-5


def test_bf16_base(tmp_path: Path) -> None:
    write_model(*ARCHITECTURES["stablelm"], tmp_path)
    exact = Fallback.build(open_source(str(tmp_path)))
    ours = Fallback.build(open_source(str(tmp_path)), dtype=torch.bfloat16)
    ids = make_batch((20,)).input_ids
    assert ours.logits(ids).dtype == torch.float32
    assert float((ours.logits(ids) - exact.logits(ids)).abs().mean()) < 0.05


def test_through_the_public_loader(tmp_path: Path) -> None:
    """`load_model` takes the fallback by itself, and `allow_unquantized_share` is what lets a Mixtral in."""
    write_model("MixtralConfig", MIXTRAL, tmp_path)
    words = {f"w{i}": i for i in range(3, VOCAB)} | {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(WordLevel(words, "<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    options = ModelOptions(model=str(tmp_path), device="cpu")
    with pytest.raises(UsageError, match="raise allow_unquantized_share"):
        load_model(options, QUANT, torch.float32)
    loaded = load_model(options.model_copy(update={"allow_unquantized_share": 0.9}), QUANT, torch.float32)
    assert isinstance(loaded.model, Fallback)
    assert loaded.spec is None
    assert loaded.model.logits(torch.tensor([3, 4, 5])).shape == (3, VOCAB)


# -- bad input ----------------------------------------------------------------------------------------------------


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    write_model("OPTConfig", ARCHITECTURES["opt"][1], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.decoder.layers.1.fc1.weight"]
    save_file(tensors, path)
    with pytest.raises(UsageError, match=r"have no model\.decoder\.layers\.1\.fc1\.weight"):
        Fallback.build(open_source(str(tmp_path)))


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    write_model("OPTConfig", ARCHITECTURES["opt"][1], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.decoder.layers.1.fc1.weight"] = torch.zeros(3, 48)
    save_file(tensors, path)
    with pytest.raises(UsageError, match=r"layers\.1\.fc1\.weight: has the shape \[3, 48\].* \[72, 48\]"):
        Fallback.build(open_source(str(tmp_path)))


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    write_model("OPTConfig", ARCHITECTURES["opt"][1], tmp_path)
    source = open_source(str(tmp_path))
    Fallback.build(source, QuantOptions(quant_pattern={"fc1": "bf16", "lm_head": "bf16"}))
    with pytest.raises(UsageError, match="quant_pattern: 'fc3' matches no linear of the model; did you mean fc"):
        Fallback.build(source, QuantOptions(quant_pattern={"fc3": "bf16"}))


def test_unknown_architecture(tmp_path: Path) -> None:
    write_model("OPTConfig", ARCHITECTURES["opt"][1], tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "nonesuch", "auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    with pytest.raises(UsageError, match="'nonesuch' is not an architecture that transformers knows"):
        Fallback.build(open_source(str(tmp_path)))


def test_config_that_transformers_refuses(tmp_path: Path) -> None:
    write_model("OPTConfig", ARCHITECTURES["opt"][1], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": "wide"}))
    with pytest.raises(UsageError, match=r"refuses it for a opt model: .*hidden_size"):
        Fallback.build(open_source(str(tmp_path)))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    model = write_model("OPTConfig", ARCHITECTURES["opt"][1], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    ours = Fallback.build(open_source(str(tmp_path)))
    assert type(ours.model) is type(model)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("T5Config", {"vocab_size": VOCAB, "d_model": 32, "num_layers": 1}, "'t5' is not a decoder-only"),
        ("BertConfig", {**SMALL, "is_decoder": False}, "lets a token see those after it"),
    ],
)
def test_no_decoder(kind: str, arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = getattr(transformers, kind)(**arguments)
    classes = {"T5Config": "T5ForConditionalGeneration", "BertConfig": "BertLMHeadModel"}
    model = getattr(transformers, classes[kind])(made)
    randomize(model, 0)
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=message):
        Fallback.build(open_source(str(tmp_path)))


def test_adapter_of_a_decoder_does_not_load(tmp_path: Path) -> None:
    write_model("GPTNeoXConfig", SMALL, tmp_path / "base")
    ours = Fallback.build(open_source(str(tmp_path / "base")))
    tensors = {f"base_model.model.model.layers.0.self_attn.q_proj.lora_{f}.weight": torch.zeros(2, 2) for f in "AB"}
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    with pytest.raises(UsageError, match="no place for"):
        load_adapter(ours, tmp_path / "adapter")
