"""Encoder-decoders from rows to a folder that transformers loads: they learn, resume, answer, merge."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

import halfbyte as hb
from halfbyte.data import DataOptions, prepare
from halfbyte.data.options import Task
from halfbyte.errors import Interrupted, UsageError
from halfbyte.evaluate.evaluate import BaseAndTuned, EvaluateOptions
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.export.export import ExportOptions
from halfbyte.export.merge import MergeOptions
from halfbyte.models.seq2seq import Seq2Seq
from halfbyte.run import target
from halfbyte.run.config import RunConfig
from halfbyte.run.exporting import export_target
from halfbyte.run.run import resume, run
from tests.models.test_seq2seq import BART, T5, t5_tokenizer
from tests.run.conftest import write_rows
from tests.run.test_run import Events
from tests.run.test_tasks import animals

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call

SHORT = GenerateOptions(max_new_tokens=8)


def write_base(name: str, folder: Path) -> Path:
    """A model as transformers initialises it, which can learn from nothing."""
    torch.manual_seed(0)
    if name == "t5":
        made: Any = transformers.T5Config(**{**T5, "d_model": 64, "d_kv": 16, "feed_forward_proj": "gated-gelu"})
    else:
        made = transformers.BartConfig(**{**BART, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1})
        made.init_std = 0.15
    AutoModelForSeq2SeqLM.from_config(made, dtype=torch.float32).save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)
    return folder


def copies() -> list[dict[str, Any]]:
    """Every word of three letters, to be said again."""
    words = [a + b + c for a in "abcd" for b in "abcd" for c in "abcd"]
    return [{"prompt": word, "completion": word} for word in words]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("copies")
    return hb.load_config(
        model=str(write_base("bart", folder / "base")), data=str(write_rows(folder / "rows.jsonl", copies())),
        output_dir=folder / "run", method="lora", dtype="float32", lora_r=32, lora_alpha=64, max_steps=90,
        learning_rate=3e-3, eval_split=0.15, max_seq_length=32, per_device_train_batch_size=32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(config: RunConfig) -> Path:
    return run(config).path


def test_it_learns_to_copy_words_that_it_never_saw(done: Path) -> None:
    found = target.find(str(done))
    assert found.config.task == "seq2seq"  # of itself: the model is an encoder-decoder
    scores = target.evaluate_target(
        target.rows_from(found, None), EvaluateOptions(metrics=("exact_match",), max_new_tokens=8)
    )
    assert isinstance(scores, BaseAndTuned)
    assert len(scores.tuned.rows) == 10
    assert scores.tuned.metrics["exact_match"] == 1.0
    assert scores.base.metrics["exact_match"] == 0.0
    assert scores.tuned.supervised_tokens == 10 * 4  # three letters and the end
    result = json.loads((done / "result.json").read_text())
    assert result["eval_loss"] == pytest.approx(scores.tuned.loss, rel=1e-5)
    assert result["base_eval_loss"] == pytest.approx(scores.base.loss, rel=1e-5)
    answer = target.generate_texts(target.open_target(found), ["bad"], SHORT)[0]
    assert (answer.text, answer.finish_reason) == ("bad", "eos")
    card = (done / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM" in card
    assert "halfbyte generate ." in card


def greedy(model: Any, text: str) -> str:
    tokenizer = t5_tokenizer()
    out = model.generate(
        **tokenizer([text], return_tensors="pt", return_token_type_ids=False), max_new_tokens=8, num_beams=1,
        do_sample=False, forced_eos_token_id=None,
    )  # fmt: skip
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def test_peft_loads_the_run(done: Path, config: RunConfig) -> None:
    base = AutoModelForSeq2SeqLM.from_pretrained(config.model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, done).eval()
    assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
    assert greedy(theirs, "dab") == "dab"


@pytest.mark.filterwarnings(
    "ignore:Model has .tie_word_embeddings=True.:UserWarning"
)  # PEFT's: both names are in the file
@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("module", ["lm_head", "shared", "layer_norm"])
def test_peft_computes_with_whole_modules(name: str, module: str, config: RunConfig, tmp_path: Path) -> None:
    """Tied embeddings too, whichever of their names was given; and the file is read again."""
    base = write_base(name, tmp_path / "base")
    few = config.replace(model=str(base), modules_to_save=[module], max_steps=2, output_dir=tmp_path / "run")
    opened = target.open_target(target.find(str(run(few).path)))
    ids = torch.tensor(opened.encoder.encode_whole("abcd"))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(base, dtype=torch.float32), tmp_path / "run"
    ).eval()
    decoder_ids = torch.cat([torch.tensor([opened.model.start]), ids[:-1]])
    with torch.no_grad():
        expected = theirs(input_ids=ids[None], decoder_input_ids=decoder_ids[None]).logits[0]
    torch.testing.assert_close(opened.model.logits(ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_merged_folders_are_transformers_models(method: str, done: Path, config: RunConfig, tmp_path: Path) -> None:
    path = done if method == "lora" else run(config.replace(method=method, output_dir=tmp_path / "run")).path
    report = target.merge_target(target.find(str(path)), tmp_path / "merged", MergeOptions(merge_dtype="float32"))
    assert report.comparison is not None
    assert report.comparison.mean_kl < 1e-6
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ours = target.generate_texts(target.open_target(target.find(str(path))), ["dab", "cc"], SHORT)
    assert [greedy(model, "dab"), greedy(model, "cc")] == [one.text for one in ours]
    again = target.open_target(target.find(str(tmp_path / "merged"), dtype="float32"))
    assert isinstance(again.model, Seq2Seq)
    assert [one.tokens for one in target.generate_texts(again, ["dab", "cc"], SHORT)] == [one.tokens for one in ours]


def test_an_interrupted_run_resumes_bit_for_bit(config: RunConfig, tmp_path: Path) -> None:
    short = config.replace(max_steps=6, lora_dropout=0.1, per_device_train_batch_size=4)
    straight = run(short.replace(output_dir=tmp_path / "straight"))
    with pytest.raises(Interrupted):
        run(short.replace(output_dir=tmp_path / "stopped", save_steps=3), Events(interrupt_at=3))
    resumed = resume(tmp_path / "stopped")
    mine, theirs = (load_file(p / "adapter_model.safetensors") for p in (straight.path, resumed.path))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_padding_and_packing_change_nothing(config: RunConfig, tmp_path: Path) -> None:
    losses = []
    for packing, rows in ((True, 16), (False, 1)):
        one = config.replace(
            max_steps=3, packing=packing, output_dir=tmp_path / f"{rows}", per_device_train_batch_size=rows,
            gradient_accumulation_steps=16 // rows,
        )  # fmt: skip
        losses.append(run(one).train_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_t5_answers_with_labels(tmp_path: Path) -> None:
    """Labelled rows: the word is the answer, and accuracy is of the likeliest one. In 4 bits."""
    result = hb.train(
        model=str(write_base("t5", tmp_path / "base")), data=str(write_rows(tmp_path / "rows.jsonl", animals(90))),
        output_dir=tmp_path / "run", method="qlora", dtype="float32", lora_r=16, max_steps=60, learning_rate=3e-3,
        max_seq_length=48, eval_split=0.2,
    )  # fmt: skip
    assert result.result["metrics"]["accuracy"] > 0.9
    assert result.result["metrics"]["base"]["accuracy"] < 0.7
    assert result.config.task == "seq2seq"


def prepared(tmp_path: Path, rows: list[dict[str, Any]], task: Task = "seq2seq", **options: Any) -> Any:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return prepare(DataOptions(data=str(file), task=task, eval_split=0, **options), t5_tokenizer(), seed=0)


def test_rows_become_sources_and_answers(tmp_path: Path) -> None:
    tokenizer = t5_tokenizer()

    def parts(rows: list[dict[str, Any]], **options: Any) -> tuple[str, str]:
        (example,) = prepared(tmp_path, rows, **options).train
        assert example.supervised.tolist() == [i >= example.source_length for i in range(len(example))]
        ids = example.input_ids.tolist()
        return tokenizer.decode(ids[: example.source_length]), tokenizer.decode(ids[example.source_length :])

    assert parts([{"prompt": "ask", "completion": "say"}]) == ("ask<eos>", "say<eos>")
    alpaca = {"instruction": "Turn.", "input": "abc", "output": "cba"}
    assert parts([alpaca]) == ("Turn.\n\nabc<eos>", "cba<eos>")
    assert parts([alpaca], system_prompt="Be brief.") == ("Be brief.\n\nTurn.\n\nabc<eos>", "cba<eos>")
    # What does not fit is cut from the source, in front of its end.
    assert parts([{"prompt": "a long question", "completion": "say"}], max_seq_length=10) == ("a lon<eos>", "say<eos>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "only"}, "an encoder-decoder needs a source and an answer"),
        ({"prompt": " ", "completion": "x"}, "the prompt is empty"),
        ({"prompt": "x", "completion": "far too long"}, "leave no room for a source: max_seq_length is 10"),
        (
            {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant")]},
            "this is a conversation of turns",
        ),
    ],
)
def test_rows_that_are_no_pairs(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        prepared(tmp_path, [row], max_seq_length=10)


def test_options_of_language_models_are_refused(tmp_path: Path) -> None:
    alpaca = [{"instruction": "Turn.", "output": "cba"}]
    with pytest.raises(UsageError, match="an encoder-decoder is given plain text"):
        prepared(tmp_path, alpaca, chat_template="chatml")
    with pytest.raises(UsageError, match="train_on_inputs is for causal language models"):
        prepared(tmp_path, alpaca, train_on_inputs=True)


def test_what_an_encoder_decoder_cannot_do(done: Path, config: RunConfig, tmp_path: Path) -> None:
    found = target.find(str(done))
    with pytest.raises(UsageError, match="chat is for decoders, and this is an encoder-decoder"):
        target.chat_session(target.open_target(found), SHORT)
    with pytest.raises(UsageError, match="export is for decoders"):
        export_target(found, tmp_path / "out", ExportOptions(to="gguf"))
    with pytest.raises(UsageError, match="it learns task: seq2seq, not causal"):
        run(config.replace(task="causal", output_dir=tmp_path / "out"))
    with pytest.raises(UsageError, match="decoder's families only"):
        run(config.replace(method="full", output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
