"""Our classifiers against transformers' *ForSequenceClassification: logits, loss, gradients, on both kinds of body."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from halfbyte.adapters import LoraOptions, adapter_state, attach, load_adapter_state
from halfbyte.batch import IGNORE, Batch
from halfbyte.errors import UsageError
from halfbyte.linear import segments
from halfbyte.models.classifier import Classifier, HeadOptions, head_of_file
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from halfbyte.quant import BlockWeight, QuantOptions
from tests.evaluate.conftest import byte_tokenizer
from tests.models import families
from tests.models.families import error, make_batch
from tests.models.test_fallback import ARCHITECTURES

LABELS = ("bad", "fair", "good")
HEAD = HeadOptions(LABELS)
LENGTHS = (13, 1, 22)
CLASSES = (2, 0, 1)
DECODERS = ["llama3-gqa", "qwen2", "gemma3-small", "phi3"]
FALLBACKS = ["gpt2", "gpt-neox", "opt-350m", "falcon", "bloom", "starcoder2"]


def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values in every parameter, at a scale at which the model computes something."""
    generator = torch.Generator().manual_seed(seed)
    plus_one = "Gemma" in type(model).__name__
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                values *= 1.3 / parameter.shape[-1] ** 0.5
            elif name.endswith("bias"):
                values *= 0.2
            else:
                values = 0.3 * values + (0.0 if plus_one else 1.0)
            parameter.copy_(values)
    return model.eval()


def write_classifier(name: str, folder: Path) -> Any:
    """A tiny random classifier of transformers, saved to `folder` with a tokenizer."""
    if name in families.FAMILIES:
        made = families.config(name)
    else:
        kind, arguments = ARCHITECTURES[name]
        made = getattr(transformers, kind)(**arguments)
    made.id2label = dict(enumerate(LABELS))
    made.label2id = {label: index for index, label in enumerate(LABELS)}
    made.pad_token_id = 0
    model = transformers.AutoModelForSequenceClassification.from_config(
        made, dtype=torch.float32, attn_implementation="eager"
    )
    randomized(model)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def load_ours(folder: Path, quant: QuantOptions | None = None, head: HeadOptions = HEAD) -> Classifier:
    made = load_model(ModelOptions(model=str(folder), device="cpu"), quant, torch.float32, head=head).model
    assert isinstance(made, Classifier)
    return made.eval()


def batch_with_classes() -> Batch:
    batch = make_batch(LENGTHS)
    targets = torch.full_like(batch.targets, IGNORE)
    targets[torch.tensor(LENGTHS).cumsum(0) - 1] = torch.tensor(CLASSES)
    return Batch(batch.input_ids, batch.position_ids, targets, LENGTHS)


def theirs_on(model: Any, batch: Batch) -> Tensor:
    """transformers' logits, a padded batch at once."""
    documents = batch.input_ids.split(batch.lengths)
    ids = nn.utils.rnn.pad_sequence(list(documents), batch_first=True, padding_value=0)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(d) for d in documents], batch_first=True)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


@pytest.fixture(params=[*DECODERS, *FALLBACKS])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Classifier]:
    model = write_classifier(request.param, tmp_path)
    return model, load_ours(tmp_path)


def test_logits_loss_and_probabilities(pair: tuple[Any, Classifier]) -> None:
    model, ours = pair
    batch = batch_with_classes()
    with torch.no_grad():
        theirs = theirs_on(model, batch)
        assert error(ours.class_logits(batch), theirs) < 1e-5
        ends = torch.tensor(LENGTHS).cumsum(0) - 1
        assert error(ours.logits(batch.input_ids[:13])[-1:], theirs[:1]) < 1e-5
    loss, count = ours.loss(batch)
    expected = nn.functional.cross_entropy(theirs, torch.tensor(CLASSES), reduction="sum")
    assert count == 3
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert torch.allclose(ours.token_logprobs(batch), theirs.log_softmax(-1)[range(3), CLASSES], atol=1e-5)
    # Only the second document has a class: the others change nothing.
    targets = batch.targets.clone()
    targets[ends[[0, 2]]] = IGNORE
    alone, count = ours.loss(Batch(batch.input_ids, batch.position_ids, targets, LENGTHS))
    assert count == 1
    assert float(alone) == pytest.approx(-float(theirs.log_softmax(-1)[1, CLASSES[1]]), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_adapters_and_head_equal_pefts(pair: tuple[Any, Classifier], checkpointing: bool) -> None:
    model, ours = pair
    conv = bool(ours.transposed)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="SEQ_CLS", fan_in_fan_out=conv)
    theirs = peft.get_peft_model(model, config)
    report = attach(ours, LoraOptions(lora_r=3, lora_alpha=5))
    adapted = {name for name, _ in theirs.named_modules() if name.endswith(".lora_A")}
    assert {f"base_model.model.{name}.lora_A" for name in report.names} == adapted  # PEFT's all-linear
    assert report.trainable_parameters == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert report.total_parameters == model.base_model.num_parameters() + ours.score.weight.numel()  # PEFT's inside
    generator = torch.Generator().manual_seed(1)
    state = {name: 0.2 * torch.randn(t.shape, generator=generator) for name, t in adapter_state(ours).items()}
    assert "base_model.model.score.weight" in state
    load_adapter_state(ours, state)
    peft.set_peft_model_state_dict(theirs, state)
    batch = batch_with_classes()
    expected = nn.functional.cross_entropy(theirs_on(theirs, batch), torch.tensor(CLASSES), reduction="sum")
    expected.backward()
    ours.train()
    ours.checkpointing = checkpointing
    loss, _ = ours.loss(batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad and p.grad is not None}
    found = segments(ours)
    assert len(gradients) == 2 * len(found) + 1
    for name, gradient in gradients.items():
        path = name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")
        if path == "score.modules_to_save":
            mine = ours.score.weight.grad
        else:
            base, factor = path.rsplit(".", 1)
            mine = getattr(found[base].adapter, factor).grad
        assert mine is not None
        assert error(mine, gradient) < 5e-5, name


