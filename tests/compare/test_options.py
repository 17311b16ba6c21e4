from pathlib import Path
from typing import Any

import pytest

from halfbyte.compare.options import CompareOptions, load_request
from halfbyte.compare.variants import Variant, variants_of
from halfbyte.errors import UsageError
from halfbyte.run.config import RunConfig


def variants(options: dict[str, Any] | None = None, **fields: Any) -> list[Variant]:
    return variants_of(load_request(None, {"model": "m", "data": "d", **fields}, options or {}))


def keys(options: dict[str, Any] | None = None, **fields: Any) -> list[str]:
    return [variant.key for variant in variants(options, **fields)]


def test_no_field_of_a_comparison_is_a_field_of_a_run() -> None:
    assert not CompareOptions.model_fields.keys() & RunConfig.model_fields.keys()
    assert all(field.description for field in CompareOptions.model_fields.values())


def test_grids_and_lists_make_variants() -> None:
    assert keys() == ["lora", "qlora"]
    assert keys({"methods": "full,lora,qlora,dora,loftq"}) == ["full", "lora", "qlora", "dora", "loftq"]
    assert keys({"vary": {"method": ["lora", "qlora"], "lora_r": [8, 16]}}) == [
        "lora-r8", "lora-r16", "qlora-r8", "qlora-r16",
    ]  # fmt: skip
    assert keys({"methods": "qlora", "vary": {"lora_r": "8,16"}}) == ["qlora-r8", "qlora-r16"]
    assert keys({"methods": ("qlora",), "vary": {"quant_type": ("nf4", "int4")}}) == ["qlora-nf4", "qlora-int4"]
    made = variants({"methods": "qdora", "variants": ({"name": "mine", "method": "lora", "lora_alpha": 8},)})
    assert [v.key for v in made] == ["qdora", "mine"]
    assert (made[0].config.method, made[0].config.use_dora, made[1].config.lora_alpha) == ("qlora", True, 8)


def test_a_variant_wins_over_what_is_shared() -> None:
    made = variants({"variants": ({"method": "lora"}, {"method": "lora", "r": 4})}, lora_r=32)
    assert [v.config.lora_r for v in made] == [32, 4]
    assert [v.key for v in made] == ["lora", "lora-r4"]


def test_a_chain_has_the_shape_of_what_it_goes_on_from() -> None:
    half = {"name": "half", "method": "qlora", "lora_r": 4, "only_a_start": True}
    switch = {"name": "switch", "method": "lora", "continue_from": "half"}
    made = variants({"methods": "lora,qlora", "variants": (half, switch)})[-1]
    assert (made.continue_from, made.config.lora_r, made.config.method) == ("half", 4, "lora")


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        ({"methods": "lora"}, {}, "1 variant is nothing to compare"),
        ({"methods": "lora,lora"}, {}, "two variants are called lora"),
        ({"methods": "lora,nonsense"}, {}, "vary"),
        ({"methods": "lora,auto"}, {}, "method auto leaves open what is compared"),
        ({"methods": "lora", "vary": {"method": ["qlora"]}}, {}, "methods are given twice"),
        ({"vary": {"lora_r": [8, 16]}}, {"methods": None}, "--methods: methods is not a key"),
        ({"vary": {"seed": [1, 2]}}, {}, "seed cannot vary: every variant is run with the same seeds"),
        ({"methods": "lora", "vary": {"model": ["a", "b"]}}, {}, "model cannot vary: a comparison is of one model"),
        ({"methods": "lora", "vary": {"lora_rr": [1, 2]}}, {}, "lora_rr is not a key that halfbyte knows: did you"),
        ({"methods": "lora", "vary": {"lora_r": []}}, {}, "lora_r has no values"),
        ({"variants": ({"lora_r": 8},)}, {}, r"variants\[1\]: no method"),
        ({"variants": ({"method": "lora", "name": 3},)}, {}, "name must be a word"),
        ({"methods": "lora", "variants": ({"name": "x", "method": "lora", "continue_from": "y"},)}, {},
         "no variant before it has that name"),
        ({"methods": "full", "variants": ({"name": "x", "method": "lora", "continue_from": "full"},)}, {}, "has none"),
        ({"methods": "lora", "variants": ({"name": "x", "method": "lora", "lora_r": 4, "continue_from": "lora"},)}, {},
         "lora_r is that of the adapter of lora"),
        ({"methods": "pissa,lora", "variants": ({"name": "x", "method": "lora", "continue_from": "pissa"},)}, {},
         "its initial values change the base"),
        ({"methods": "lora", "variants": ({"name": "x", "method": "lora"},)}, {}, "lora and x are the same run"),
        ({"seeds": 0}, {}, "--seeds"),
        ({}, {"method": "lora"}, "method is one run's"),
        ({}, {"output_dir": "x"}, "--output-dir: output_dir is a run's folder"),
        ({}, {"adapter_path": "x"}, "continue_from"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(options: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        variants(options, **fields)
    assert "\n" not in str(caught.value)


def test_how_a_base_is_quantized_may_be_shared() -> None:
    """A GGUF file's comparison of lora and qlora: what only a quantized base takes is for those variants alone."""
    made = variants({"methods": "full,lora,qlora,loftq"}, requantize=True)
    assert [v.config.requantize for v in made] == [False, False, True, True]
    with pytest.raises(UsageError, match="requantize is for method qlora"):
        variants({"variants": ({"method": "lora", "requantize": True}, {"method": "qlora"})})


def test_variants_that_a_search_would_make_one_are_refused() -> None:
    rates = {"methods": "lora", "vary": {"learning_rate": (1e-4, 3e-4)}}
    assert len(variants(rates)) == 2
    with pytest.raises(UsageError, match="differ in nothing but the learning rate, which --tune-lr searches"):
        variants({**rates, "tune_lr": True})


def test_a_file_has_both_kinds_of_fields(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: m\ndata: d\nlr: 1e-4\nmethods: [lora, qlora]\nvary: {lora_r: [8, 16]}\nseeds: 5\naccept: old\n"
        "variants:\n  - {name: x, method: full}\n"
    )
    request = load_request(file, {"max_steps": "7"}, {"seeds": "2"})
    assert (request.options.seeds, request.options.accept) == (2, (Path("old"),))
    made = variants_of(request)
    assert [v.key for v in made] == ["lora-r8", "lora-r16", "qlora-r8", "qlora-r16", "x"]
    assert {v.config.max_steps for v in made} == {7}
    assert {v.config.learning_rate for v in made} == {1e-4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nsedes: 3\n", r"c.yaml:2: sedes is not a key that halfbyte knows: did you mean seeds\?"),
        ("model: m\nmethds: lora\n", r"c.yaml:2: methds is not a key that halfbyte knows: did you mean methods\?"),
        ("model: m\nlora_rank_: 3\n", r"c.yaml:2: lora_rank_ is not a key that halfbyte knows: did you mean"),
        ("model: m\nseeds: many\n", r"c.yaml:2: seeds input should be a valid integer.*, not 'many'"),
        ("model: m\nvary: 3\n", r"c.yaml:2: vary input should be a valid dictionary, not 3"),
        ("model: m\nvariants: [lora]\n", r"c.yaml:2: variants\[0\] input should be a valid dictionary, not 'lora'"),
        ("model: m\nseeds: 1\nseeds: 2\n", r"c.yaml:3: seeds was already given at .*c.yaml:2"),
        ("model: m\nmethod: lora\n", r"c.yaml:2: method is one run's"),
    ],
)  # fmt: skip
def test_errors_of_a_file_name_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_request(file)
