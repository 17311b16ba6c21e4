"""Runs of every adapter: killed and resumed, loaded, merged, exported, and continued on another base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

from halfbyte.adapters import LoraOptions, read_options
from halfbyte.errors import HalfbyteError, Interrupted, UsageError
from halfbyte.evaluate.evaluate import BaseAndTuned
from halfbyte.export.deltas import WeightedAdapter, read_sum
from halfbyte.export.gguf_adapter import write_gguf_adapter
from halfbyte.export.merge import MergeOptions, read_deltas
from halfbyte.models.source import open_source
from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.continued import with_adapter
from halfbyte.run.folder import read_config
from halfbyte.run.planning import plan_of
from halfbyte.run.run import resume, run
from halfbyte.run.target import evaluate_target, find, load, merge_target
from halfbyte.train.checkpoint import list_checkpoints

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "method": "qlora"},
    "pissa": {"init_lora_weights": "pissa", "method": "lora"},
    "qpissa-bf16-file": {"init_lora_weights": "pissa_niter_4", "method": "qlora", "adapter_dtype": "bfloat16"},
    "loftq-5": {"init_lora_weights": "loftq", "loftq_iter": 5, "method": "qlora", "use_rslora": True, "lora_alpha": 3},
    "loftq-dora": {"init_lora_weights": "loftq", "use_dora": True, "method": "qlora"},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head", "norm", "0.mlp.down_proj"], "method": "qlora"},
}
SHIFTED = ["pissa", "qpissa-bf16-file", "loftq-5"]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize(("kind", "harm"), [("pissa", "cut off"), ("pissa", "altered"), ("continued", "cut off")])
def test_a_damaged_checkpoint_says_nothing_about_the_base(
    kind: str, harm: str, tiny_config: RunConfig, tmp_path: Path
) -> None:
    """Resumed from the one before it, the run ends at the same bits as if the damaged one had never been."""
    changes = KINDS["pissa"]
    if kind == "continued":
        changes = {"adapter_path": str(run(tiny_config.replace(output_dir=tmp_path / "first", max_steps=2)).path)}
    done = run(tiny_config.replace(**changes, max_steps=4, save_steps=2)).path
    without = tmp_path / "without"
    shutil.copytree(done, without)
    last = list_checkpoints(without)[-1]
    shutil.rmtree(last)
    path = done / last.name / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    if harm == "altered":
        start = 8 + int.from_bytes(content[:8], "little")
        content[start + 3 :: 400] = bytes(byte ^ 1 for byte in content[start + 3 :: 400])
    path.write_bytes(content if harm == "altered" else content[:-100])
    for folder in (done, without):
        (folder / "result.json").unlink()
        resume(folder)
    found, expected = tensors_of(done), tensors_of(without)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", list(KINDS))
def test_resumed_loaded_and_merged(kind: str, tiny_config: RunConfig, tmp_path: Path) -> None:
    """From the checkpoint in the middle to the same bits; loaded, the loss of the run; merged, the trained model."""
    config = tiny_config.replace(**KINDS[kind], max_steps=4, save_steps=2)
    done = run(config)
    assert done.eval_loss is not None
    assert done.eval_loss < done.result["base_eval_loss"]
    expected = tensors_of(done.path)

    cut = tmp_path / "cut"
    shutil.copytree(done.path, cut)
    for checkpoint in list_checkpoints(cut)[1:]:
        shutil.rmtree(checkpoint)
    (cut / "result.json").unlink()
    again = resume(cut)
    found = tensors_of(again.path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    seen = evaluate_target(find(str(done.path)))
    assert isinstance(seen, BaseAndTuned)
    exact = 1e-3 if "bf16" in kind else 1e-5
    assert seen.tuned.loss == pytest.approx(done.eval_loss, abs=exact)
    assert seen.base.loss == pytest.approx(done.result["base_eval_loss"], abs=1e-5)

    report = merge_target(
        find(str(done.path)), tmp_path / "merged", MergeOptions(base="trained", merge_dtype="float32")
    )
    assert report.comparison is not None
    assert report.comparison.mean_kl < 1e-6, str(report.comparison)


@pytest.mark.parametrize("kind", SHIFTED)
def test_a_shift_comes_from_the_checkpoint(kind: str, tiny_config: RunConfig) -> None:
    """The same shift in every file of the run, and none is computed again from factors that have been trained."""
    done = run(tiny_config.replace(**KINDS[kind], max_steps=2, save_steps=1))
    rank = tiny_config.lora_r
    files = [tensors_of(folder) for folder in (*list_checkpoints(done.path), done.path)]
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert all(torch.equal(file[name][rank:], files[0][name][rank:]) for file in files)
    assert not torch.equal(files[0][name][:rank], files[-1][name][:rank])
    assert read_options(done.path).lora_r == rank
    assert json.loads((done.path / "adapter_config.json").read_text())["r"] == 2 * rank


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}])
@pytest.mark.parametrize(("first", "second"), [("qlora", "lora"), ("lora", "qlora")])
def test_continued_on_another_base(
    first: str, second: str, kind: dict[str, Any], tiny_config: RunConfig, tmp_path: Path
) -> None:
    """What was learned on one base holds on the other: the run begins below the base's loss, and goes on."""
    begun = run(tiny_config.replace(method=first, **kind))
    more = tiny_config.replace(method=second, adapter_path=str(begun.path), output_dir=tmp_path / "more", max_steps=3)
    steps: list[dict[str, Any]] = []
    done = run(more, lambda event: steps.append(event) if event["event"] == "step" else None)
    assert done.eval_loss is not None
    assert begun.eval_loss is not None
    assert steps[0]["loss"] < begun.result["base_eval_loss"] - 1
    assert done.eval_loss < begun.eval_loss + 0.1
    config, _ = read_config(done.path)
    assert (config.lora_r, config.use_dora) == (tiny_config.lora_r, bool(kind.get("use_dora")))
    seen = evaluate_target(find(str(done.path)))
    assert isinstance(seen, BaseAndTuned)
    assert seen.tuned.loss == pytest.approx(done.eval_loss, abs=1e-5)


