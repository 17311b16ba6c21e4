"""Tiny random models in Hugging Face folders, with a tokenizer, and trained-looking adapters on them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, PreTrainedModel

from halfbyte.adapters import LoraOptions, attach, save_adapter
from halfbyte.data import DataOptions, prepare
from halfbyte.export.score import HeldOut, choose_rows
from halfbyte.linear import segments
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.quant import QuantOptions
from tests.evaluate.conftest import VOCAB, byte_tokenizer
from tests.models import families

LORA = LoraOptions(lora_r=4, lora_alpha=12, target_modules="all-linear")


@dataclass(frozen=True)
class Trained:
    """A base model's folder, transformers' own model of it, and an adapter's folder."""

    folder: Path
    reference: PreTrainedModel
    adapter: Path

    @property
    def options(self) -> ModelOptions:
        return ModelOptions(model=str(self.folder))


def save_base(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Write the family's tiny random model with a byte-level tokenizer; weights are of `dtype`."""
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None
        )
    else:
        config = families.config(name)
        config.vocab_size = VOCAB
    model = families.make_model(config, dtype=dtype)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def make_adapter(
    base: Path, folder: Path, quant: QuantOptions | None = None, options: LoraOptions = LORA, size: float = 0.05
) -> Path:
    """An adapter whose B is not zero, saved as PEFT's files."""
    loaded = load_model(ModelOptions(model=str(base)), quant, torch.float32, "cpu")
    attach(loaded.model, options, seed=1)
    generator = torch.Generator().manual_seed(2)
    for segment in segments(loaded.model).values():
        if segment.adapter is not None:
            shape = segment.adapter.lora_B.shape
            segment.adapter.lora_B.data = torch.randn(shape, generator=generator) * size
    save_adapter(loaded.model, folder, options, str(base))
    return folder


def make_trained(name: str, folder: Path, quant: QuantOptions | None = None) -> Trained:
    reference = save_base(name, folder / "base")
    return Trained(folder / "base", reference, make_adapter(folder / "base", folder / "adapter", quant))


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained("gemma3-small", tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained("llama3-gqa", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> HeldOut:
    """Held-out rows to score on."""
    folder = tmp_path_factory.mktemp("rows")
    values = [{"prompt": f"say {i}:", "completion": f" {i % 7} and {i % 5}"} for i in range(8)]
    for name in ("train", "eval"):
        (folder / name).with_suffix(".jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    files = {"data": str(folder / "train.jsonl"), "eval_data": str(folder / "eval.jsonl")}
    return choose_rows(prepare(DataOptions(**files), byte_tokenizer(), seed=0).eval, 8, seed=0)
