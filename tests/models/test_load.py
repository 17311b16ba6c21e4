"""From options to a model: against transformers, exact where quantized, and never more memory than promised."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from halfbyte.adapters import LoraOptions, attach
from halfbyte.batch import Batch
from halfbyte.errors import UsageError
from halfbyte.linear import segments
from halfbyte.models.decoder import Decoder
from halfbyte.models.dtype import fast_dtype
from halfbyte.models.load import LoadedModel, build_decoder, held_dtype, load_model, resolve_device, resolve_dtype
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.models.stored import StoredWeight
from halfbyte.ops import native
from halfbyte.plan.memory import Job, base_bytes
from halfbyte.quant import DTYPE_NAMES, BlockWeight, DenseWeight, QuantOptions, quantize
from tests.models.families import BASE, FAMILIES, config, error, make_model
from tests.models.gguf_files import write_gguf

IDS = torch.tensor([3, 17, 99, 4, 56, 23, 8, 120, 7, 64, 31, 2, 77, 5, 111, 45, 90, 12])


def build(folder: Path, quant: QuantOptions | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    source = open_source(str(folder))
    return build_decoder(source, ModelSpec.from_config(source.config), quant, dtype, torch.device("cpu"))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_from_a_folder(family: str, tmp_path: Path) -> None:
    model = make_model(config(family))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(input_ids=IDS[None]).logits[0]
    assert error(build(tmp_path).logits(IDS), expected) < 1e-4


@pytest.mark.parametrize("family", ["llama3-head-dim", "mistral-full", "phi3", "gemma1", "qwen2", "qwen3-tied-bias"])
def test_the_same_model_from_gguf(family: str, tmp_path: Path) -> None:
    model = make_model(config(family))
    write_gguf(model, tmp_path / "model.gguf")
    with torch.no_grad():
        expected = model(input_ids=IDS[None]).logits[0]
    assert error(build(tmp_path / "model.gguf").logits(IDS), expected) < 1e-4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a tokenizer, as a user has it."""
    made = transformers.Qwen2Config(**{**BASE, "hidden_size": 96, "intermediate_size": 160, "head_dim": 16})
    make_model(made, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    vocab = {f"t{i}": i for i in range(133)}
    backend = transformers.PreTrainedTokenizerFast(tokenizer_object=_word_tokenizer(vocab), eos_token="t2")
    backend.chat_template = "{{ messages }}"
    backend.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _word_tokenizer(vocab: dict[str, int]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel(vocab, unk_token="t0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def load(folder: Path, quant: QuantOptions | None = None, **options: Any) -> LoadedModel:
    return load_model(ModelOptions(model=str(folder), **{"device": "cpu", "dtype": "bfloat16", **options}), quant)


def test_all_parts_of_a_loaded_model(folder: Path) -> None:
    loaded = load(folder, QuantOptions())
    assert loaded.spec is not None
    assert loaded.spec.family == "qwen2"
    assert loaded.source.fingerprint.startswith("sha256:")
    assert loaded.tokenizer("t5 t7")["input_ids"] == [5, 7]
    assert loaded.tokenizer.chat_template == "{{ messages }}"
    assert loaded.model.logits(IDS).shape == (18, 133)


def test_an_opened_source_is_not_opened_again(folder: Path) -> None:
    source = open_source(str(folder))
    tokenizer = source.tokenizer()
    loaded = load_model(ModelOptions(model=str(folder), device="cpu", dtype="float32"), source=source)
    assert loaded.source is source
    assert loaded.tokenizer is tokenizer


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "e2m1", "int4", "int8"])
def test_what_is_quantized_and_with_what(quant_type: Any, folder: Path) -> None:
    options = QuantOptions(
        quant_type=quant_type, blocksize=32, quant_pattern={"down_proj": "bf16", "*.layers.1.*": "int8"}
    )
    loaded = load(folder, options)
    state = load_file(folder / "model.safetensors")
    for name, segment in segments(loaded.model).items():
        tensor = state[f"{name}.weight"]
        chosen = options.format_of(name)
        if chosen == "bf16":
            assert isinstance(segment.weight, DenseWeight)
            assert torch.equal(segment.weight.dequantize(torch.bfloat16), tensor)
            continue
        expected = quantize(tensor, options.model_copy(update={"quant_type": chosen}))
        assert isinstance(segment.weight, BlockWeight)
        assert segment.weight.format == expected.format
        assert torch.equal(segment.weight.codes, expected.codes)
        assert torch.equal(segment.weight.absmax, expected.absmax)
    assert isinstance(loaded.model.embed, StoredWeight)  # not tied: its rows stay in the file
    assert isinstance(loaded.model.head, DenseWeight)


def test_without_quantization_16_bits_stay(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    for name, segment in segments(load(folder).model).items():
        assert segment.weight.format == "bf16"
        assert torch.equal(segment.weight.dequantize(torch.bfloat16), state[f"{name}.weight"])


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32")])
def test_float32_files_take_the_type_of_computation(dtype: str, name: str, tmp_path: Path) -> None:
    made = make_model(config("llama1-mha"))
    made.save_pretrained(tmp_path)
    decoder = build(tmp_path, dtype=getattr(torch, dtype))
    assert {segment.weight.format for segment in segments(decoder).values()} == {name}
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}  # norms: as the file has them


@pytest.fixture
def bnb(folder: Path, tmp_path: Path) -> Path:
    made = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=made, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "bnb")
    return tmp_path / "bnb"


