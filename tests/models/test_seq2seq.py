"""Encoder-decoders against transformers and PEFT: logits, loss, gradients, cached steps, greedy answers, files."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.generation.configuration_utils import GenerationConfig

from halfbyte.adapters import LoraOptions, adapter_state, attach, load_adapter, load_adapter_state, save_adapter
from halfbyte.batch import IGNORE, Batch
from halfbyte.errors import UsageError
from halfbyte.evaluate.generate import generate_batch
from halfbyte.evaluate.labels import score_labels
from halfbyte.evaluate.sampling import GenerateOptions
from halfbyte.linear import segments
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.seq2seq import Seq2Seq
from halfbyte.quant import BlockWeight, QuantOptions
from tests.evaluate.conftest import byte_tokenizer
from tests.models.families import error
from tests.models.test_classifier import randomized

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's call

VOCAB = 258
T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 48, "d_kv": 12, "d_ff": 72, "num_layers": 2, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 256, "decoder_start_token_id": 0, "dropout_rate": 0.2, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 48, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 72, "decoder_ffn_dim": 72, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 256, "decoder_start_token_id": 256,
    "forced_eos_token_id": None, "dropout": 0.2,
}  # fmt: skip
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5Config", T5),
    "flan-t5": ("T5Config", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5Config", {**T5, "num_decoder_layers": 3}),
    "umt5": ("UMT5Config", T5),
    "bart": ("BartConfig", BART),
    "marian": ("MarianConfig", {**BART, "scale_embedding": True, "decoder_start_token_id": 0}),
    "pegasus": ("PegasusConfig", {**BART, "activation_function": "relu"}),
}
LANGUAGES = ("PLBartConfig", {**BART, "scale_embedding": True})  # begins an answer with its last token
SOURCES, ANSWERS = (11, 3, 20), (6, 9, 1)


def write_pair(name: str, folder: Path) -> Any:
    """A tiny random encoder-decoder of transformers, saved with a tokenizer that ends every text as T5's does."""
    kind, arguments = LANGUAGES if name == "plbart" else ARCHITECTURES[name]
    model = transformers.AutoModelForSeq2SeqLM.from_config(
        getattr(transformers, kind)(**arguments), dtype=torch.float32, attn_implementation="eager"
    )
    positions = {
        name: p.clone()
        for name, p in model.named_parameters()
        if hasattr(model.get_submodule(name.rpartition(".")[0]), "create_weight")
    }
    randomized(model)
    for name, value in positions.items():  # computed, and not in the files
        model.get_parameter(name).data = value
    for path, parameter in model.named_parameters():
        if path.endswith("Attention.q.weight"):  # T5 does not scale its scores: they would be all or nothing
            parameter.data *= 0.15
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(3))
    model.save_pretrained(folder)
    t5_tokenizer().save_pretrained(folder)
    return model.eval()


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and `<eos>` behind every text."""
    from tokenizers.processors import TemplateProcessing

    made = byte_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 256)])
    made.pad_token = "<|im_end|>"
    return made


def load_ours(folder: Path, quant: QuantOptions | None = None) -> Seq2Seq:
    made = load_model(ModelOptions(model=str(folder), device="cpu"), quant, torch.float32).model
    assert isinstance(made, Seq2Seq)
    return made


def make_batch(unsupervised: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = tuple(s + a for s, a in zip(SOURCES, ANSWERS, strict=True))
    ids = torch.randint(3, 250, (sum(lengths),), generator=generator)
    targets, start = torch.full_like(ids, IGNORE), 0
    for source, length in zip(SOURCES, lengths, strict=True):
        targets[start + source - 1 : start + length - 1] = ids[start + source : start + length]
        start += length
    if unsupervised:
        targets[[12, 25]] = IGNORE
    positions = torch.cat([torch.arange(n) for n in lengths])
    return Batch(ids, positions, targets, lengths, sources=SOURCES)


def theirs_on(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(logits of all answers' tokens [P, V], summed loss) by transformers' own shift, one document at a time."""
    logits, loss = [], torch.zeros(())
    for ids, source in zip(batch.input_ids.split(batch.lengths), batch.sources, strict=True):
        answer = ids[source:]
        out = model(input_ids=ids[None, :source], labels=answer[None], use_cache=False)
        logits.append(out.logits[0])
        loss = loss + out.loss * answer.numel()
    return torch.cat(logits), loss