@pytest.mark.parametrize("family", ["llama3-gqa", "gemma3-small"])
def test_every_gradient_of_full_training(family: str, tmp_path: Path) -> None:
    model = write_classifier(family, tmp_path)
    ours = load_ours(tmp_path)
    trainable = ours.unfreeze()
    batch = batch_with_classes()
    nn.functional.cross_entropy(theirs_on(model, batch), torch.tensor(CLASSES), reduction="sum").backward()
    ours.train().loss(batch)[0].backward()
    theirs = {name: p.grad for name, p in model.named_parameters()}
    assert set(theirs) == set(trainable)
    for name, gradient in theirs.items():
        mine = trainable[name].grad
        assert mine is not None
        assert gradient is not None
        assert error(mine, gradient) < 5e-5, name


def test_full_training_of_another_architecture_is_refused(tmp_path: Path) -> None:
    write_classifier("gpt2", tmp_path)
    with pytest.raises(UsageError, match="decoder's families only"):
        load_ours(tmp_path).unfreeze()


@pytest.mark.parametrize("family", ["llama3-gqa", "gpt2"])
def test_a_quantized_body_under_a_float32_head(family: str, tmp_path: Path) -> None:
    model = write_classifier(family, tmp_path)
    ours = load_ours(tmp_path, QuantOptions(quant_type="nf4"))
    assert ours.score.weight.dtype == torch.float32
    for name, segment in segments(ours).items():
        assert isinstance(segment.weight, BlockWeight)
        dense = segment.weight.dequantize(torch.float32)
        model.get_submodule(name).weight.data = dense.t().contiguous() if name in ours.transposed else dense
    with torch.no_grad():
        assert error(ours.class_logits(batch_with_classes()), theirs_on(model, batch_with_classes())) < 1e-5


@pytest.mark.parametrize("family", ["llama3-gqa", "gpt-neox"])
def test_a_language_model_gets_a_new_head(family: str, tmp_path: Path) -> None:
    """The first values depend on the seed alone, are as large as transformers', and no output head is held."""
    if family in families.FAMILIES:
        families.make_model(families.config(family)).save_pretrained(tmp_path)
    else:
        kind, arguments = ARCHITECTURES[family]
        made = getattr(transformers, kind)(**arguments)
        transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    wide = HeadOptions(tuple(f"c{i}" for i in range(200)), seed=3)
    one, same, other = (load_ours(tmp_path, head=h) for h in (wide, wide, HeadOptions(wide.labels, seed=4)))
    assert torch.equal(one.score.weight, same.score.weight)
    assert not torch.equal(one.score.weight, other.score.weight)
    assert float(one.score.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    names = [name for name, _ in one.named_tensors()]
    assert names[-1] == "score.weight"
    assert not [name for name in names if "lm_head" in name or "embed_out" in name]
    assert head_of_file(open_source(str(tmp_path))) is None


def test_named_tensors_are_the_files(tmp_path: Path) -> None:
    model = write_classifier("gpt2", tmp_path)
    ours = dict(load_ours(tmp_path).named_tensors())
    theirs = dict(model.named_parameters())
    assert set(ours) == set(theirs)
    for name, read in ours.items():
        assert torch.equal(read(), theirs[name]), name
    assert head_of_file(open_source(str(tmp_path))) == LABELS


def test_a_head_of_other_classes_is_refused(tmp_path: Path) -> None:
    write_classifier("llama3-gqa", tmp_path)
    with pytest.raises(UsageError, match="tells 3 classes apart, and 2 are asked for"):
        load_ours(tmp_path, head=HeadOptions(("a", "b")))


def test_an_architecture_without_a_classifier_is_refused(tmp_path: Path) -> None:
    kind, arguments = ARCHITECTURES["granite"]
    made = getattr(transformers, kind)(**arguments)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="'granite' is not a model that can classify texts"):
        load_ours(tmp_path)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    made = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no linear head of the name 'score'"):
        load_ours(tmp_path)


@pytest.mark.parametrize(
    ("id2label", "message"),
    [
        ({"0": "a", "1": "b"}, "has 3 rows and id2label 2 names"),
        (["a", "b", "c"], "damaged"),
        ({"0": "a", "1": "a", "2": "b"}, "gives two classes one name"),
    ],
)
def test_damaged_names_of_classes(id2label: Any, message: str, tmp_path: Path) -> None:
    write_classifier("llama3-gqa", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": id2label}))
    with pytest.raises(UsageError, match=message):
        head_of_file(open_source(str(tmp_path)))
