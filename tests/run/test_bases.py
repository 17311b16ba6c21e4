"""Files that people have as bases: trained on in their own blocks, resumed, merged and exported, like any other."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from halfbyte.adapters import load_adapter
from halfbyte.errors import Interrupted
from halfbyte.export.bnb_folder import write_bnb_folder
from halfbyte.export.deltas import read_deltas
from halfbyte.export.export import ExportOptions
from halfbyte.export.merge import MergeOptions, plan_tensors
from halfbyte.linear import segments
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from halfbyte.quant import QuantOptions
from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.exporting import export_target
from halfbyte.run.run import resume, run
from halfbyte.run.target import find, merge_target
from tests.evaluate.conftest import VOCAB, byte_tokenizer
from tests.models import families
from tests.models.group_files import FORMS, SIZES, change_config, write_group_folder
from tests.run.test_run import Events, adapter

BASES = {"bitsandbytes": "nf4+dq", "gptq": "gptq-4bit", "gptq-8-act-order": "gptq-8bit", "awq": "awq-4bit"}
QLORA = QuantOptions()


def make_base(kind: str, folder: Path, quant: QuantOptions = QLORA) -> Path:
    """A tiny Llama in bfloat16, quantized as `kind`; bitsandbytes' in the formats of `quant`."""
    config = families.config("llama3-head-dim")
    for key, value in {**SIZES, "vocab_size": VOCAB, "eos_token_id": 256, "bos_token_id": None}.items():
        setattr(config, key, value)
    model = families.make_model(config).to(torch.bfloat16)
    if kind == "bitsandbytes":
        model.save_pretrained(folder / "plain")
        byte_tokenizer().save_pretrained(folder / "plain")
        source = open_source(str(folder / "plain"))
        planned = plan_tensors(ModelOptions(model=str(folder / "plain")), source, {}, None, torch.bfloat16)
        (folder / "base").mkdir()
        write_bnb_folder(folder / "base", planned, source, quant, folder / "plain")
        return folder / "base"
    write_group_folder(model, folder / "base", FORMS[kind])
    change_config(folder / "base", dtype="bfloat16")
    byte_tokenizer().save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module", params=BASES)
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, data_file: Path) -> RunConfig:
    """Six steps of QLoRA on a file's own blocks."""
    folder = tmp_path_factory.mktemp(request.param)
    base = make_base(request.param, folder)
    return load_config(
        model=str(base), data=str(data_file), output_dir=folder / "run", method="qlora", dtype="float32", lora_r=4,
        lora_dropout=0.1, max_steps=6, eval_split=0.1, learning_rate=1e-2, max_seq_length=64,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(config: RunConfig) -> Any:
    return run(config)


def held_as(config: RunConfig) -> str:
    return BASES[Path(config.model).parent.name.rstrip("0123456789")]


def held_weights(config: RunConfig) -> dict[str, Tensor]:
    """The linears in float32, as training held them."""
    model = load_model(config.pick(ModelOptions), config.pick(QuantOptions), torch.float32, "cpu").model
    assert {segment.weight.format for segment in segments(model).values()} == {held_as(config)}
    return {name: segment.weight.dequantize(torch.float32) for name, segment in segments(model).items()}


def test_training(config: RunConfig, trained: Any) -> None:
    result = trained.result
    assert (result["status"], result["method"], result["step"]) == ("completed", "qlora", 6)
    assert result["eval_loss"] < result["base_eval_loss"] - 0.5
    card = (trained.path / "README.md").read_text()
    assert "the blocks of its own file" in card
    assert "already quantized once" in card
    name = {"nf4+dq": "bitsandbytes 4-bit", "gptq-8bit": "8 bits by GPTQ", "awq-4bit": "4 bits by AWQ"}
    assert name.get(held_as(config), "4 bits by GPTQ") in card


def test_resuming_is_bit_for_bit(config: RunConfig, trained: Any, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    with pytest.raises(Interrupted):
        run(config.replace(output_dir=stopped, save_steps=3), Events(interrupt_at=3))
    resumed = resume(stopped)
    assert resumed.result["train_loss"] == trained.result["train_loss"]
    mine, theirs = adapter(trained.path), adapter(stopped)
    assert mine.keys() == theirs.keys() != set()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call
def test_the_adapter_is_pefts(config: RunConfig, trained: Any) -> None:
    """PEFT on transformers' model with the dequantized weights gives the logits that ours gives on the blocks."""
    loaded = load_model(config.pick(ModelOptions), QLORA, torch.float32, "cpu")
    load_adapter(loaded.model, trained.path)
    ids = torch.arange(3, 40)
    ours = loaded.model.eval().logits(ids)
    plain = transformers.AutoConfig.from_pretrained(config.model)
    del plain.quantization_config
    theirs: Any = transformers.AutoModelForCausalLM.from_config(plain, dtype=torch.float32)
    source = open_source(config.model)
    state = {name: source.read(name).float() for name in source.tensors()}
    state |= {f"{name}.weight": weight for name, weight in held_weights(config).items()}
    theirs.load_state_dict(state)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(theirs, trained.path)(input_ids=ids[None]).logits[0]
    assert float((ours - expected).norm() / expected.norm()) < 5e-5


def test_merging(config: RunConfig, trained: Any, tmp_path: Path) -> None:
    """Both bases are one, the file's weights; the sum is rounded once."""
    options = MergeOptions(base="auto", rows=4, answer_tokens=4)
    report = merge_target(find(str(trained.path)), tmp_path / "merged", options)
    assert report.scores is not None
    assert [candidate.name for candidate, _ in report.scores.scores] == ["dequantized"]
    assert "already quantized once), dequantized: the base that the adapter was trained on" in report.base
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    deltas = read_deltas(trained.path)
    for name, weight in held_weights(config).items():
        exact = (weight + deltas[name].rows(0, weight.shape[0])).bfloat16()
        close = merged[f"{name}.weight"].float()
        assert float((close - exact.float()).abs().max()) <= 2**-8 * float(exact.float().abs().max())
        assert float((close == exact.float()).float().mean()) > 0.999
    assert "quantization_config" not in transformers.AutoConfig.from_pretrained(tmp_path / "merged").to_dict()


@pytest.mark.parametrize("to", ["hf", "bnb-4bit"])
def test_exporting(to: Any, trained: Any, tmp_path: Path) -> None:
    """The 16-bit folder behaves as trained; a 4-bit one can be written whatever the base's blocks were."""
    options = ExportOptions(to=to, rows=4, max_new_tokens=4, parity=to == "hf")
    report = export_target(find(str(trained.path)), tmp_path / "out", options)
    assert report.passed is (True if to == "hf" else None)
    if to == "bnb-4bit":
        held = open_source(str(tmp_path / "out"))
        assert held.blocks == "bitsandbytes"


def test_lora_decodes_to_16_bits(config: RunConfig, tmp_path: Path) -> None:
    result = run(config.replace(method="lora", output_dir=tmp_path / "lora", max_steps=2)).result
    assert result["method"] == "lora"
    model = load_model(config.pick(ModelOptions), None, torch.float32, "cpu").model
    held = held_weights(config)
    for name, segment in segments(model).items():
        assert segment.weight.format in ("bf16", "fp32")
        assert torch.equal(segment.weight.dequantize(torch.float32), held[name].bfloat16().float())


def test_linears_that_the_file_left_in_16_bits(data_file: Path, tmp_path: Path) -> None:
    """The base is the file's values everywhere, both bases of a merge are one, and a 4-bit folder leaves them so."""
    base = make_base("bitsandbytes", tmp_path, QLORA.model_copy(update={"quant_pattern": {"o_proj": "bf16"}}))
    made = run(
        load_config(
            model=str(base), data=str(data_file), output_dir=tmp_path / "run", method="qlora", dtype="float32",
            lora_r=4, max_steps=6, eval_split=0.1, learning_rate=1e-2, max_seq_length=64,
        )
    )  # fmt: skip
    out = tmp_path / "out"
    export_target(find(str(made.path)), out, ExportOptions(to="bnb-4bit", parity=False))
    written = load_file(out / "model.safetensors")
    source, deltas = open_source(str(base)), read_deltas(made.path)
    left = [name for name in deltas if name.endswith("o_proj")]
    assert len(left) == 2
    for name in deltas:
        in_blocks = f"{name}.weight.quant_state.bitsandbytes__nf4" in written
        assert in_blocks == (name not in left)
    for name in left:
        weight = source.read(f"{name}.weight").float()
        exact = (weight + deltas[name].rows(0, weight.shape[0])).bfloat16()
        assert torch.equal(written[f"{name}.weight"], exact)
    skipped = transformers.AutoConfig.from_pretrained(out).quantization_config["llm_int8_skip_modules"]
    assert skipped == ["lm_head", *left]
    report = merge_target(find(str(made.path)), tmp_path / "merged", MergeOptions(base="auto", rows=2, answer_tokens=4))
    assert report.scores is not None
    assert [candidate.name for candidate, _ in report.scores.scores] == ["dequantized"]