@pytest.fixture(params=list(ARCHITECTURES))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Seq2Seq]:
    model = write_pair(request.param, tmp_path)
    return model, load_ours(tmp_path)


def test_logits_and_loss(pair: tuple[Any, Seq2Seq]) -> None:
    model, ours = pair
    batch = make_batch()
    with torch.no_grad():
        logits, expected = theirs_on(model, batch)
        mine, targets = ours._supervised(batch)
        assert error(mine, logits) < 1e-5
        loss, count = ours.loss(batch)
    assert count == sum(ANSWERS) == targets.numel()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    chosen = torch.cat([d[s:] for d, s in zip(batch.input_ids.split(batch.lengths), SOURCES, strict=True)])
    logprobs = logits.log_softmax(-1)[range(count), chosen]
    assert torch.allclose(ours.token_logprobs(batch), logprobs, atol=2e-5)
    partly = ours.token_logprobs(make_batch(unsupervised=True))
    keep = [i for i in range(count) if i not in (2, 12)]  # the third token, and one of the second answer
    assert torch.allclose(partly, logprobs[keep], atol=2e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_gradients_equal_pefts(pair: tuple[Any, Seq2Seq], checkpointing: bool) -> None:
    model, ours = pair
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    )
    report = attach(ours, LoraOptions(lora_r=3, lora_alpha=5))
    adapted = {name for name, _ in theirs.named_modules() if name.endswith(".lora_A")}
    assert {f"base_model.model.{name}.lora_A" for name in report.names} == adapted  # PEFT's all-linear
    generator = torch.Generator().manual_seed(1)
    state = {name: 0.1 * torch.randn(t.shape, generator=generator) for name, t in adapter_state(ours).items()}
    load_adapter_state(ours, state)
    peft.set_peft_model_state_dict(theirs, state)
    _, expected = theirs_on(theirs.eval(), make_batch())
    expected.backward()
    ours.train()  # where dropout of the base would show
    ours.checkpointing = checkpointing
    loss, _ = ours.loss(make_batch())
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    found = segments(ours)
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad and p.grad is not None}
    assert len(gradients) == 2 * len(found)
    for name, gradient in gradients.items():
        path, factor = name.removeprefix("base_model.model.").removesuffix(".default.weight").rsplit(".", 1)
        mine = getattr(found[path].adapter, factor).grad
        assert error(mine, gradient) < 5e-5, name


def test_adapters_both_ways(pair: tuple[Any, Seq2Seq], tmp_path: Path) -> None:
    model, ours = pair
    options = LoraOptions(lora_r=3, lora_alpha=5)
    attach(ours, options)
    generator = torch.Generator().manual_seed(1)
    load_adapter_state(
        ours, {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in adapter_state(ours).items()}
    )
    save_adapter(ours, tmp_path / "ours", options, str(tmp_path))
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    assert type(theirs).__name__ == "PeftModelForSeq2SeqLM"
    with torch.no_grad():
        expected, _ = theirs_on(theirs, make_batch())
        assert error(ours._supervised(make_batch())[0], expected) < 5e-5
        theirs.save_pretrained(tmp_path / "theirs")
        again = load_ours(tmp_path)
        assert error(again._supervised(make_batch())[0], expected) > 0.1
        load_adapter(again, tmp_path / "theirs")
        assert error(again.eval()._supervised(make_batch())[0], expected) < 5e-5


def test_greedy_answers_are_transformers(pair: tuple[Any, Seq2Seq]) -> None:
    model, ours = pair
    prompts = [d[:s].tolist() for d, s in zip(make_batch().input_ids.split(make_batch().lengths), SOURCES, strict=True)]
    said = generate_batch(ours, t5_tokenizer(), prompts, GenerateOptions(max_new_tokens=7), {256}, 2)
    for prompt, one in zip(prompts, said, strict=True):
        plain = GenerationConfig(
            max_new_tokens=7, do_sample=False, num_beams=1, eos_token_id=256, pad_token_id=0,
            decoder_start_token_id=model.config.decoder_start_token_id, use_cache=False,
        )  # fmt: skip
        theirs = model.generate(input_ids=torch.tensor([prompt]), generation_config=plain)[0, 1:].tolist()
        assert list(one.tokens) == [token for token in theirs if token != 256]


