"""PEFT as the differential oracle for every adapter: logits, gradients, merged weights; its files read, ours loaded.

The base is a tiny model in 32 bits, quantized bases being test_peft_parity's; a file is written by one side and read by
the other, and the same batch gives the same numbers.
"""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from halfbyte.adapters import LoraOptions, attach, disabled, load_adapter, save_adapter, saved_modules
from halfbyte.adapters.lora import removed_from
from halfbyte.errors import UsageError
from halfbyte.linear import segments
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import LoadedModel
from halfbyte.models.shifted_source import LinearBase
from halfbyte.models.source import open_source
from halfbyte.quant import QuantOptions
from tests.adapters.test_peft_parity import CLOSE, decoder_of, their_logits
from tests.models.conftest import build_decoder
from tests.models.families import config, error, make_batch, make_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call

GRADIENTS = 2e-4
"""Of the gradients, in units of each one's root mean square."""
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora_r": 4, "lora_alpha": 12},
    "rslora": {"lora_r": 9, "lora_alpha": 5, "use_rslora": True},
    "dora": {"lora_r": 4, "lora_alpha": 12, "use_dora": True},
    "dora-rslora": {"lora_r": 3, "use_dora": True, "use_rslora": True, "target_modules": "q_proj,down_proj"},
    "whole": {"lora_r": 4, "modules_to_save": ["embed_tokens", "lm_head", "norm", "layers.0.mlp.down_proj"]},
}


def base_of(folder: Path, family: str = "llama3-gqa") -> Any:
    model = make_model(config(family))
    model.save_pretrained(folder)
    return model


def ours_of(folder: Path, quant: QuantOptions | None = None) -> tuple[Decoder, LinearBase]:
    decoder: Decoder = decoder_of(folder, quant)  # type: ignore[arg-type]
    return decoder, LinearBase(LoadedModel(decoder, None, decoder.spec, open_source(str(folder))), quant)


def disturb(model: nn.Module, seed: int = 0) -> None:
    """What training would have changed: every trainable number, by a few per cent and more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * (parameter.std() if parameter.numel() > 1 else 1.0) * noise + 0.02 * noise)


def their_config(options: LoraOptions, **changes: Any) -> peft.LoraConfig:
    targets: Any = options.target_modules
    if isinstance(targets, str) and "," in targets:
        targets = targets.split(",")
    return peft.LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        target_modules=targets,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        modules_to_save=options.modules_to_save or None,
        task_type="CAUSAL_LM",
        **changes,
    )


def by_file_names(theirs: Any) -> dict[str, Tensor]:
    """PEFT's gradients under the names of its files."""
    named = {}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            key = name.removeprefix("base_model.model.").replace(".default.weight", ".weight")
            key = key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            named[key.replace(".modules_to_save.weight", ".weight").replace(".modules_to_save.default", "")] = (
                parameter.grad
            )
    return named


def our_gradients(model: Decoder) -> dict[str, Tensor]:
    named = {}
    for name, segment in segments(model).items():
        if segment.adapter is not None:
            for leaf, parameter in segment.adapter.named_parameters():
                key = f"{name}.{leaf}.weight" if leaf != "magnitude" else f"{name}.lora_magnitude_vector"
                assert parameter.grad is not None, key
                named[key] = parameter.grad
    for place in saved_modules.places(model):
        value = place.get()
        tensor = value if isinstance(value, nn.Parameter) else value.trainable_tensor()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            assert tensor.grad is not None, place.names
            named[place.names[0]] = tensor.grad
    return named


def compare(ours: Decoder, theirs: Any, ids: Tensor) -> None:
    """Logits, then the gradients of everything that is trained."""
    assert error(ours.logits(ids), their_logits(theirs, ids)) < CLOSE
    for parameter in theirs.parameters():
        parameter.grad = None
    theirs_logits = theirs(input_ids=ids[None], use_cache=False).logits[0].float()
    nn.functional.cross_entropy(theirs_logits[:-1], ids[1:], reduction="sum").backward()
    ours.zero_grad()
    nn.functional.cross_entropy(ours(ids)[:-1], ids[1:], reduction="sum").backward()
    mine, other = our_gradients(ours), by_file_names(theirs)
    assert mine.keys() == other.keys()
    for name, grad in mine.items():
        assert error(grad, other[name]) < GRADIENTS, name


