"""The card of a real adapter: its front matter parses, its snippet runs, its numbers are the run's."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from halfbyte.adapters import load_adapter
from halfbyte.export.card import already_quantized, licence_of, model_card
from halfbyte.models.load import load_model
from halfbyte.models.source import open_source
from tests.evaluate.conftest import byte_tokenizer
from tests.export.conftest import Trained

RECORD = {
    "schema_version": 1,
    "base_model": {"kind": "folder", "revision": None, "fingerprint": "sha256:" + "ab" * 32},
    "data": {"fingerprint": "cd" * 32, "format": "messages", "train_rows": 1200, "eval_rows": 60},
    "chat_template": {"name": "chatml", "sha256": "ef" * 32},
    "versions": {"python": "3.11.7", "halfbyte": "0.1.0", "torch": "2.13.0"},
}
RESULT = {
    "method": "qlora",
    "step": 300,
    "tokens": 150_000,
    "seconds": 432.1,
    "tokens_per_second": 347.2,
    "peak_memory_bytes": 2_345_678_901,
    "metrics": {
        "loss": 0.5,
        "perplexity": 1.6487,
        "supervised_tokens": 2048,
        "evaluated_rows": 60,
        "exact_match": 0.95,
        "intervals": {"loss": [0.4, 0.6], "exact_match": [0.86, 0.98]},
        "base": {"loss": 2.5, "perplexity": 12.2, "exact_match": 0.0},
    },
}


def config(model: str, **values: Any) -> dict[str, Any]:
    return {
        "model": model,
        "data": [{"path": "/home/me/secret-folder/mails.jsonl"}],
        "method": "auto",
        "quant_type": "nf4",
        "blocksize": 64,
        "double_quant": True,
        "quant_pattern": {},
        "lora_r": 16,
        "learning_rate": 2e-4,
        "seed": 42,
        "adapter_path": None,
        "output_dir": "/home/me/runs/x",
        **values,
    }


def front_of(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match is not None
    front: dict[str, Any] = yaml.safe_load(match[1])
    return front


def test_what_the_card_says(gemma: Trained) -> None:
    source = open_source(str(gemma.folder))
    card = model_card(config(str(gemma.folder)), RECORD, RESULT, source, ["halfbyte train mails.yaml"])
    assert front_of(card) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["halfbyte", "lora", "qlora"],
    }
    for text in (
        "nf4 in blocks of 64, double-quantized",
        "| exact match | 0.0000 | 0.9500 | 0.8600 to 0.9800 |",
        "| loss (nats a token) | 2.5000 | 0.5000 | 0.4000 to 0.6000 |",
        "60 rows (2,048 supervised tokens)",
        "| rows | 1,200 to train on, 60 held out |",
        f"`{'cd' * 32}`",
        "chatml",
        "`mails.jsonl`",
        "lora_r: 16",
        "learning_rate: 0.0002",
        "method: qlora",
        "| peak memory | 2.35 GB |",
        "halfbyte train mails.yaml",
        "torch 2.13.0",
    ):
        assert text in card, text
    assert "already quantized" not in card
    assert "/home/me/runs" not in card


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own
def test_the_snippet_loads_the_adapter(gemma: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for path in gemma.adapter.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    byte_tokenizer().save_pretrained(folder)
    card = model_card(config(str(gemma.folder)), RECORD, RESULT | {"method": "lora"}, open_source(str(gemma.folder)))
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace("path/to/this/folder", str(folder)), names)
    ids = torch.arange(30)
    with torch.no_grad():
        theirs = names["model"].float()(ids[None]).logits[0]
    loaded = load_model(gemma.options, None, torch.float32, "cpu")
    load_adapter(loaded.model, folder)
    # transformers loads in bf16, and Gemma's embedding scale stays rounded to it.
    torch.testing.assert_close(loaded.model.eval().logits(ids), theirs, rtol=0, atol=0.02)  # type: ignore[operator]
    assert names["tokenizer"]("abc").input_ids == byte_tokenizer()("abc").input_ids


def test_options_of_other_methods_are_not_listed(gemma: Trained) -> None:
    source = open_source(str(gemma.folder))
    lora = model_card(config(str(gemma.folder)), RECORD, RESULT | {"method": "lora"}, source)
    assert "blocksize" not in lora
    assert "lora_r: 16" in lora
    full = model_card(config(str(gemma.folder)), RECORD, RESULT | {"method": "full"}, source)
    assert "lora_r" not in full
    assert front_of(full)["library_name"] == "transformers"
    assert "PeftModel" not in full


def test_a_run_without_held_out_rows_has_no_numbers(gemma: Trained) -> None:
    card = model_card(config(str(gemma.folder)), {}, {"method": "lora"}, open_source(str(gemma.folder)))
    assert "## Numbers" not in card
    assert "## Versions" not in card


def test_the_licence_is_the_bases(gemma: Trained, tmp_path: Path) -> None:
    for path in gemma.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    source = open_source(str(tmp_path))
    assert licence_of(source) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n")
    assert licence_of(source) == "apache-2.0"
    assert front_of(model_card(config(str(tmp_path)), RECORD, RESULT, source))["license"] == "apache-2.0"
    for damaged in ("---\nlicense: [\n---\n", "no front matter", "---\n- a list\n---\n"):
        (tmp_path / "README.md").write_text(damaged)
        assert licence_of(source) is None


def test_hub_models_are_linked(gemma: Trained) -> None:
    source = open_source(str(gemma.folder))
    source.kind, source.revision = "hub", "abc123"
    card = model_card(config("google/gemma-3-270m"), RECORD, RESULT, source)
    assert front_of(card)["base_model"] == "google/gemma-3-270m"
    assert front_of(card)["base_model_relation"] == "adapter"
    assert 'from_pretrained("google/gemma-3-270m", revision="abc123")' in card


@pytest.mark.real_model
def test_a_quantized_source_is_said(gemma_gguf: Path) -> None:
    source = open_source(str(gemma_gguf))
    card = model_card(config(str(gemma_gguf)), RECORD, RESULT, source)
    assert "The base came from a GGUF file in Q4_K, Q5_0, Q6_K, Q8_0: it was already quantized once." in card
    assert front_of(card)["license"] == "gemma"
    assert f'gguf_file="{gemma_gguf.name}"' in card
    assert already_quantized(source) is not None