def test_cached_steps(pair: tuple[Any, Seq2Seq]) -> None:
    """A source, then its answer in pieces, forgotten and said again: each time the logits of the whole."""
    model, ours = pair
    ids = make_batch().input_ids
    source, answer = ids[:11], ids[11:17]
    with torch.no_grad():
        whole = model(input_ids=source[None], labels=answer[None]).logits[0]
    cache = ours.new_cache(40, batch=2)
    first = ours.logits(torch.cat([source, ids[20:25]]), (11, 5), cache=cache, last_only=True)
    assert error(first[0], whole[0]) < 2e-5
    assert cache.lengths == [11, 5]
    assert error(ours.logits(answer[:3], (3, 0), cache=cache), whole[1:4]) < 2e-5
    assert error(ours.logits(answer[3:4], (1, 0), cache=cache, last_only=True)[0], whole[4]) < 2e-5
    cache.keep([0])
    cache.truncate([12])
    assert cache.lengths == [12]
    assert error(ours.logits(answer[1:5], cache=cache), whole[2:]) < 2e-5
    with pytest.raises(ValueError, match="cannot truncate"):
        cache.truncate([5])
    with pytest.raises(ValueError, match="do not fit"):
        ours.logits(ids, cache=cache)
    with pytest.raises(ValueError, match="no logits of its own"):
        ours.logits(source, cache=ours.new_cache(40))


def test_likelihoods_of_labels(pair: tuple[Any, Seq2Seq]) -> None:
    """Answers that begin alike, one the beginning of another: as transformers scores each alone."""
    model, ours = pair
    prompts = [[5, 6, 7, 8], [9, 10]]
    labels = [(30, 31, 256), (30, 31, 32, 256), (30, 40, 256)]
    found = torch.from_numpy(score_labels(ours, prompts, labels))
    for row, prompt in enumerate(prompts):
        sums = []
        for label in labels:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([label])).logits[0]
            sums.append(float(logits.log_softmax(-1)[range(len(label)), label].sum()))
        assert found[row].tolist() == pytest.approx(sums, rel=1e-4)


@pytest.mark.parametrize("name", ["flan-t5", "bart"])
def test_quantized_base(name: str, tmp_path: Path) -> None:
    model = write_pair(name, tmp_path)
    ours = load_ours(tmp_path, QuantOptions(quant_type="nf4"))
    for path, segment in segments(ours).items():
        assert isinstance(segment.weight, BlockWeight)
        model.get_submodule(path).weight.data = segment.weight.dequantize(torch.float32)
    assert ours.coverage.share > 0.9
    with torch.no_grad():
        assert error(ours._supervised(make_batch())[0], theirs_on(model, make_batch())[0]) < 1e-5


def test_named_tensors_are_the_files(pair: tuple[Any, Seq2Seq]) -> None:
    model, ours = pair
    theirs = dict(model.named_parameters())
    found = dict(ours.named_tensors())
    assert set(found) == set(theirs)
    for name, read in found.items():
        assert torch.equal(read(), theirs[name]), name


def test_no_start_token(tmp_path: Path) -> None:
    write_pair("t5", tmp_path)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / name).read_text())
        values.pop("decoder_start_token_id", None)
        (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(UsageError, match="nothing says what this model's decoder begins with"):
        load_ours(tmp_path)


def test_answers_that_begin_with_a_language_are_refused(tmp_path: Path) -> None:
    write_pair("plbart", tmp_path)
    with pytest.raises(UsageError, match="begins an answer with another token than its decoder_start_token_id"):
        load_ours(tmp_path)


def test_more_tokens_than_bart_has_positions(tmp_path: Path) -> None:
    write_pair("bart", tmp_path)
    ours = load_ours(tmp_path)
    with pytest.raises(UsageError, match="reads and writes at most 64 tokens, and here are 65"):
        ours.encode(torch.arange(65))
    long = Batch(torch.arange(80), torch.arange(80), torch.arange(80), (80,), sources=(10,))
    with pytest.raises(UsageError, match="and here are 70"):
        ours.loss(long)
    with pytest.raises(ValueError, match="not of this task"):
        ours.loss(Batch(long.input_ids, long.position_ids, long.targets, (80,)))


def test_nothing_supervised(tmp_path: Path) -> None:
    write_pair("t5", tmp_path)
    ours = load_ours(tmp_path)
    attach(ours, LoraOptions(lora_r=2))
    batch = make_batch()
    empty = Batch(
        batch.input_ids, batch.position_ids, torch.full_like(batch.targets, IGNORE), batch.lengths, sources=SOURCES
    )
    loss, count = ours.loss(empty)
    assert (float(loss.detach()), count) == (0.0, 0)
    nn.functional.relu(loss).backward()
