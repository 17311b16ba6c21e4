"""The methods' names are presets over fields: written out on the way in, found again for people."""

import pytest

from halfbyte.errors import UsageError
from halfbyte.optim import FULL_LEARNING_RATE
from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.methods import PRESETS, SPELLINGS, expand, known, name_of
from halfbyte.run.planning import make, request, resolve, survey


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_written_out_and_found_again(name: str) -> None:
    config = load_config(model="m", method=name)
    preset = PRESETS[name]
    assert config.method == preset.method
    assert {field: getattr(config, field) for field in preset.fields} == dict(preset.fields)
    assert config.method_name == name
    assert RunConfig(model="m", method=name) == config
    assert RunConfig.model_validate(config.model_dump()) == config
    plain = load_config(model="m", method=preset.method)
    changed = {field for field in RunConfig.model_fields if getattr(plain, field) != getattr(config, field)}
    assert changed == set(preset.fields)
    assert plain.replace(method=name) == config


@pytest.mark.parametrize("spelling", [*SPELLINGS, "QDoRA"])
def test_other_spellings(spelling: str) -> None:
    assert known(spelling) in PRESETS
    assert load_config(model="m", method=spelling).method_name == known(spelling)


def test_what_is_none_is_known_as_none() -> None:
    assert known("magic") is None
    assert known("auto") == "auto"
    assert expand({"method": "magic"}) == {"method": "magic"}


def test_a_preset_leaves_its_own_variants() -> None:
    assert load_config(model="m", method="pissa", init_lora_weights="pissa_niter_16").method_name == "pissa"
    assert load_config(model="m", method="galore", optim="galore_adamw_8bit").method_name == "galore"
    assert load_config(model="m", method="loraplus", loraplus_lr_ratio=4).loraplus_lr_ratio == 4


def test_several_at_once_are_joined() -> None:
    assert load_config(model="m", method="dora", use_rslora=True).method_name == "dora+rslora"
    assert name_of({"method": "auto"}) == "auto"


def test_contradictions_are_errors() -> None:
    with pytest.raises(UsageError, match="method qdora means use_dora: true, but argument says false: remove one"):
        load_config(model="m", method="qdora", use_dora=False)
    with pytest.raises(ValueError, match="loftq means init_lora_weights: loftq, and init_lora_weights is default"):
        RunConfig(model="m", method="loftq", init_lora_weights="default")


def test_a_flag_wins_over_a_preset_of_the_file(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nmethod: qdora\nlora_r: 4\n")
    assert load_config(file, {"method": "loftq"}).method_name == "loftq"
    assert load_config(file, {"method": "lora"}).method_name == "lora"
    assert load_config(file, {"method": "full"}).method_name == "full"
    assert load_config(file, {"use_rslora": True}).method_name == "qdora+qrslora"
    with pytest.raises(UsageError, match=r"c.yaml:2: method qdora means use_dora: true, but --use-dora says false"):
        load_config(file, {"use_dora": False})
    file.write_text("model: m\nmethod: qlora\nuse_dora: false\noptim: galore_adamw_8bit\n")
    assert load_config(file, {"method": "dora", "optim": "adamw"}).method_name == "dora"
    assert load_config(file, {"method": "galore"}).optim == "galore_adamw_8bit"


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"adapter": "dora", "load_in_4bit": True}, "qdora"),
        ({"finetuning_type": "lora", "quantization_bit": 4, "use_dora": True}, "qdora"),
        ({"adapter": "pissa"}, "pissa"),
        ({"adapter": "galore"}, "galore"),
    ],
)
def test_other_tools_keys(keys: dict[str, object], name: str) -> None:
    assert load_config(model="m", **keys).method_name == name


def test_galore_moves_matrices_as_full_fine_tuning_does(tiny_config: RunConfig) -> None:
    """Its step is multiplied with galore_scale, so the default rate is divided by it."""
    for scale in (0.25, 4.0):
        found = survey(tiny_config.replace(method="galore", learning_rate=None, galore_scale=scale))
        assert resolve(found, make(found)).learning_rate == pytest.approx(FULL_LEARNING_RATE / scale)
    found = survey(tiny_config.replace(method="full", learning_rate=None))
    assert resolve(found, make(found)).learning_rate == FULL_LEARNING_RATE


def test_eight_bits_of_other_tools_are_eight_bits() -> None:
    for keys in ({"load_in_8bit": True}, {"adapter": "dora", "quantization_bit": 8}):
        config = load_config(model="m", **keys)
        assert (config.method, config.quant_type) == ("qlora", "int8")
    assert load_config(model="m", load_in_4bit=True).quant_type == "nf4"
    with pytest.raises(UsageError, match="quant_type is 'int8', but argument says 'nf4'"):
        load_config(model="m", load_in_8bit=True, quant_type="nf4")
    with pytest.raises(UsageError, match="full fine-tuning needs a 16-bit base"):
        load_config(model="m", adapter="galore", load_in_4bit=True)


def test_auto_with_loftq_is_quantized(tiny_config: RunConfig) -> None:
    found = survey(tiny_config.replace(method="auto", init_lora_weights="loftq"))
    plan = make(found)
    assert plan is not None
    assert request(found.config, found).method == "qlora"
    assert resolve(found, plan).method_name == "loftq"
