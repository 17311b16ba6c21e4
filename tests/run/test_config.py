import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import halfbyte
from halfbyte.errors import UsageError
from halfbyte.options import parse_bytes
from halfbyte.run import aliases
from halfbyte.run.config import (
    COMPONENTS,
    RunConfig,
    load_config,
    template_yaml,
    to_yaml,
    translate,
    write_template,
)
from halfbyte.yamlfile import Entry, parse_yaml

SOURCES = sorted(Path(halfbyte.__file__).parent.glob("**/*.py"))


def config(**values: Any) -> RunConfig:
    return load_config(**({"model": "m"} | values))


def from_text(text: str, **flags: Any) -> RunConfig:
    from halfbyte.run.config import build

    entries = translate(parse_yaml(text, "c.yaml"))
    return build(entries | translate({k: Entry(v, "--" + k.replace("_", "-")) for k, v in flags.items()}))


# -- the fields -------------------------------------------------------------------------------------------------------


def test_every_field_is_declared_once() -> None:
    names = [name for options in COMPONENTS.values() for name in options.model_fields]
    assert len(names) == len(set(names))
    assert set(names) == set(RunConfig.model_fields)


@pytest.mark.parametrize("name", sorted(RunConfig.model_fields))
def test_every_field_is_described_and_read(name: str) -> None:
    field = RunConfig.model_fields[name]
    assert field.description
    assert len(field.description) > 15
    declared = re.compile(rf"^\s+{name}: .*(Field\(|= )|^\s+{name}: [A-Z]\w+ = ")
    read = re.compile(rf"\.{name}\b")
    found = [
        f"{path.name}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text().splitlines()
        if read.search(line) and not declared.search(line)
    ]
    by_name = f'"{name}"'
    found += [path.name for path in SOURCES if path.parent.name != "cli" and path.name != "aliases.py"
              and by_name in path.read_text()]  # fmt: skip
    assert found, f"{name} is declared and never read"


def test_the_designs_defaults() -> None:
    c = config()
    assert (c.method, c.lora_r, c.lora_alpha, c.lora_dropout, c.target_modules) == ("auto", 16, 32, 0, "all-linear")
    assert (c.lr_scheduler_type, c.warmup_ratio, c.num_train_epochs) == ("cosine", 0.03, 3)
    assert (c.max_seq_length, c.eval_split, c.eval_max_rows) == (2048, 0.05, 500)
    assert (c.save_minutes, c.save_total_limit, c.seed, c.quant_type, c.blocksize) == (15, 2, 42, "nf4", 64)


def test_a_config_is_a_frozen_value() -> None:
    c = config(lora_r=8)
    assert c == config(lora_r=8)
    assert c.replace(lora_r=4).lora_r == 4
    with pytest.raises(ValueError, match="frozen"):
        c.lora_r = 2  # type: ignore[misc]


def test_a_component_gets_its_own_options() -> None:
    c = config(lora_r=8, quant_type="int8", data="rows.jsonl")
    for options in COMPONENTS.values():
        part = c.pick(options)
        assert type(part) is options
        assert all(getattr(part, name) == getattr(c, name) for name in options.model_fields)


# -- files and flags --------------------------------------------------------------------------------------------------


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nlora_r: 8\nlearning_rate: 1e-4\n")
    c = load_config(file, {"lora_rank": "32"})
    assert (c.lora_r, c.learning_rate) == (32, 1e-4)


def test_yaml_round_trip() -> None:
    c = config(
        data=[{"path": "a", "weight": 2}, {"path": "b", "weight": 1}],
        memory="6GiB",
        quant_pattern={"down_proj": "bf16"},
    )
    text = to_yaml(c, {"schema_version": 1, "base_model": {"fingerprint": "x"}})
    assert from_text(text) == c
    assert from_text(to_yaml(c)) == c


def test_a_newer_schema_is_refused() -> None:
    with pytest.raises(UsageError, match=r"c.yaml:2: record has schema version 99, newer"):
        from_text("model: m\nrecord: {schema_version: 99}\n")


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("6GiB", 6 * 2**30), ("6GB", 6 * 10**9), ("1.5 GB", 1_500_000_000), ("800M", 800_000_000), (5, 5), (None, None)],
)
def test_sizes(text: object, bytes_: int | None) -> None:
    assert parse_bytes(text) == bytes_