def test_the_16_bit_base_of_a_shifted_adapter_is_the_original(tiny_config: RunConfig, tmp_path: Path) -> None:
    """W - shift + update in float32, rounded once: what PEFT makes of the same files over the source's own weights."""
    done = run(tiny_config.replace(**KINDS["qpissa-bf16-file"], max_steps=2))
    merge_target(find(str(done.path)), tmp_path / "merged", MergeOptions(base="16bit", merge_dtype="float32"))
    delta = read_deltas(done.path)["model.layers.1.mlp.down_proj"]
    assert delta.shift is not None
    own = load_file(Path(tiny_config.model) / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    plain = delta.as_plain()
    torch.testing.assert_close(merged, own + plain.rows(0, own.shape[0]), rtol=1e-5, atol=1e-6)


def test_a_loaded_model_without_its_adapter_is_the_base(tiny_config: RunConfig) -> None:
    from halfbyte.adapters import disabled

    done = run(tiny_config.replace(**KINDS["whole"], max_steps=2))
    tuned: Any = load(str(done.path))
    base: Any = load(tiny_config.model, method="qlora", dtype="float32")
    ids = torch.arange(40, 60)
    assert not torch.equal(tuned.logits(ids), base.logits(ids))
    with disabled(tuned):
        assert torch.equal(tuned.logits(ids), base.logits(ids))


# -- what does not go together ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules_to_save": ["lm_haed"]}, "'lm_haed'; did you mean lm_head"),
        ({"modules_to_save": ["_proj"]}, "nothing is left for an adapter"),
        ({"method": "loftq", "quant_pattern": {"*": "fp32"}}, "this base is not quantized"),
        ({"rank_pattern": {"q_porj": 8}}, "rank_pattern: 'q_porj' matches no linear of the model; did you mean q_proj"),
        ({"alpha_pattern": {r"layers\.9\..*": 8}}, "alpha_pattern: .* matches no linear"),
        (
            {"quant_pattern": {"q_porj": "bf16"}},
            "quant_pattern: 'q_porj' matches no linear of the model; did you mean q",
        ),
    ],
)
def test_refused_in_one_line(changes: dict[str, Any], message: str, tiny_config: RunConfig) -> None:
    """And nothing is left in the way of the corrected command, found out however late."""
    with pytest.raises(UsageError, match=message) as caught:
        run(tiny_config.replace(**changes))
    assert "\n" not in str(caught.value)
    assert tiny_config.output_dir is not None
    assert not tiny_config.output_dir.exists()
    tiny_config.output_dir.mkdir()
    with pytest.raises(UsageError, match=message):
        run(tiny_config.replace(**changes))
    assert list(tiny_config.output_dir.iterdir()) == [], "a folder that was there stays"
    assert run(tiny_config.replace(max_steps=1)).result["step"] == 1


