import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte as hb
from halfbyte.adapters import disabled
from halfbyte.batch import Batch
from halfbyte.errors import Interrupted, UsageError
from halfbyte.evaluate.evaluate import BaseAndTuned, EvaluateOptions, EvaluateResult
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.export.merge import MergeOptions, WeightedAdapter
from halfbyte.run import folder, target
from halfbyte.run.config import RunConfig
from halfbyte.run.run import run
from tests.run.test_run import Events

SHORT = GenerateOptions(max_new_tokens=6)


@pytest.fixture(scope="module")
def done(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished QLoRA run."""
    config = hb.load_config(
        model=str(model_folder), data=str(data_file), output_dir=tmp_path_factory.mktemp("done") / "run", lora_r=4,
        method="qlora", dtype="float32", max_steps=12, eval_split=0.1, learning_rate=2e-2, max_seq_length=64,
    )  # fmt: skip
    return run(config).path


def ids(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.logits(torch.arange(60, 80))
    return logits


def test_a_run_loads_as_it_was_trained(done: Path) -> None:
    model: Any = target.load(str(done))
    assert model.spec.family == "llama"
    assert model.tokenizer.decode([65])
    result = json.loads((done / "result.json").read_text())
    again = target.evaluate_target(target.rows_from(target.find(str(done)), None))
    assert isinstance(again, BaseAndTuned)
    assert again.tuned.loss == pytest.approx(result["eval_loss"], rel=1e-6)
    assert again.base.loss == pytest.approx(result["base_eval_loss"], rel=1e-6)


def test_an_adapters_folder_is_a_target_with_its_own_base(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(done / name, folder)
    found = target.find(str(folder), dtype="float32")
    assert found.quant is None
    of_adapter: Any = target.open_target(found).model
    base: Any = target.load(found.config.model, dtype="float32")
    with disabled(of_adapter):
        assert torch.equal(ids(of_adapter), ids(base))
    assert not torch.equal(ids(of_adapter), ids(base))
    named: Any = target.load(found.config.model, adapter=str(folder), dtype="float32")
    assert torch.equal(ids(named), ids(of_adapter))
    quantized: Any = target.load(str(folder), dtype="float32", method="qlora")
    run_model: Any = target.load(str(done))
    assert torch.equal(ids(quantized), ids(run_model))


def test_what_cannot_be_changed_is_told_in_one_line(done: Path) -> None:
    for changes, message in (
        ({"dtype": "foo"}, "dtype input should be .*, not 'foo'"),
        ({"quant_type": "nf5"}, "quant_type input should be .*, not 'nf5'"),
        ({"lorar": 3}, "lorar is not a key that halfbyte knows: did you mean lora_r"),
        ({"method": "galore", "optim": "adamw"}, "galore means optim: galore_adamw"),
        ({"method": "full", "use_dora": True}, "use_dora is for adapters"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            target.find(str(done), **changes)
        assert "\n" not in str(caught.value)
    assert target.find(str(done), torch_dtype="bf16").config.dtype == "bfloat16"


def test_a_config_says_what_it_cannot_become(tiny_config: RunConfig) -> None:
    with pytest.raises(UsageError, match="lora_r input should be greater than or equal to 1, not 0"):
        tiny_config.replace(lora_r=0)
    with pytest.raises(UsageError, match="dora means use_dora: true, and use_dora is false"):
        tiny_config.replace(method="dora", use_dora=False)


def test_an_adapter_is_put_on_the_base_that_it_was_trained_on(tiny_config: RunConfig, tmp_path: Path) -> None:
    """A checkpoint of a run, and an adapter given with its model, are held as the run was: in its 4 bits."""
    done = run(tiny_config.replace(method="qlora", quant_type="int8", blocksize=128, save_steps=2, max_steps=4)).path
    whole: Any = target.load(str(done))
    middle = target.find(str(done / "checkpoint-2"))
    assert (middle.adapter, middle.run) == (done / "checkpoint-2", done)
    assert middle.config == target.find(str(done)).config
    last: Any = target.load(str(done / "checkpoint-4"))
    assert torch.equal(ids(last), ids(whole))
    report = target.merge_target(middle, tmp_path / "a", MergeOptions(rows=2, answer_tokens=2, max_kl=10))
    assert report.scores is not None

    for folder_of in (done, done / "checkpoint-4"):
        named: Any = target.load(tiny_config.model, adapter=str(folder_of), dtype="float32")
        assert torch.equal(ids(named), ids(whole))
    also: Any = target.load(tiny_config.model, adapter_path=str(done), torch_dtype="float32")
    assert torch.equal(ids(also), ids(whole))
    bare = target.find(tiny_config.model, dtype="float32")
    report = target.merge_target(bare, tmp_path / "b", MergeOptions(), adapters=[WeightedAdapter(done)])
    assert "in int8 in blocks of 128" in report.base
    assert "give --data" in report.not_scored

    assert target.find(tiny_config.model, adapter=str(done), method="lora").quant is None
    quant = target.find(tiny_config.model, adapter=str(done), quant_type="nf4").quant
    assert quant is not None
    assert (quant.quant_type, quant.blocksize) == ("nf4", 128)
    asked = target.find(tiny_config.model, method="lora", dtype="float32")
    report = target.merge_target(asked, tmp_path / "c", MergeOptions(), adapters=[WeightedAdapter(done)])
    assert report.base.endswith("as trained")
    with pytest.raises(UsageError, match="give one of them"):
        target.find(tiny_config.model, adapter=str(done), adapter_path=str(tmp_path))


def test_a_quantized_run_opens_in_16_bits(tiny_config: RunConfig) -> None:
    """What said how to quantize the base then has nothing to say."""
    done = run(tiny_config.replace(method="qlora", quant_pattern={"down_proj": "bf16"}, max_steps=1)).path
    assert target.find(str(done), method="lora").quant is None
    with pytest.raises(UsageError, match="requantize is for method qlora"):
        target.find(str(done), method="lora", requantize=True)


def test_an_unfinished_run_is_read_from_its_last_checkpoint(tiny_config: RunConfig) -> None:
    with pytest.raises(Interrupted):
        run(tiny_config.replace(save_steps=2), Events(interrupt_at=2))
    path = tiny_config.output_dir or Path()
    assert target.find(str(path)).adapter == path / "checkpoint-2"
    target.load(str(path))


def test_wrong_targets(done: Path, model_folder: Path, tmp_path: Path, tiny_config: RunConfig) -> None:
    with pytest.raises(UsageError, match="is a run and has an adapter of its own"):
        target.find(str(done), adapter=str(done))
    with pytest.raises(UsageError, match="has no adapter yet"):
        target.find(str(model_folder), adapter=str(tmp_path))
    with pytest.raises(UsageError, match="nothing to merge"):
        target.merge_target(target.find(str(model_folder)), tmp_path / "out", MergeOptions())
    with pytest.raises(UsageError, match="no rows to evaluate on"):
        target.rows_from(target.find(str(model_folder)), None)
    with pytest.raises(UsageError, match="nowhere"):
        target.load("./nowhere")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(UsageError, match="does not name its base model"):
        target.find(str(tmp_path))
    with pytest.raises(Interrupted):
        run(tiny_config.replace(method="full", save_steps=2), Events(interrupt_at=2))
    with pytest.raises(UsageError, match="is not finished, so it has no weights yet"):
        target.find(str(tiny_config.output_dir))


def test_an_adapter_is_not_method_full(done: Path, model_folder: Path) -> None:
    for name, adapter in ((str(done), None), (str(model_folder), str(done))):
        with pytest.raises(UsageError, match="is an adapter, and method full has none: leave --method out"):
            target.find(name, adapter, method="full")
    assert target.find(str(done), method="lora").quant is None
    assert target.find(str(model_folder), method="full").adapter is None


def test_evaluating_on_other_rows_and_a_bare_model(done: Path, data_file: Path, model_folder: Path) -> None:
    everything = target.evaluate_target(target.rows_from(target.find(str(done)), str(data_file)))
    assert isinstance(everything, BaseAndTuned)
    assert len(everything.tuned.rows) == 60
    assert everything.gains["loss"] < 0
    alone = target.evaluate_target(
        target.rows_from(target.find(str(model_folder), dtype="float32"), str(data_file)),
        EvaluateOptions(metrics=("exact_match",), max_new_tokens=4),
    )
    assert isinstance(alone, EvaluateResult)
    assert alone.metrics["exact_match"] == 0


def test_generating(done: Path, model_folder: Path) -> None:
    opened = target.open_target(target.find(str(done)))
    assert opened.raw, "the run's rows were prompts and completions"
    (tuned,) = target.generate_texts(opened, ["say 3:"], SHORT)
    (base,) = target.generate_texts(opened, ["say 3:"], SHORT, base=True)
    assert tuned.text.startswith(" ")
    assert tuned.tokens != base.tokens
    assert len(target.generate_texts(opened, ["a", "b"], SHORT, raw=False)) == 2
    with pytest.raises(UsageError, match="nothing to answer"):
        target.generate_texts(opened, [], SHORT)


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert target.read_prompts(tmp_path / "p.txt") == ["one", "two"]
    with pytest.raises(UsageError, match="cannot be read"):
        target.read_prompts(tmp_path / "q.txt")


def test_chatting(done: Path) -> None:
    session = target.chat_session(target.open_target(target.find(str(done))), SHORT, "be short")
    heard: list[str] = []
    session.send("hello", heard.append)
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]


def test_merging_a_run(done: Path, tmp_path: Path) -> None:
    report = target.merge_target(target.find(str(done)), tmp_path / "merged", MergeOptions(merge_dtype="float32"))
    merged: Any = target.load(str(tmp_path / "merged"), dtype="float32")
    tuned: Any = target.load(str(done))
    torch.testing.assert_close(ids(merged), ids(tuned), rtol=1e-4, atol=1e-4)
    assert "trained" in report.base


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_model_for_ones_own_loop(model_folder: Path, method: str) -> None:
    model: Any = hb.load(model_folder, trainable=True, method=method, lora_r=4, dtype="float32")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    tokens = torch.arange(50, 70)
    batch = Batch(tokens, torch.arange(20), tokens.roll(-1), (20,))
    losses = []
    for _ in range(4):
        nll, count = model.loss(batch)
        (nll / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(nll.detach()) / count)
    assert losses[-1] < losses[0]


def test_merging_a_run_proves_the_base(done: Path, tmp_path: Path) -> None:
    options = MergeOptions(rows=4, answer_tokens=4)
    report = target.merge_target(target.find(str(done)), tmp_path / "merged", options)
    assert report.scores is not None
    assert report.scores.chosen.name == "dequantized"
    config, _ = folder.read_config(done)
    assert (report.scores.rows.seed, len(report.scores.rows.examples)) == (config.seed, 4)
    assert report.scores.rows.available == 6
    assert report.scores.rows.stop_ids, "answers end where evaluate's do"
    assert report.adapters == (str(done),)


def test_merging_scores_on_other_rows(done: Path, data_file: Path, model_folder: Path, tmp_path: Path) -> None:
    options = MergeOptions(base="16bit", requantized=True, rows=5, answer_tokens=4, max_kl=50.0)
    report = target.merge_target(target.find(str(done)), tmp_path / "merged", options, data=str(data_file))
    assert report.scores is not None
    assert (len(report.scores.rows.examples), report.scores.rows.available) == (5, 60)
    found = target.find(str(model_folder), dtype="float32", method="qlora")
    with pytest.raises(UsageError, match="scores on held-out rows, and there are none: give --data"):
        target.merge_target(found, tmp_path / "out", MergeOptions(base="auto"), adapters=[WeightedAdapter(done)])
    own = [WeightedAdapter(done)]
    report = target.merge_target(
        found, tmp_path / "out", MergeOptions(answer_tokens=4), adapters=own, data=str(data_file)
    )
    assert report.scores is not None
    assert report.scores.chosen.name == "dequantized"


def test_merging_without_rows_says_so(tiny_config: RunConfig, data_file: Path, tmp_path: Path) -> None:
    path = run(tiny_config.replace(eval_split=0.0)).path
    report = target.merge_target(target.find(str(path)), tmp_path / "one", MergeOptions())
    assert (report.scores, report.not_scored) == (None, "the run held out no rows")
    gone = tmp_path / "rows.jsonl"
    shutil.copy(data_file, gone)
    path = run(tiny_config.replace(data=str(gone), output_dir=tmp_path / "other")).path
    gone.unlink()
    report = target.merge_target(target.find(str(path)), tmp_path / "two", MergeOptions())
    assert report.scores is None
    assert "rows.jsonl" in report.not_scored
    with pytest.raises(UsageError, match=r"rows\.jsonl"):
        target.merge_target(target.find(str(path)), tmp_path / "three", MergeOptions(base="auto"))


def test_merging_several_adapters(done: Path, tiny_config: RunConfig, model_folder: Path, tmp_path: Path) -> None:
    other = run(tiny_config.replace(method="lora", seed=7, max_steps=2)).path
    both = [WeightedAdapter(other, 0.5)]
    options = MergeOptions(merge_dtype="float32", base="dequantized")
    report = target.merge_target(target.find(str(done)), tmp_path / "sum", options, adapters=both)
    assert report.adapters == (str(done), f"{other} x 0.5")
    merged: Any = target.load(str(tmp_path / "sum"), dtype="float32")
    alone: Any = target.load(str(done))
    assert (ids(merged) - ids(alone)).abs().max() > 1e-3
    base = target.find(str(model_folder), dtype="float32")
    one_way = target.merge_target(base, tmp_path / "a", options, adapters=[WeightedAdapter(done), *both])
    target.merge_target(base, tmp_path / "b", options, adapters=[*both, WeightedAdapter(done)])
    assert one_way.scores is None
    a, b = (target.load(str(tmp_path / name), dtype="float32") for name in "ab")
    torch.testing.assert_close(ids(a), ids(b), rtol=1e-5, atol=1e-5)


def test_adapters_of_different_bases_are_refused(done: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(done, changed)
    text = (changed / "run.yaml").read_text()
    (changed / "run.yaml").write_text(text.replace("fingerprint: sha256:", "fingerprint: sha256:f"))
    found = target.find(str(done))
    with pytest.raises(UsageError, match=r"of different bases: .* was trained on .*\(other weights\)"):
        target.merge_target(found, tmp_path / "out", MergeOptions(), adapters=[WeightedAdapter(changed)])
    (changed / "run.yaml").unlink()  # then the names decide
    config = json.loads((changed / "adapter_config.json").read_text())
    elsewhere = config | {"base_model_name_or_path": f"/elsewhere/{Path(config['base_model_name_or_path']).name}"}
    (changed / "adapter_config.json").write_text(json.dumps(elsewhere))
    options = MergeOptions(base="dequantized", verify=False)
    target.merge_target(found, tmp_path / "moved", options, adapters=[WeightedAdapter(changed)])
    (changed / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "meta/other"}))
    with pytest.raises(UsageError, match=r"of different bases: .*, .* on meta/other"):
        target.merge_target(found, tmp_path / "out", MergeOptions(), adapters=[WeightedAdapter(changed)])
    with pytest.raises(UsageError, match="has no adapter yet"):
        target.merge_target(found, tmp_path / "out", MergeOptions(), adapters=[WeightedAdapter(tmp_path)])
