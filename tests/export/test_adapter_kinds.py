"""DoRA, shifted bases and whole modules in everything that is written: merged tensors, GGUF files, 4-bit folders."""

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.adapters import LoraOptions, attach, save_adapter
from halfbyte.errors import UsageError
from halfbyte.export.bnb_folder import write_bnb_folder
from halfbyte.export.deltas import Deltas, attach_deltas, read_deltas
from halfbyte.export.gguf_writer import write_gguf
from halfbyte.export.merged_tensors import plan_tensors
from halfbyte.export.planned_source import PlannedSource
from halfbyte.linear import segments
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.shifted_source import LinearBase
from halfbyte.models.source import open_source
from halfbyte.quant import QuantOptions
from tests.adapters.test_methods_peft import disturb
from tests.export.conftest import make_adapter, save_base
from tests.export.served_models import make_tuned
from tests.models.families import error

IDS = torch.arange(40, 70)
NF4 = QuantOptions()
KINDS: dict[str, tuple[dict[str, Any], QuantOptions | None]] = {
    "dora": ({"use_dora": True}, NF4),
    "dora-16bit": ({"use_dora": True}, None),
    "pissa": ({"init_lora_weights": "pissa", "use_rslora": True}, NF4),
    "pissa-16bit": ({"init_lora_weights": "pissa"}, None),
    "loftq": ({"init_lora_weights": "loftq", "loftq_iter": 3}, NF4),
    "whole": ({"modules_to_save": ["embed_tokens", "lm_head", "norm", "1.mlp.up_proj"]}, NF4),
}