@pytest.mark.parametrize("text", ["6 apples", "GB", "-3GB", "6GiB 4"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="a size is a number and a unit"):
        config(memory=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: m\nlora_rnak: 8\n", r"c.yaml:2: lora_rnak is not a key that halfbyte knows: did you mean lora_r\?"),
        ("model: m\nlearning_rte: 8\n", r"did you mean learning_rate\?"),
        ("model: m\nbase_modle: 8\n", r"did you mean model\?"),
        ("model: m\nxyzzy: 8\n", r"xyzzy is not a key that halfbyte knows \(`halfbyte init` writes all"),
        ("model: m\n\nlearning_rate: fast\n", r"c.yaml:3: learning_rate .*number.*not 'fast'"),
        ("model: m\nlora_r: 0\n", r"c.yaml:2: lora_r .*greater than or equal to 1, not 0"),
        ("model: m\nquant_type: nf5\n", r"c.yaml:2: quant_type .*'nf4', 'fp4', 'e2m1', 'int4' or 'int8', not 'nf5'"),
        ("model: m\nmethod: vera\n", r"c.yaml:2: method vera is not built: choose one of auto, full, galore, lora, "),
        ("model: m\nmethod: dpo\n", r"c.yaml:2: method dpo is a task here and no method: --task dpo$"),
        (
            "model: m\nmethod: dora\nuse_dora: false\n",
            r"c.yaml:2: method dora means use_dora: true, but c.yaml:3 says false: remove one$",
        ),
        (
            "model: m\ninit_lora_weights: gaussian\nmethod: loftq\n",
            r"c.yaml:3: method loftq means init_lora_weights: loftq, but c.yaml:2 says gaussian: remove one$",
        ),
        ("model: m\nadapter: dora\nload_in_4bit: false\nload_in_8bit: true\nmethod: dora\n", r"says method is 'qdora'"),
        ("model: m\nmethod: magic\n", r"c.yaml:2: method .*'auto', 'full', 'lora' or 'qlora', not 'magic'"),
        ("model: m\nneftune_noise_alpha: 5\n", r"c.yaml:2: neftune_noise_alpha: NEFTune is not built$"),
        ("lora_r: 4\n", r"model is needed"),
        ("model: m\nbase_model: n\n", r"c.yaml:2: base_model says model is 'n', but c.yaml:1 says 'm': remove one"),
        ("model: m\nlora_r: 4\nlora_rank: 8\n", r"c.yaml:3: lora_rank says lora_r is 8, but c.yaml:2 says 4"),
        ("model: m\nadapter: qlora\nload_in_4bit: false\n", r"adapter.*load_in_4bit.* disagree: QLoRA needs"),
        ("model: m\nload_in_4bit: true\nload_in_8bit: true\n", r"disagree: they ask for a 4-bit and an 8-bit base"),
        ("model: m\nfinetuning_type: full\nquantization_bit: 4\n", r"disagree: full fine-tuning needs a 16-bit base"),
        ("model: m\nmethod: lora\nload_in_4bit: true\n", r"says method is 'qlora', but c.yaml:2 says 'lora'"),
        ("model: m\nquantization_bit: 3\n", r"c.yaml:2: quantization_bit: expected 4 or 8, not 3"),
        ("model: m\nmask_prompt: perhaps\n", r"c.yaml:2: mask_prompt: expected true or false, not 'perhaps'"),
        ("model: m\neval_split: 2.5\n", r"c.yaml:2: eval_split a share below 1 or a whole number of rows"),
        ("model: m\nlora_r: 0\nblocksize: 7\n", r"lora_r .*; c.yaml:3: blocksize "),
    ],
)
def test_wrong_configs_are_one_line_that_names_the_place(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        from_text(text)
    assert "\n" not in str(caught.value)


def test_wrong_flags_name_the_flag() -> None:
    with pytest.raises(UsageError, match=r"^--lora-r .*greater than or equal to 1, not '0'"):
        from_text("model: m\n", lora_r="0")


# -- other tools' spellings -------------------------------------------------------------------------------------------


def test_aliases_name_fields_and_do_not_hide_them() -> None:
    for name, alias in aliases.ALIASES.items():
        assert alias.field in RunConfig.model_fields, name
        assert name not in RunConfig.model_fields, f"{name} is a field and an alias"
    known = {*aliases.ALIASES, *aliases.METHOD_KEYS, *aliases.BITS_KEYS}
    assert known >= aliases.SWITCHES
    assert not set(aliases.LATER_KEYS) & set(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Axolotl
        ("base_model: m\ndatasets: [{path: a.jsonl, type: alpaca}]\nadapter: qlora\nload_in_4bit: true\n"
         "sequence_len: 512\nsample_packing: true\nlora_target_linear: true\nmicro_batch_size: 2\nnum_epochs: 1\n"
         "optimizer: paged_adamw_8bit\nlr_scheduler: cosine\nval_set_size: 0.1\nbf16: auto\n",
         {"model": "m", "data": "a.jsonl", "method": "qlora", "max_seq_length": 512, "packing": True,
          "target_modules": "all-linear", "per_device_train_batch_size": 2, "num_train_epochs": 1,
          "optim": "paged_adamw_8bit", "lr_scheduler_type": "cosine", "eval_split": 0.1, "dtype": "auto"}),
        # LLaMA-Factory
        ("model_name_or_path: m\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 8\nlora_target: all\n"
         "quantization_bit: 4\ndataset: a.json\ncutoff_len: 1024\nval_size: 0.2\nbf16: true\n",
         {"model": "m", "method": "qlora", "lora_r": 8, "target_modules": "all-linear", "data": "a.json",
          "max_seq_length": 1024, "eval_split": 0.2, "dtype": "bfloat16"}),
        # TRL and PEFT
        ("model_name_or_path: m\ndataset_name: o/d\nuse_peft: true\nlora_target_modules: [q_proj, v_proj]\n"
         "max_length: 64\nload_in_4bit: true\nbnb_4bit_quant_type: fp4\nuse_bnb_nested_quant: false\n"
         "torch_dtype: bfloat16\noptim: adamw_torch\nassistant_only_loss: true\n",
         {"data": "o/d", "method": "qlora", "target_modules": ["q_proj", "v_proj"], "max_seq_length": 64,
          "quant_type": "fp4", "double_quant": False, "dtype": "bfloat16", "optim": "adamw", "train_on_inputs": False}),
        # Unsloth
        ("model_name: m\nload_in_4bit: false\nuse_gradient_checkpointing: unsloth\nrandom_state: 7\nr: 4\n"
         "full_finetuning: false\nuse_peft: true\n",
         {"method": "lora", "gradient_checkpointing": True, "seed": 7, "lora_r": 4}),
        # mlx-lm
        ("model: m\ntrain_data: a\niters: 20\nsteps_per_eval: 5\nsteps_per_report: 2\nsave_every: 10\n"
         "mask_prompt: true\ngrad_checkpoint: true\nbatch_size: 3\nfine_tune_type: full\n",
         {"max_steps": 20, "eval_steps": 5, "logging_steps": 2, "save_steps": 10, "train_on_inputs": False,
          "gradient_checkpointing": True, "per_device_train_batch_size": 3, "method": "full"}),
        # repeated, but agreeing
        ("model: m\nbase_model: m\nmethod: qlora\nload_in_4bit: true\n", {"model": "m", "method": "qlora"}),
        ("model: m\nload_in_8bit: false\nload_in_4bit: true\nadapter: lora\n", {"method": "qlora"}),
    ],
)  # fmt: skip
def test_other_tools_files(text: str, expected: dict[str, Any]) -> None:
    found = from_text(text)
    assert {name: getattr(found, name) for name in expected} == expected