def merged_weights(theirs: Any) -> dict[str, Tensor]:
    return dict(theirs.merge_and_unload().state_dict())


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("family", ["llama3-gqa", "gemma3-small", "qwen3"])
def test_ours_in_peft(family: str, kind: str, tmp_path: Path) -> None:
    model = base_of(tmp_path / "base", family)
    ids = make_batch((29,)).input_ids
    plain = their_logits(model, ids)
    ours, _ = ours_of(tmp_path / "base")
    options = LoraOptions(**KINDS[kind])
    attach(ours, options)
    assert error(ours.logits(ids), plain) < CLOSE  # nothing has changed yet, DoRA's magnitudes included
    disturb(ours)
    save_adapter(ours, tmp_path / "adapter", options, base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    assert error(their_logits(theirs, ids), plain) > 0.05
    compare(ours, theirs, ids)
    with disabled(ours):
        assert error(ours.logits(ids), plain) < CLOSE
    merged = merged_weights(theirs)
    for name, segment in segments(ours).items():
        assert error(segment.merged().detach(), merged[f"{name}.weight"]) < 1e-5, name


@pytest.mark.parametrize("kind", list(KINDS))
def test_pefts_in_ours(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = base_of(tmp_path / "base", "qwen3")
    ids = make_batch((29,)).input_ids
    theirs = peft.get_peft_model(model, their_config(LoraOptions(**KINDS[kind])))
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours, base = ours_of(tmp_path / "base")
    options = load_adapter(ours, tmp_path / "adapter", base)
    compare(ours, theirs, ids)
    save_adapter(ours, tmp_path / "again", options, base=str(tmp_path / "base"))
    again = peft.PeftModel.from_pretrained(make_model(config("qwen3")), tmp_path / "again")
    assert torch.equal(their_logits(again, ids), their_logits(theirs, ids))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_pissa_through_a_file(init: str, rslora: bool, quantized: bool, tmp_path: Path) -> None:
    """Ours rebuilds the shifted base from the file bit for bit; PEFT's is the plain LoRA over the base itself."""
    model = base_of(tmp_path / "base")
    ids = make_batch((29,)).input_ids
    plain = their_logits(model, ids)
    quant = QuantOptions() if quantized else None
    ours, base = ours_of(tmp_path / "base", quant)
    before = error(ours.logits(ids), plain)
    options = LoraOptions(lora_r=5, lora_alpha=7, use_rslora=rslora, init_lora_weights=init)
    attach(ours, options, base=base)
    # Base and adapter together are the weight; quantized, nearer to it: the largest components stay as they were.
    assert error(ours.logits(ids), plain) < (before if quantized else CLOSE)
    start = ours.logits(ids)
    disturb(ours)
    save_adapter(ours, tmp_path / "adapter", options, base=str(tmp_path / "base"))
    with disabled(ours):
        assert error(ours.logits(ids), start) < CLOSE
    again, base = ours_of(tmp_path / "base", quant)
    loaded = load_adapter(again, tmp_path / "adapter", base)
    assert (loaded.lora_r, loaded.scaling_of("x")) == (5, options.scaling_of("x"))
    for name, segment in segments(ours).items():
        other = segments(again)[name]
        assert torch.equal(segment.weight.dequantize(torch.float32), other.weight.dequantize(torch.float32)), name
        assert removed_from(other) is not None
    assert torch.equal(again.logits(ids), ours.logits(ids))
    if not quantized:
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
        assert error(ours.logits(ids), their_logits(theirs, ids)) < CLOSE
        bare, _ = ours_of(tmp_path / "base")
        load_adapter(bare, tmp_path / "adapter")  # without a base: as PEFT reads it
        assert error(bare.logits(ids), ours.logits(ids)) < CLOSE
    else:
        with pytest.raises(UsageError, match="must be made again"):
            load_adapter(ours_of(tmp_path / "base", quant)[0], tmp_path / "adapter")


def test_pissa_begins_where_pefts_does(tmp_path: Path) -> None:
    """The same product and the same residual; the factors' signs and order are nobody's."""
    model = base_of(tmp_path / "base")
    ours, base = ours_of(tmp_path / "base")
    options = LoraOptions(lora_r=4, lora_alpha=10, init_lora_weights="pissa")
    attach(ours, options, base=base)
    theirs = peft.get_peft_model(copy.deepcopy(model), their_config(options, init_lora_weights="pissa"))
    for name, segment in segments(ours).items():
        layer = theirs.base_model.model.get_submodule(name)
        assert segment.adapter is not None
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert error(segment.adapter.delta(), product.detach()) < 1e-3, name
        assert error(segment.weight.dequantize(torch.float32), layer.base_layer.weight.detach()) < 1e-3, name


def test_a_pissa_that_peft_converted_is_read(tmp_path: Path) -> None:
    """PEFT's own file, of twice the rank over the base itself, is a plain LoRA to us too."""
    model = base_of(tmp_path / "base")
    ids = make_batch((29,)).input_ids
    options = LoraOptions(lora_r=4, lora_alpha=10)
    theirs = peft.get_peft_model(copy.deepcopy(model), their_config(options, init_lora_weights="pissa"))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    disturb(theirs)
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    ours, base = ours_of(tmp_path / "base")
    assert load_adapter(ours, tmp_path / "plain", base).lora_r == 8
    assert error(ours.logits(ids), their_logits(theirs, ids)) < CLOSE


@pytest.mark.parametrize(("steps", "dora"), [(1, False), (1, True), (5, False)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_loftq_through_a_file(steps: int, dora: bool, double_quant: bool, tmp_path: Path) -> None:
    base_of(tmp_path / "base")
    ids = make_batch((29,)).input_ids
    full = build_decoder(make_model(config("llama3-gqa"))).logits(ids)
    quant = QuantOptions(double_quant=double_quant)
    plain, base = ours_of(tmp_path / "base", quant)
    before = error(plain.logits(ids), full)
    ours, base = ours_of(tmp_path / "base", quant)
    options = LoraOptions(lora_r=16, lora_alpha=5, init_lora_weights="loftq", loftq_iter=steps, use_dora=dora)
    attach(ours, options, base=base)
    assert error(ours.logits(ids), full) < before
    disturb(ours)
    save_adapter(ours, tmp_path / "adapter", options, base=str(tmp_path / "base"))
    again, base = ours_of(tmp_path / "base", quant)
    load_adapter(again, tmp_path / "adapter", base)
    assert torch.equal(again.logits(ids), ours.logits(ids))
    if steps == 1:  # the base is the quantized weight: PEFT computes the same over it
        model = make_model(config("llama3-gqa"))
        for name, segment in segments(plain).items():
            model.get_submodule(name).weight.data = segment.weight.dequantize(torch.float32)
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
        compare(ours, theirs, ids)


def test_loftq_is_pefts_at_its_scaling(tmp_path: Path) -> None:
    """PEFT's single step, with alpha = r and constants in float32, on the weights that bitsandbytes would quantize."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    base_of(tmp_path / "base")
    ours, base = ours_of(tmp_path / "base", QuantOptions(double_quant=False))
    attach(ours, LoraOptions(lora_r=6, lora_alpha=6, init_lora_weights="loftq"), base=base)
    for name, segment in segments(ours).items():
        rest = base.source(name) - segment.weight.dequantize(torch.float32)
        theirs = _low_rank_decomposition(rest, reduced_rank=6)
        assert segment.adapter is not None
        assert error(segment.adapter.delta(), theirs["L"] @ theirs["R"]) < 1e-3, name


# -- tied embeddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_one_tensor(name: str, tmp_path: Path) -> None:
    model = base_of(tmp_path / "base", "qwen2-tied")
    ids = make_batch((29,)).input_ids
    plain = their_logits(model, ids)
    ours, _ = ours_of(tmp_path / "base")
    options = LoraOptions(lora_r=4, modules_to_save=[name])
    attach(ours, options)
    assert ours.embed is ours.head
    disturb(ours)
    save_adapter(ours, tmp_path / "adapter", options, base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    compare(ours, theirs, ids)
    again, base = ours_of(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter", base)
    assert torch.equal(again.logits(ids), ours.logits(ids))
    with disabled(again):
        assert again.embed is again.head
        assert error(again.logits(ids), plain) < CLOSE
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(again, tmp_path / "theirs", base)
    assert torch.equal(again.logits(ids), ours.logits(ids))


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")
@pytest.mark.parametrize("names", [["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_that_peft_trained_apart_are_refused(names: list[str], tmp_path: Path) -> None:
    made = their_config(LoraOptions(lora_r=4, modules_to_save=names))
    theirs = peft.get_peft_model(make_model(config("qwen2-tied")), made)
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="ensure_weight_tying"):
        load_adapter(build_decoder(make_model(config("qwen2-tied"))), tmp_path)