@pytest.fixture(scope="module", params=["codellama", "qwen2-tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tuned(tmp_path_factory.mktemp("base"), request.param).base


def trained(base: Path, folder: Path, kind: str) -> tuple[Any, Deltas]:
    """(the unmerged model, what its files say that it changes)."""
    values, quant = KINDS[kind]
    loaded = load_model(ModelOptions(model=str(base)), quant, torch.float32, "cpu")
    options = LoraOptions(lora_r=4, lora_alpha=6, **values)
    attach(loaded.model, options, base=LinearBase(loaded, quant))
    disturb(loaded.model)
    save_adapter(loaded.model, folder, options, str(base))
    return loaded.model.eval(), read_deltas(folder)


@pytest.mark.parametrize("kind", list(KINDS))
def test_merged_is_as_trained(kind: str, base: Path, tmp_path: Path) -> None:
    model, deltas = trained(base, tmp_path / "adapter", kind)
    quant, source = KINDS[kind][1], open_source(str(base))
    expected = model.logits(IDS)
    options = ModelOptions(model=str(base))

    beside = load_model(options, quant, torch.float32, "cpu")
    attach_deltas(beside.model, deltas, LinearBase(beside, quant))
    assert error(beside.model.logits(IDS), expected) < 1e-5

    planned = plan_tensors(options, source, deltas, quant, torch.float32)
    merged = load_model(options, None, torch.float32, "cpu", source=PlannedSource(planned, source))
    assert error(merged.model.logits(IDS), expected) < 2e-4

    write_gguf(tmp_path / "model.gguf", planned, source, "f32", None)
    served = load_model(ModelOptions(model=str(tmp_path / "model.gguf")), None, torch.float32, "cpu")
    assert error(served.model.logits(IDS), expected) < 2e-4


@pytest.mark.parametrize("kind", ["dora", "pissa", "loftq", "whole"])
def test_a_4_bit_folder_is_near(kind: str, base: Path, tmp_path: Path) -> None:
    """In the blocks that training held, or for a whole or shifted linear new ones: off by NF4's rounding, unbiased."""
    model, deltas = trained(base, tmp_path / "adapter", kind)
    source = open_source(str(base))
    planned = plan_tensors(ModelOptions(model=str(base)), source, deltas, NF4, torch.float32)
    (tmp_path / "out").mkdir()
    write_bnb_folder(
        tmp_path / "out", planned, source, NF4, tmp_path / "adapter", trained_on=True, anew=deltas.off_the_base
    )
    written = load_model(ModelOptions(model=str(tmp_path / "out")), NF4, torch.float32, "cpu").model
    for name, segment in segments(written).items():
        wanted = segments(model)[name].merged().detach()
        off = segment.weight.dequantize(torch.float32) - wanted
        assert float(off.norm() / wanted.norm()) < 0.16, name
        assert float(off.mean().abs()) < 0.02 * float(wanted.abs().mean()), name


def test_gpt2_in_its_own_layout(tmp_path: Path) -> None:
    """Rows of the output are columns of a Conv1D's tensor: DoRA's norms are of the right ones."""
    save_base("gpt2", tmp_path / "base", torch.float32)
    options = ModelOptions(model=str(tmp_path / "base"), dtype="float32")
    make_adapter(tmp_path / "base", tmp_path / "adapter", options=LoraOptions(lora_r=4, use_dora=True))
    source, deltas = open_source(options.model), read_deltas(tmp_path / "adapter")
    beside = load_model(options, None, torch.float32, "cpu")
    plain = beside.model.logits(IDS)
    attach_deltas(beside.model, deltas)
    planned = plan_tensors(options, source, deltas, None, torch.float32)
    merged = load_model(options, None, torch.float32, "cpu", source=PlannedSource(planned, source))
    assert error(beside.model.logits(IDS), plain) > 0.01
    assert error(merged.model.logits(IDS), beside.model.logits(IDS)) < 2e-4
    loaded = load_model(options, None, torch.float32, "cpu")
    with pytest.raises(UsageError, match="under another name or turned around"):
        attach(loaded.model, LoraOptions(init_lora_weights="pissa"), base=LinearBase(loaded, None))


def test_whole_modules_of_another_architecture(tmp_path: Path) -> None:
    save_base("gpt2", tmp_path / "base", torch.float32)
    options = ModelOptions(model=str(tmp_path / "base"), dtype="float32")
    lora = LoraOptions(lora_r=4, modules_to_save=["wte", "ln_f"])
    loaded = load_model(options, None, torch.float32, "cpu")
    attach(loaded.model, lora)
    disturb(loaded.model)
    save_adapter(loaded.model, tmp_path / "adapter", lora, options.model)
    source, deltas = open_source(options.model), read_deltas(tmp_path / "adapter")
    assert sorted(deltas.whole) == [
        "lm_head.weight", "transformer.ln_f.bias", "transformer.ln_f.weight", "transformer.wte.weight"
    ]  # fmt: skip
    beside = load_model(options, None, torch.float32, "cpu")
    plain = beside.model.logits(IDS)
    attach_deltas(beside.model, deltas)
    assert error(beside.model.logits(IDS), plain) > 0.01
    assert torch.equal(beside.model.logits(IDS), loaded.model.logits(IDS))
    planned = plan_tensors(options, source, deltas, None, torch.float32)
    merged = load_model(options, None, torch.float32, "cpu", source=PlannedSource(planned, source))
    assert error(merged.model.logits(IDS), loaded.model.logits(IDS)) < 2e-4


def test_whole_modules_that_do_not_fit(base: Path, tmp_path: Path) -> None:
    _, deltas = trained(base, tmp_path / "adapter", "whole")
    wrong = Deltas(deltas.updates, {**deltas.whole, "model.norm.weight": torch.ones(3)}, deltas.tied, deltas.folder)
    strange = Deltas(deltas.updates, {**deltas.whole, "model.extra.weight": torch.ones(3)}, deltas.tied, deltas.folder)
    options, source = ModelOptions(model=str(base)), open_source(str(base))
    for found, message in ((wrong, r"model.norm.weight, \[3\]"), (strange, "no such tensor")):
        with pytest.raises(UsageError, match=message):
            plan_tensors(options, source, found, NF4, torch.float32)
        with pytest.raises(UsageError, match=r"another base|no place"):
            attach_deltas(load_model(options, NF4, torch.float32, "cpu").model, found)
