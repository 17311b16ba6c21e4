import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfbyte.errors import DoesNotFit, Interrupted, UsageError
from halfbyte.run import planning
from halfbyte.run import run as run_module
from halfbyte.run.config import RunConfig, load_config
from halfbyte.run.folder import list_runs, read_config, summary
from halfbyte.run.run import resume, run
from halfbyte.train.checkpoint import list_checkpoints
from halfbyte.train.events import read_events
from tests.run.conftest import rows, write_rows


class Events(list[dict[str, Any]]):
    """Records what is told; raises KeyboardInterrupt, as a second Ctrl-C would, after a given step's checkpoint."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        super().__init__()
        self.interrupt_at = interrupt_at

    def __call__(self, event: dict[str, Any]) -> None:
        self.append(event)
        if event["event"] == "checkpoint" and event["step"] == self.interrupt_at:
            raise KeyboardInterrupt

    @property
    def kinds(self) -> list[str]:
        return [event["event"] for event in self]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_from_config_to_result(tiny_config: RunConfig) -> None:
    assert tiny_config.output_dir is not None
    path = tiny_config.output_dir
    there_at_the_start: list[str] = []
    events = Events()

    def listen(event: dict[str, Any]) -> None:
        events(event)
        if event["event"] == "start":
            there_at_the_start.extend(p.name for p in path.iterdir())

    result = run(tiny_config, listen)
    assert {"run.yaml", "plan.json", "events.jsonl", "run.lock"} <= set(there_at_the_start)
    assert events.kinds[:4] == ["prepared", "planned", "loaded", "start"]
    assert events.kinds[-1] == "finished"
    names = {p.name for p in path.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "result.json"} <= names
    assert "run.lock" not in names
    on_disk = json.loads((path / "result.json").read_text())
    assert on_disk == result.result
    assert on_disk["status"] == "completed"
    assert on_disk["step"] == 6
    assert on_disk["method"] == "qlora"
    assert on_disk["eval_loss"] < on_disk["base_eval_loss"] - 1
    assert on_disk["eval_loss"] == on_disk["metrics"]["loss"]
    assert on_disk["eval_loss"] == pytest.approx(read_events(path / "events.jsonl")[-1]["eval_loss"], rel=1e-5)
    assert on_disk["peak_memory_bytes"] > 1e8
    plan = json.loads((path / "plan.json").read_text())
    assert on_disk["predicted"] == {key: plan[key] for key in ("peak_memory_bytes", "seconds")}
    for key in ("peak_memory_bytes", "seconds"):
        assert 0 < plan[key]["p50"] <= plan[key]["p95"]
    for file in ("run.yaml", "plan.json", "result.json"):
        assert "schema_version" in (path / file).read_text()
    card = (path / "README.md").read_text()
    assert f"{on_disk['eval_loss']:.4f}" in card
    assert card.startswith("---\n")


def test_run_yaml_repeats_the_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    first = run(tiny_config)
    again = run(load_config(first.path / "run.yaml", {"output_dir": str(tmp_path / "again")}))
    assert again.result["train_loss"] == first.result["train_loss"]
    mine, theirs = adapter(first.path), adapter(again.path)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    resolved, record = read_config(first.path)
    assert resolved.method == "qlora"
    assert None not in (resolved.learning_rate, resolved.per_device_train_batch_size, resolved.gradient_checkpointing)
    assert {"base_model", "data", "chat_template", "versions", "backend", "schema_version"} <= record.keys()


def test_an_interrupted_run_resumes_bit_for_bit(tiny_config: RunConfig, tmp_path: Path) -> None:
    straight = run(tiny_config.replace(output_dir=tmp_path / "straight", lora_dropout=0.1))
    stopped = tmp_path / "stopped"
    with pytest.raises(Interrupted, match=f"halfbyte resume {stopped}") as caught:
        run(tiny_config.replace(output_dir=stopped, lora_dropout=0.1, save_steps=3), Events(interrupt_at=3))
    assert caught.value.exit_code == 4
    assert summary(stopped).status == "interrupted"
    resumed = resume(stopped)
    mine, theirs = adapter(straight.path), adapter(resumed.path)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert resumed.result["train_loss"] == straight.result["train_loss"]
    steps = [e["step"] for e in read_events(stopped / "events.jsonl") if e["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_resume_from_another_folder(tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths of a config mean the folder where the run was started."""
    folder = Path(tiny_config.model).parent
    monkeypatch.chdir(folder)
    relative = tiny_config.replace(model=Path(tiny_config.model).name, save_steps=2)
    with pytest.raises(Interrupted):
        run(relative, Events(interrupt_at=2))
    monkeypatch.chdir(tmp_path)
    assert resume(tiny_config.output_dir or Path()).result["status"] == "completed"


