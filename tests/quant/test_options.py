import pytest
from pydantic import ValidationError

from halfbyte.errors import UsageError
from halfbyte.quant import QuantOptions


def test_defaults_are_qloras():
    options = QuantOptions()
    assert (options.quant_type, options.blocksize, options.double_quant) == ("nf4", 64, True)
    assert all(field.description for field in QuantOptions.model_fields.values())


def test_a_pattern_is_a_name_an_end_or_a_glob_and_the_first_wins():
    options = QuantOptions(
        quant_pattern={
            "model.layers.0.self_attn.q_proj": "int8",
            "model.layers.[01].*": "fp16",
            "mlp.down_proj": "bf16",
            "o_proj": "fp4",
        }
    )
    assert options.format_of("model.layers.0.self_attn.q_proj") == "int8"
    assert options.format_of("model.layers.1.mlp.down_proj") == "fp16"
    assert options.format_of("model.layers.10.mlp.down_proj") == "bf16"
    assert options.format_of("model.layers.2.self_attn.o_proj") == "fp4"
    assert options.format_of("model.layers.2.self_attn.qo_proj") == "nf4"
    assert options.format_of("o_proj") == "fp4"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"q_porj": "bf16"}, "'q_porj' matches no linear of the model; did you mean q_proj"),
        ({"layers.1.*": "int8"}, r"did you mean \*\.layers\.1\.\*\?"),
        ({"lm_head": "int8"}, "'lm_head' matches no linear"),
        ({"xyz": "nf4"}, "the model has o_proj, q_proj"),
        ({"*_proj": "int8", "model.layers.1.q_proj": "bf16", "lm_head": "bf16", "model.layers.*": "fp4"}, None),
    ],
)
def test_patterns_that_match_nothing_are_named(pattern, message):
    linears = [f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("q_proj", "o_proj")]
    options = QuantOptions(quant_pattern=pattern)
    if message is None:
        options.require_modules(linears, ["lm_head"])
        return
    with pytest.raises(UsageError, match=message):
        options.require_modules(linears, ["lm_head"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"quant_type": "nf3"},
        {"blocksize": 48},
        {"blocksize": "64"},
        {"quant_pattern": {"q_proj": "gguf"}},
        {"quant_pattern": {"": "bf16"}},
        {"quanttype": "nf4"},
    ],
)
def test_what_does_not_exist_is_refused(wrong):
    with pytest.raises(ValidationError):
        QuantOptions(**wrong)