def test_a_run_that_began_is_kept_when_it_fails(tiny_config: RunConfig) -> None:
    path = tiny_config.output_dir
    assert path is not None

    def remove_the_lock(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            (path / "run.lock").unlink(missing_ok=True)

    with pytest.raises(HalfbyteError, match="was removed or taken over"):
        run(tiny_config, remove_the_lock)
    assert (path / "run.yaml").is_file()


def test_a_run_stopped_before_its_first_step_is_kept(tiny_config: RunConfig) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "loaded":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(tiny_config, stop)
    assert tiny_config.output_dir is not None
    assert resume(tiny_config.output_dir).result["step"] == tiny_config.max_steps


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "olora"}, "pissa_niter_N"),
        ({"init_lora_weights": "pissa_niter_0"}, "pissa_niter_N"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "pissa does not go with use_dora"),
        ({"init_lora_weights": "loftq", "loftq_iter": 2, "use_dora": True}, "loftq_iter above 1 does not go with"),
        ({"init_lora_weights": "pissa", "lora_r": 3000}, "at most 2048"),
        ({"modules_to_save": [""]}, "an empty module name"),
        ({"loftq_iter": 0}, "loftq_iter"),
        ({"loftq_iter": 5}, "loftq_iter is for init_lora_weights loftq"),
        ({"loftq_iter": 5, "init_lora_weights": "pissa"}, "loftq_iter is for init_lora_weights loftq"),
    ],
)
def test_options_that_contradict(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LoraOptions(**values)


def test_an_adapters_values_are_not_drawn_again(tiny_config: RunConfig, tmp_path: Path) -> None:
    done = run(tiny_config.replace(max_steps=1))
    more = tiny_config.replace(adapter_path=str(done.path), output_dir=tmp_path / "more")
    with pytest.raises(UsageError, match="init_lora_weights is 'pissa'"):
        run(more.replace(init_lora_weights="pissa"))
    with pytest.raises(UsageError, match="use_dora is True"):
        run(more.replace(use_dora=True))


def test_a_continued_adapter_keeps_its_own_shape(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets, rank and dropout are the file's, in run.yaml and in the plan too; what contradicts them is refused."""
    given = tiny_config.replace(method="lora", target_modules=["v_proj", "q_proj"], lora_dropout=0.25, max_steps=1)
    first = run(given).path
    base = {name: getattr(tiny_config, name) for name in ("model", "data", "dtype", "max_seq_length", "max_steps")}
    base |= {"method": "lora", "output_dir": tmp_path / "more", "adapter_path": str(first)}
    heard: list[dict[str, Any]] = []
    done = run(load_config(**base), heard.append)
    config, _ = read_config(done.path)
    assert (config.target_modules, config.lora_r, config.lora_dropout) == (["q_proj", "v_proj"], 4, 0.25)
    (attached,) = (event["trainable_parameters"] for event in heard if event["event"] == "loaded")
    assert json.loads((done.path / "plan.json").read_text())["trainable_parameters"] == attached
    assert plan_of(load_config(**base)).chosen.trainable == attached

    for changes, message in (
        ({"target_modules": ["down_proj"]}, r"target_modules is \['down_proj'\], and the adapter in .* has"),
        ({"target_modules": "q_proj"}, "target_modules is 'q_proj'"),
        ({"lora_r": 16}, "lora_r is 16, and the adapter in .* has 4"),
        ({"lora_alpha": 32 * 2}, "lora_alpha is 64"),
    ):
        with pytest.raises(UsageError, match=message):
            run(load_config(**base, **changes), overwrite=True)
    for same in ("v_proj, q_proj", ["q_proj", "v_proj"], "all-linear"):
        assert with_adapter(load_config(**base, target_modules=same)).target_modules == ["q_proj", "v_proj"]
    assert with_adapter(load_config(**base, lora_dropout=0.0)).lora_dropout == 0

    monkeypatch.setenv("HOME", str(first.parent))
    assert with_adapter(load_config(**base | {"adapter_path": "~/run"})).adapter_path == str(first)
    for name in ("adapter_config.json", "adapter_model.safetensors", "result.json"):
        (first / name).unlink()
    unfinished = with_adapter(load_config(**base))
    assert unfinished.adapter_path == str(first / "checkpoint-1")
    assert unfinished.lora_r == 4


def test_what_a_gguf_adapter_cannot_say(tiny_config: RunConfig, tmp_path: Path) -> None:
    source = open_source(tiny_config.model)
    for kind, message in (("dora", "a DoRA scales the rows"), ("whole", "holds whole modules")):
        done = run(tiny_config.replace(**KINDS[kind], max_steps=1, output_dir=tmp_path / kind))
        with pytest.raises(UsageError, match=message):
            write_gguf_adapter(tmp_path / "a.gguf", read_deltas(done.path), source, "a")
        with pytest.raises(UsageError, match="alone"):
            read_sum([WeightedAdapter(done.path, 0.5)])
    done = run(tiny_config.replace(**KINDS["pissa"], max_steps=1, output_dir=tmp_path / "pissa"))
    write_gguf_adapter(tmp_path / "a.gguf", read_deltas(done.path), source, "a")
    assert (tmp_path / "a.gguf").stat().st_size > 0
    one = read_sum([WeightedAdapter(done.path, 2.0)])["model.layers.0.mlp.up_proj"]
    assert (one.shift, one.a.shape[0]) == (None, 2 * tiny_config.lora_r)


def test_a_damaged_shift_is_named(tiny_config: RunConfig) -> None:
    from safetensors.torch import save_file

    done = run(tiny_config.replace(**KINDS["pissa"], max_steps=1))
    path = done.path / "adapter_model.safetensors"
    tensors = tensors_of(done.path)
    with safe_open(path, framework="pt") as file:
        kept = file.metadata()
    for value, message in (
        ("[1]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"lora_r": 3}', "with its shift 2 x 3"),
        ('{"lora_r": "x"}', "lora_r cannot be"),
        ('{"unknown": 1}', "unknown cannot be"),
    ):
        save_file(tensors, path, {**kept, "halfbyte.base_shift": value})
        with pytest.raises(UsageError, match=message):
            read_deltas(done.path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init_lora_weights": "loftq", "method": "lora"}, "loftq starts from what quantization loses"),
        ({"use_dora": True, "method": "full"}, "use_dora is for adapters"),
        ({"modules_to_save": ["lm_head"], "method": "full"}, "modules_to_save is for adapters"),
        ({"requantize": True, "method": "lora"}, "requantize is for method qlora"),
        ({"quant_pattern": {"q_proj": "bf16"}, "method": "full"}, "quant_pattern is for method qlora"),
    ],
)
def test_methods_that_would_ignore_an_option(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_config(model="m", **values)
    assert "\n" not in str(caught.value)