def test_a_quantized_checkpoint_keeps_its_own_blocks(folder: Path, bnb: Path) -> None:
    """Quantizing again, with other constants, would lose a second time; the pattern's 16 bits are still honoured."""
    decoder = build(bnb, QuantOptions(quant_type="int8", blocksize=32, quant_pattern={"o_proj": "bf16"}))
    formats = {name.rsplit(".", 1)[-1]: segment.weight.format for name, segment in segments(decoder).items()}
    assert formats.pop("o_proj") == "bf16"
    assert set(formats.values()) == {"nf4+dq"}
    plain = build(bnb)
    kind = held_dtype(torch.bfloat16, torch.float32, torch.device("cpu"))
    assert {segment.weight.format for segment in segments(plain).values()} == {DTYPE_NAMES[kind]}
    ours = build(folder, QuantOptions())
    for name, segment in segments(plain).items():
        expected = segments(ours)[name].weight.dequantize(torch.float32)
        # bitsandbytes rounds a few of its nested constants the other way.
        torch.testing.assert_close(segment.weight.dequantize(torch.float32), expected, rtol=0.05, atol=2e-3)


def test_other_architectures_go_through_transformers(tmp_path: Path) -> None:
    made = transformers.GPT2Config(vocab_size=133, n_embd=48, n_layer=2, n_head=4, n_positions=64)
    model = make_model(made)
    model.save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=_word_tokenizer({"t0": 0})).save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype="float32")
    assert loaded.spec is None
    with torch.no_grad():
        expected = model(input_ids=IDS[None]).logits[0]
    assert error(loaded.model.logits(IDS), expected) < 1e-4
    quantized = load(tmp_path, QuantOptions(), dtype="float32")
    assert {segment.weight.format for segment in segments(quantized.model).values()} == {"nf4+dq"}


