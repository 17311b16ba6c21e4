"""A classifier's adapter in PEFT and in halfbyte: the same files, the same logits, whoever wrote them."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from halfbyte.adapters import LoraOptions, attach, load_adapter, save_adapter
from halfbyte.adapters.heads import LABELS as LABELS_FILE
from halfbyte.adapters.heads import read_labels
from halfbyte.adapters.peft_io import CONFIG, WEIGHTS
from halfbyte.errors import UsageError
from halfbyte.models.classifier import Classifier, HeadOptions
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from tests.evaluate.conftest import byte_tokenizer
from tests.models import families
from tests.models.families import error
from tests.models.test_classifier import HEAD, LABELS, batch_with_classes, load_ours, theirs_on, write_classifier

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call

OPTIONS = LoraOptions(lora_r=3, lora_alpha=5)


def their_model(folder: Path) -> Any:
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def trained(folder: Path) -> Classifier:
    """Ours with an adapter and a head that differ from what a loader would make up."""
    ours = load_ours(folder)
    attach(ours, OPTIONS)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
            assert "lora" in name or name == "score.weight"
    return ours


@pytest.mark.parametrize("family", ["llama3-gqa", "gemma3-small", "gpt2"])
def test_peft_loads_ours(family: str, tmp_path: Path) -> None:
    write_classifier(family, tmp_path / "base")
    ours = trained(tmp_path / "base")
    save_adapter(ours, tmp_path / "adapter", OPTIONS, str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(their_model(tmp_path / "base"), tmp_path / "adapter")
    assert type(theirs).__name__ == "PeftModelForSequenceClassification"
    batch = batch_with_classes()
    with torch.no_grad():
        expected = theirs_on(theirs, batch)
        assert error(ours.class_logits(batch), expected) < 5e-5
        plain = theirs_on(their_model(tmp_path / "base"), batch)
    assert error(plain, expected) > 0.1  # the adapter and the head change something
    assert read_labels(tmp_path / "adapter") == LABELS


@pytest.mark.parametrize("family", ["llama3-gqa", "gpt2"])
def test_we_load_pefts(family: str, tmp_path: Path) -> None:
    model = write_classifier(family, tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", task_type="SEQ_CLS", fan_in_fan_out=family == "gpt2"
    )
    theirs = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_ours(tmp_path / "base")
    load_adapter(ours, tmp_path / "adapter")
    batch = batch_with_classes()
    with torch.no_grad():
        assert error(ours.eval().class_logits(batch), theirs_on(theirs, batch)) < 5e-5
    assert read_labels(tmp_path / "adapter") is None
    # Written again, the names and the switches are PEFT's own.
    save_adapter(ours, tmp_path / "again", OPTIONS, str(tmp_path / "base"))
    their_file, our_file = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "again"))
    assert set(their_file) == set(our_file)
    assert all(torch.equal(their_file[name].float(), our_file[name]) for name in their_file)
    one, two = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("adapter", "again"))
    assert one["task_type"] == two["task_type"] == "SEQ_CLS"
    assert sorted(one["modules_to_save"]) == two["modules_to_save"]


def test_the_head_keeps_its_type(tmp_path: Path) -> None:
    """`adapter_dtype` is of the factors: a module that is trained whole is saved as it is trained."""
    write_classifier("llama3-gqa", tmp_path / "base")
    ours = trained(tmp_path / "base")
    save_adapter(ours, tmp_path, OPTIONS.model_copy(update={"adapter_dtype": "bfloat16"}), "base")
    held = load_file(tmp_path / WEIGHTS)
    head = held.pop("base_model.model.score.weight")
    assert torch.equal(head, ours.score.weight.detach())
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}


def test_files_of_another_task_are_refused(tmp_path: Path) -> None:
    write_classifier("llama3-gqa", tmp_path / "base")
    save_adapter(trained(tmp_path / "base"), tmp_path / "adapter", OPTIONS, str(tmp_path / "base"))
    made = families.config("llama3-gqa")
    families.make_model(made).save_pretrained(tmp_path / "words")
    byte_tokenizer().save_pretrained(tmp_path / "words")
    words = load_model(ModelOptions(model=str(tmp_path / "words"), device="cpu"), None, torch.float32).model
    with pytest.raises(UsageError, match="the adapter has a classifier's head and the model has none"):
        load_adapter(words, tmp_path / "adapter")
    attach(words, OPTIONS)
    save_adapter(words, tmp_path / "plain", OPTIONS, str(tmp_path / "words"))
    with pytest.raises(UsageError, match="the model has a classifier's head and the adapter has none"):
        load_adapter(load_ours(tmp_path / "base"), tmp_path / "plain")
    two = load_model(
        ModelOptions(model=str(tmp_path / "words"), device="cpu"), None, torch.float32, head=HeadOptions(("a", "b"))
    )
    with pytest.raises(UsageError, match=r"its head is \[3, 60\] and the model's \[2, 60\]"):
        load_adapter(two.model, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no head", "without base_model.model.score.weight"),
        ("vector", "is no matrix"),
        ("causal", "its task_type is 'CAUSAL_LM', not SEQ_CLS"),
        ("more modules", "has .embed_tokens. in modules_to_save, and"),
    ],
)
def test_damaged_adapters_are_refused(change: str, message: str, tmp_path: Path) -> None:
    write_classifier("llama3-gqa", tmp_path / "base")
    save_adapter(trained(tmp_path / "base"), tmp_path / "adapter", OPTIONS, str(tmp_path / "base"))
    tensors, key = load_file(tmp_path / "adapter" / WEIGHTS), "base_model.model.score.weight"
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    if change == "no head":
        del tensors[key]
    elif change == "vector":
        tensors[key] = torch.zeros(60)
    elif change == "causal":
        config |= {"task_type": "CAUSAL_LM", "modules_to_save": None}
    else:
        config["modules_to_save"] = ["score", "embed_tokens"]
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UsageError, match=message):
        load_adapter(load_ours(tmp_path / "base", head=HEAD), tmp_path / "adapter")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id2label": {"1": "a"}}', '{"id2label": {"0": "a", "1": "a"}}',
                                  '{"id2label": {"0": 3}}', '{"id2label": {}}'])  # fmt: skip
def test_damaged_labels_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / LABELS_FILE).write_text(text)
    with pytest.raises(UsageError, match="is damaged"):
        read_labels(tmp_path)