def test_the_folder_of_offloaded_state_is_the_same_from_everywhere(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    asked = tiny_config.replace(method="full", optim="paged_adamw", optim_offload_dir="offload", max_steps=1)
    assert run(asked).config.optim_offload_dir == tmp_path / "offload"
    assert read_config(tmp_path / "run")[0].optim_offload_dir == tmp_path / "offload"
    assert planning.absolute(asked.replace(optim_offload_dir="~/x")).optim_offload_dir == tmp_path / "home" / "x"


def test_a_complete_run_is_returned_or_extended(tiny_config: RunConfig) -> None:
    done = run(tiny_config)
    events = Events()
    assert resume(done.path, events).result == done.result
    assert events == []
    with pytest.raises(UsageError, match="already at step 6: --max-steps must be more than that, not 6"):
        resume(done.path, max_steps=6)
    more = resume(done.path, max_steps=8)
    assert more.result["step"] == 8
    assert read_config(done.path)[0].max_steps == 8


def test_resume_refuses_another_base_or_other_data(tiny_config: RunConfig, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "own.jsonl", rows(40))
    config = tiny_config.replace(data=str(data), save_steps=2)
    with pytest.raises(Interrupted):
        run(config, Events(interrupt_at=2))
    path = config.output_dir or Path()
    before = snapshot(path)
    write_rows(data, [{**row, "completion": " other"} for row in rows(40)])
    with pytest.raises(UsageError, match="the data changed since the run was started"):
        resume(path)
    write_rows(data, rows(40))
    text = (path / "run.yaml").read_text()
    (path / "run.yaml").write_text(text.replace("fingerprint: sha256:", "fingerprint: sha256:00"))
    with pytest.raises(UsageError, match="the base model's weights changed"):
        resume(path)
    (path / "run.yaml").write_text(text)
    assert snapshot(path) == before
    assert resume(path).result["step"] == 6


def test_starting_over_an_existing_run(tiny_config: RunConfig) -> None:
    first = run(tiny_config)
    before = snapshot(first.path)
    with pytest.raises(UsageError, match=r"halfbyte resume .* --overwrite") as caught:
        run(tiny_config.replace(seed=7))
    assert caught.value.exit_code == 2
    assert snapshot(first.path) == before
    second = run(tiny_config.replace(seed=7), overwrite=True)
    assert second.path == first.path
    assert adapter(second.path).keys() == set(adapter(first.path))
    assert read_config(second.path)[0].seed == 7
    assert len(list_checkpoints(second.path)) <= 2


@pytest.mark.parametrize("name", ["adapter_path", "checkpoint", "model", "data", "eval_data", "chat_template"])
def test_overwriting_never_deletes_what_the_run_reads(tiny_config: RunConfig, tmp_path: Path, name: str) -> None:
    path = tmp_path / "run"
    path.mkdir()
    write_rows(path / "rows.jsonl", rows(20))
    (path / "run.yaml").write_text("method: lora")
    (path / "checkpoint-2").mkdir()
    values: dict[str, Any] = {
        "adapter_path": {"adapter_path": str(path)},
        "checkpoint": {"adapter_path": str(path / "checkpoint-2")},
        "model": {"model": str(path)},
        "data": {"data": [{"path": str(path / "rows.jsonl"), "weight": 2.0}]},
        "eval_data": {"eval_data": str(path / "rows.jsonl")},
        "chat_template": {"chat_template": str(path / "run.yaml")},
    }[name]
    before = snapshot(path)
    with pytest.raises(UsageError, match=r"--overwrite would delete .*: choose another output_dir") as caught:
        run(tiny_config.replace(**values, output_dir=tmp_path / "elsewhere" / ".." / "run"), overwrite=True)
    assert "\n" not in str(caught.value)
    assert snapshot(path) == before


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_other_methods(tiny_config: RunConfig, method: str) -> None:
    result = run(tiny_config.replace(method=method, learning_rate=5e-3)).result
    assert result["method"] == method
    assert result["eval_loss"] < result["base_eval_loss"]


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_full_fine_tuning_in_little_memory(tiny_config: RunConfig, tmp_path: Path, optim: str) -> None:
    """Run, interrupted, resumed: the same weights; what the optimizer decided is in run.yaml."""
    galore = optim.startswith("galore")
    own: dict[str, Any] = {"galore_rank": 4} if galore else {"optim_memory": 0}
    config = tiny_config.replace(method="full", optim=optim, **own)
    whole = run(config)
    kept = read_config(whole.path)[0]
    assert (kept.per_layer_updates, kept.max_grad_norm) == ((True, 0.0) if galore else (False, 1.0))
    rows_at_once = (kept.per_device_train_batch_size or 0) * (kept.gradient_accumulation_steps or 0)
    assert (kept.gradient_accumulation_steps, rows_at_once) == (1, 16)
    config = config.replace(output_dir=tmp_path / "again", save_steps=3)
    with pytest.raises(Interrupted):
        run(config, Events(interrupt_at=3))
    again = resume(tmp_path / "again")
    first, second = (load_file(path / "model.safetensors") for path in (whole.path, again.path))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not [p.name for path in (whole.path, again.path) for p in path.iterdir() if "optimizer" in p.name]


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_with_paged_state_are_the_same_adapters(tiny_config: RunConfig, tmp_path: Path, method: str) -> None:
    """As configs of other tools ask for it; LoRA+ beside it, which moves B further."""
    config = tiny_config.replace(method=method, optim="adamw", loraplus_lr_ratio=4.0)
    held = run(config)
    paged = run(config.replace(optim="paged_adamw", optim_memory=0, output_dir=tmp_path / "paged"))
    plain = run(config.replace(loraplus_lr_ratio=None, output_dir=tmp_path / "plain"))
    first, second, third = (adapter(done.path) for done in (held, paged, plain))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert all(first[name].norm() > 1.5 * third[name].norm() for name in first if "lora_B" in name)


def test_a_fully_tuned_run_is_a_model_that_transformers_loads(tiny_config: RunConfig) -> None:
    from transformers import AutoModelForCausalLM

    from halfbyte.run.target import load

    done = run(tiny_config.replace(method="full", learning_rate=5e-3))
    ids = torch.arange(40, 60)
    theirs = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32)(ids[None]).logits[0]
    ours: Any = load(str(done.path))
    torch.testing.assert_close(ours.logits(ids), theirs.detach(), rtol=1e-4, atol=1e-4)
    assert resume(done.path, max_steps=7).result["base_eval_loss"] == done.result["base_eval_loss"]