# -- what can be wrong --------------------------------------------------------------------------------------------


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    state = {**load_file(path), **{name.replace("__", "."): value for name, value in tensors.items()}}
    save_file({name: value for name, value in state.items() if value is not None}, path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight.*incomplete"),
        (torch.ones(3, 3), r"is \[3, 3\], and the config says \[160, 96\]"),
        (torch.ones(160, 96, dtype=torch.int32), r"up_proj\.weight holds int32; weights in bfloat16"),
        (torch.ones(160, 96).to(torch.float8_e4m3fn), r"up_proj\.weight holds float8_e4m3fn"),
        (torch.full((160, 96), float("nan"), dtype=torch.bfloat16), r"model\.layers\.1\.mlp\.up_proj\.weight.* is nan"),
    ],
)
def test_tensors_that_do_not_fit_are_named(value: torch.Tensor | None, message: str, folder: Path) -> None:
    change(folder, model__layers__1__mlp__up_proj__weight=value)
    with pytest.raises(UsageError, match=message) as caught:
        load(folder, QuantOptions())
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_named(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()
    with pytest.raises(UsageError, match=r"has no tokenizer \(tokenizer\.json\)") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_code_from_a_model_is_never_run(folder: Path) -> None:
    import json

    plain = json.loads((folder / "config.json").read_text())
    plain |= {"model_type": "mystery", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(plain))
    (folder / "evil.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(UsageError):
        load(folder)


def test_a_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match="torch sees no CUDA GPU here; use --device cpu"):
        resolve_device("cuda")
    assert resolve_device("auto") == torch.device("cpu")


def test_types_by_name_and_by_measurement() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("float16", cpu) == torch.float16
    assert resolve_dtype(torch.float32, cpu) == torch.float32
    chosen, reason = fast_dtype()
    assert resolve_dtype("auto", cpu) == chosen
    assert chosen in (torch.bfloat16, torch.float32)
    assert "TFLOP/s" in reason
    assert reason.startswith(str(chosen).removeprefix("torch."))


# -- memory -------------------------------------------------------------------------------------------------------

PEAK = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from halfbyte.models.load import build_decoder
from halfbyte.models.source import open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import QuantOptions, Weight
status = lambda key: int(open('/proc/self/status').read().split(key)[1].split()[0]) * 1024
source = open_source(sys.argv[1])
spec = ModelSpec.from_config(source.config)
warm = torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
quant = QuantOptions() if sys.argv[2] == 'quantized' else None
before = status('VmRSS:')
model = build_decoder(source, spec, quant, torch.bfloat16, torch.device('cpu'))
held = sum(w.nbytes for w in {id(m): m for m in model.modules() if isinstance(m, Weight)}.values())
held += sum(p.numel() * p.element_size() for p in model.parameters())
largest = max(info.nbytes for info in source.tensors().values())
print(before, status('VmHWM:'), held, largest)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """126 million parameters, 0.25 GB in bfloat16, its largest tensors a fifth of it."""
    folder = tmp_path_factory.mktemp("large")
    made = transformers.LlamaConfig(
        vocab_size=24_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    state = {name: torch.randn(t.shape, dtype=torch.bfloat16) * 0.02 for name, t in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is Linux's")
@pytest.mark.parametrize("mode", ["quantized", "dense"])
def test_peak_memory_is_the_model_and_two_tensors(mode: str, large: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(large), mode], check=True, capture_output=True, text=True, env=env
    )
    before, peak, held, largest = map(int, run.stdout.split())
    assert peak - before <= held + 2 * largest, (
        f"{(peak - before) / 1e6:.0f} MB for {held / 1e6:.0f} held and tensors up to {largest / 1e6:.0f}"
    )


@pytest.mark.real_model
def test_real_gemma_answers(gemma_gguf: Path) -> None:
    loaded = load(gemma_gguf, dtype="auto")
    ids = torch.tensor(loaded.tokenizer("The capital of France is")["input_ids"])
    best = loaded.model.logits(ids)[-1].topk(10).indices.tolist()
    assert " Paris" in [loaded.tokenizer.decode([token]) for token in best]
    assert loaded.spec is not None
    assert loaded.spec.total_parameters == 268_098_176


@pytest.mark.skipif(not native.multiplies(torch.float32), reason="the engine does not multiply float32 here")
def test_float32_computation_reads_16_bit_matrices_in_place(folder: Path) -> None:
    """Half the memory of float32 copies, and the same numbers; full fine-tuning trains float32."""
    loaded = load(folder, dtype="float32").model
    assert {segment.weight.format for segment in segments(loaded).values()} == {"bf16"}
    assert loaded.head.format == "bf16"
    logits = loaded.logits(IDS)
    assert error(logits, decoded(load(folder, dtype="float32").model).logits(IDS)) < 1e-5
    assert {p.dtype for n, p in loaded.unfreeze().items() if "norm" not in n and "bias" not in n} == {torch.float32}


def wide(family: str) -> transformers.PretrainedConfig:
    """With rows that blocks of 32 divide."""
    made = config(family)
    made.hidden_size, made.intermediate_size = 64, 96
    return made


def decoded(decoder: Decoder) -> Decoder:
    """The same model with every matrix in float32."""
    tied = decoder.head is decoder.embed
    for segment in segments(decoder).values():
        segment.weight = DenseWeight(segment.weight.dequantize(torch.float32))
    decoder.embed = DenseWeight(decoder.embed.dequantize(torch.float32))
    decoder.head = decoder.embed if tied else DenseWeight(decoder.head.dequantize(torch.float32))
    return decoder


@pytest.mark.parametrize(
    "family",
    ["llama3-head-dim", "llama-biases", "mistral-full", "phi3", "gemma1", "qwen2", "qwen2-tied", "qwen3-tied-bias"],
)
def test_a_gguf_file_is_trained_on_in_its_own_blocks(family: str, tmp_path: Path) -> None:
    """Every matrix is the file's bytes, whoever multiplies sees the file's values, and the plan knows their size."""
    model = make_model(wide(family))
    write_gguf(model, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    source = open_source(str(tmp_path / "model.gguf"))
    spec = ModelSpec.from_config(source.config)
    kept = build(tmp_path / "model.gguf", QuantOptions())
    plain = build(tmp_path / "model.gguf")
    formats = {segment.weight.format for segment in segments(kept).values()}
    assert "q8_0" in formats
    assert formats <= {"q8_0", "fp32"}  # rows that no block divides are float32 in the file
    for name, segment in segments(kept).items():
        assert segment.weight.nbytes == source.prequantized_bytes()[f"{name}.weight"]
        assert torch.equal(
            segment.weight.dequantize(torch.bfloat16), segments(plain)[name].weight.dequantize(torch.bfloat16)
        )
    job = Job("qlora", "float32", QuantOptions(), LoraOptions(), held=source.prequantized_bytes())
    held = sum(t.numel() * t.element_size() for t in {id(t): t for t in kept.buffers()}.values())
    norms = sum(p.numel() * 4 for p in kept.parameters())
    tables = sum(b.numel() * b.element_size() for n, b in kept.named_buffers() if "rotary" in n or "inv_freq" in n)
    assert abs(sum(base_bytes(spec, job)) - (held - tables + norms)) <= 0.02 * held
    logits = kept.logits(IDS)
    assert error(logits, decoded(kept).logits(IDS)) < 1e-5


def test_gradients_through_a_files_blocks(tmp_path: Path) -> None:
    """An adapter on the file's blocks gets the gradients that it gets on the decoded weights."""
    write_gguf(make_model(wide("llama3-head-dim")), tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q4_0)
    batch = Batch(IDS[:-1], torch.arange(len(IDS) - 1), IDS[1:], (len(IDS) - 1,), (0,))
    grads = []
    for dense in (False, True):
        decoder = build(tmp_path / "model.gguf", QuantOptions())
        decoder = decoded(decoder) if dense else decoder
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


def test_a_gguf_file_in_other_words(tmp_path: Path) -> None:
    """Requantized where asked; NF4 where the file is in 16 bits."""
    model = make_model(wide("qwen2"))
    write_gguf(model, tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    again = build(tmp_path / "q8.gguf", QuantOptions(requantize=True, blocksize=32))
    assert "nf4+dq" in {segment.weight.format for segment in segments(again).values()}
    write_gguf(model, tmp_path / "f16.gguf", gguf.GGMLQuantizationType.F16)
    assert open_source(str(tmp_path / "f16.gguf")).prequantized_bytes() == {}
    plain = build(tmp_path / "f16.gguf", QuantOptions(blocksize=32))
    assert {segment.weight.format for segment in segments(plain).values()} == {"nf4+dq"}