def test_a_data_sets_key_that_would_change_rows_is_refused() -> None:
    with pytest.raises(UsageError, match=r"c.yaml:2: datasets: .*not understood: \['shards'\]"):
        from_text("model: m\ndatasets: [{path: a, shards: 4}]\n")


# -- init -------------------------------------------------------------------------------------------------------------


def test_the_template_names_every_field_and_is_the_default_config(tmp_path: Path) -> None:
    text = write_template(tmp_path / "c.yaml", {"model": "m", "lora_rank": "8"})
    assert load_config(tmp_path / "c.yaml") == config(lora_r=8)
    for name in RunConfig.model_fields:
        assert re.search(rf"^(#: )?{name}:", text, re.MULTILINE), name
    shown = yaml.safe_load("\n".join(line.removeprefix("#: ") for line in text.splitlines() if line.startswith("#: ")))
    assert config(**{k: v for k, v in shown.items() if v is not None}) == config()
    assert all(len(line) <= 120 for line in text.splitlines())


def test_init_keeps_an_existing_file_and_refuses_wrong_values(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"exists.*--overwrite"):
        write_template(file, {})
    with pytest.raises(UsageError, match=r"--lora-r"):
        write_template(file, {"lora_r": "no"}, overwrite=True)
    assert file.read_text() == "mine"
    write_template(file, {}, overwrite=True)
    assert file.read_text() == template_yaml({})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optim": "galore_adamw"}, "optim: galore_adamw is for full fine-tuning: set method: full"),
        ({"optim": "galore_adamw", "method": "lora"}, "set method: full"),
        ({"loraplus_lr_ratio": 16, "method": "full"}, "loraplus_lr_ratio is for adapters"),
        (
            {"optim": "galore_adamw", "method": "full", "gradient_accumulation_steps": 2},
            "gradient_accumulation_steps must be 1 with per_layer_updates",
        ),
        (
            {"optim": "galore_adamw", "method": "full", "max_grad_norm": 0.5},
            r"max_grad_norm cannot be 0\.5 with per_layer_updates \(on with galore_…\): a layer is updated before",
        ),
        ({"per_layer_updates": True, "max_grad_norm": 1}, "max_grad_norm cannot be 1 with per_layer_updates: "),
    ],
)
def test_updates_that_cannot_be_made_are_refused_with_the_reason(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config(**fields)


def test_clipping_follows_from_how_layers_are_updated() -> None:
    whole = config(optim="galore_adamw", method="full", per_layer_updates=False, gradient_accumulation_steps=4)
    by_layer = config(optim="galore_adamw", method="full")
    assert (config().clip_norm, whole.clip_norm, by_layer.clip_norm) == (1.0, 1.0, 0.0)
    assert config(max_grad_norm=0).clip_norm == 0
    assert (config().by_layer, whole.by_layer, by_layer.by_layer) == (False, False, True)
    assert config(optim="galore_adamw", method="full", max_grad_norm=0).clip_norm == 0
    assert config(optim_memory="2GiB").optim_memory == 2 * 2**30