def test_an_adapter_can_be_continued(tiny_config: RunConfig, tmp_path: Path) -> None:
    first = run(tiny_config)
    more = tiny_config.replace(adapter_path=str(first.path), output_dir=tmp_path / "more", max_steps=2)
    events = Events()
    second = run(more.without(["lora_r"]), events)
    start = next(event for event in events if event["event"] == "step")
    assert start["loss"] < first.result["base_eval_loss"] - 1
    assert read_config(second.path)[0].lora_r == 4, "the adapter's own rank"
    with pytest.raises(UsageError, match=r"lora_r is 8, and the adapter in .* has 4: leave it out"):
        run(more.replace(lora_r=8, output_dir=tmp_path / "other"))
    with pytest.raises(UsageError, match="method full has none"):
        run(more.replace(method="full", output_dir=tmp_path / "other"))


def test_conversations_keep_their_template(tiny_config: RunConfig, tmp_path: Path) -> None:
    said = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}]}
            for i in range(30)]  # fmt: skip
    done = run(tiny_config.replace(data=str(write_rows(tmp_path / "chat.jsonl", said)), max_steps=2))
    template = (done.path / "chat_template.jinja").read_text()
    assert "messages" in template
    assert read_config(done.path)[1]["chat_template"]["name"] == "plain"


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_budget_that_nothing_fits_writes_nothing(tiny_config: RunConfig) -> None:
    for method in ("auto", "qlora", "full"):
        with pytest.raises(DoesNotFit, match=r"the budget is 0.01 GB \(--memory\)") as caught:
            run(tiny_config.replace(memory="10MB", method=method))
        assert caught.value.exit_code == 3
        assert "\n" not in str(caught.value)
    assert not (tiny_config.output_dir or Path()).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": None}, "no data: give --data"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "./nowhere"}, "nowhere"),
        ({"adapter_path": "./nowhere"}, "nowhere has no adapter yet .no adapter_config.json"),
        ({"target_modules": ["q_porj"]}, "q_porj.*did you mean q_proj"),
        ({"eval_split": 60}, "eval_split: cannot hold out 60 of 60 rows"),
        ({"revision": "main"}, "revision 'main' is for Hub models"),
        ({"report_to": ["trackio"]}, "report_to: trackio is not installed"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    tiny_config: RunConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(tiny_config.replace(**change))
    assert "\n" not in str(caught.value)
    assert not (tiny_config.output_dir or Path()).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "adamw", "galore_rank": 4}, "galore_rank is for optim galore_…: leave it out"),
        ({"optim": "paged_adamw", "galore_proj_type": "left"}, "galore_proj_type is for optim galore_…: leave it out"),
        ({"optim": "adamw", "optim_memory": 0}, "optim_memory is for optim paged_…: leave it out"),
        ({"optim": "adamw_8bit", "optim_offload_dir": "x"}, "optim_offload_dir is for optim paged_…: leave it out"),
        ({"dpo_beta": 0.5}, "dpo_beta is for task dpo, and these rows are no pairs of answers: leave it out"),
        ({"dpo_label_smoothing": 0.3}, "dpo_label_smoothing is for task dpo"),
        ({"label_names": ["cat", "dog"]}, "label_names is for rows with labels, and these have none: leave it out"),
    ],
)
def test_options_without_effect_are_refused(tiny_config: RunConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(tiny_config.replace(**options))
    assert not (tiny_config.output_dir or Path()).exists()


def test_broken_rows_are_named_and_too_many_stop_the_run(tiny_config: RunConfig, tmp_path: Path) -> None:
    good = [json.dumps(row) for row in rows(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join([*good[:10], '{"prompt": "half', *good[10:]]) + "\n")
    events = Events()
    run(tiny_config.replace(data=str(file), max_steps=1), events)
    assert next(str(bad) for bad in events[0]["audit"].bad).startswith(f"{file}:11:")
    file.write_text("\n".join(good[:10] + ["{broken"] * 10) + "\n")
    with pytest.raises(UsageError, match=rf"10 of 20 rows are unusable .*{file}:11"):
        run(tiny_config.replace(data=str(file), output_dir=tmp_path / "other"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
        (lambda folder: (folder / "config.json").write_text("{half"), "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer"),
    ],
)
def test_half_written_models(tiny_config: RunConfig, tmp_path: Path, damage: Any, message: str) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_config.model, folder)
    damage(folder)
    with pytest.raises(UsageError, match=message) as caught:
        run(tiny_config.replace(model=str(folder)))
    assert "\n" not in str(caught.value)
    assert not (tiny_config.output_dir or Path()).exists()


# -- the folder as a database -----------------------------------------------------------------------------------------


def test_runs_are_listed_with_their_status(tiny_config: RunConfig, tmp_path: Path) -> None:
    done = run(tiny_config)
    with pytest.raises(Interrupted):
        run(tiny_config.replace(output_dir=tmp_path / "stopped", save_steps=2), Events(interrupt_at=2))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.yaml").write_text("model: [")
    found = {entry.path.name: entry for entry in list_runs(tmp_path)}
    assert {name: entry.status for name, entry in found.items()} == {
        "run": "completed", "stopped": "interrupted", "odd": "damaged",
    }  # fmt: skip
    assert found["run"].step == 6
    assert found["run"].eval_loss == pytest.approx(done.result["eval_loss"], rel=1e-5)
    assert found["stopped"].step == 2
    assert json.dumps([entry.as_dict() for entry in found.values()])
    assert list_runs(tmp_path / "nothing") == []


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        resume(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no run: it has no run.yaml"):
        resume(tmp_path)
    (tmp_path / "run.yaml").write_text("model: m\n")
    with pytest.raises(UsageError, match=r"has no record: it is a config, not a run's own file"):
        resume(tmp_path)


# ---------------------------------------------------------------- no memory outside of the loop


def no_memory(*arguments: Any) -> None:
    torch.empty(1 << 52)


def test_no_memory_while_loading_is_one_line_and_leaves_no_folder(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load", no_memory)
    with pytest.raises(DoesNotFit, match=r"memory ran out .*free some memory, then try again") as caught:
        run(tiny_config)
    assert "\n" not in str(caught.value)
    assert tiny_config.output_dir is not None
    assert not tiny_config.output_dir.exists()


def test_no_memory_for_what_follows_the_training_loses_nothing(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_config.output_dir
    assert path is not None
    with monkeypatch.context() as patched:
        patched.setattr(run_module.outputs, "write_tokenizer", no_memory)
        with pytest.raises(DoesNotFit, match=rf"memory ran out .*halfbyte resume {path}"):
            run(tiny_config)
    assert resume(path).result["step"] == 6
    steps = [event["step"] for event in read_events(path / "events.jsonl") if event["event"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6], "nothing was trained again"


def test_an_error_that_is_no_lack_of_memory_keeps_its_own_words(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(run_module, "load", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(tiny_config)


def test_labels_are_scored_after_fewer_prompts_where_memory_is_short() -> None:
    sizes = {tokens: run_module._in_batches(tokens).eval_batch_size for tokens in (1, 512, 4096, 100_000)}
    assert sizes == {1: 1, 512: 4, 4096: 32, 100_000: 32}


def test_rows_with_labels_cost_more_passes_at_the_end(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Each label is scored after each prompt, by base and tuned."""
    labelled = [{"text": f"number {i}", "label": "odd" if i % 2 else "even"} for i in range(40)]
    path = write_rows(tmp_path / "labelled.jsonl", labelled)
    config = tiny_config.replace(data=str(path), eval_split=0.25)
    counted = {
        task: planning.request(asked, planning.survey(asked)).evaluations
        for task, asked in (("causal", config), ("classification", config.replace(task="classification")))
    }
    assert counted["causal"] == counted["classification"] + 2
