"""Tiny trained models, and what is served of them: Hugging Face folders and GGUF files with real tokenizers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from halfbyte.adapters import LoraOptions, load_adapter
from halfbyte.data import ChatTemplate, Encoder, resolve_template
from halfbyte.evaluate.generate import end_ids
from halfbyte.export.merge import read_deltas
from halfbyte.export.parity import HeldOutRow, Question
from halfbyte.export.servers import TrainedModel
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.quant import QuantOptions
from tests.export.conftest import make_adapter
from tests.models import families
from tests.models.gguf_files import write_gguf

SPECIALS = ("<eos>", "<bos>", "<|im_start|>", "<|im_end|>")
VOCAB = 256 + len(SPECIALS)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS, BOS = 256, 257


@pytest.fixture
def one_thread() -> Iterator[None]:
    """llama.cpp's threads wait by spinning: two of them, on a machine that does anything else, take seconds a token."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer(adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, then SPECIALS; `adds_bos` puts BOS in front of a text."""
    inner = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(ALPHABET)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIALS))
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>", additional_special_tokens=list(SPECIALS[2:])
    )


def vocabulary(template: str | None, adds_bos: bool = True) -> Callable[[gguf.GGUFWriter, int], None]:
    """The same tokenizer in a GGUF file."""

    def write(writer: gguf.GGUFWriter, size: int) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([*ALPHABET, *SPECIALS])
        writer.add_token_types([1] * 256 + [3] * len(SPECIALS))
        writer.add_token_merges(["ł Ń"])  # llama.cpp wants one; its token does not exist, so nothing is merged
        writer.add_bos_token_id(BOS)
        writer.add_eos_token_id(EOS)
        writer.add_add_bos_token(adds_bos)
        if template is not None:
            writer.add_chat_template(template)

    return write


@dataclass(frozen=True)
class Tuned:
    """A base's folder, an adapter for it, and the template that it was trained with."""

    base: Path
    adapter: Path
    template: ChatTemplate
    tokenizer: PreTrainedTokenizerFast

    def model(self, quant: QuantOptions | None = None, dtype: torch.dtype = torch.float32) -> TrainedModel:
        loaded = load_model(ModelOptions(model=str(self.base)), quant, dtype, "cpu")
        load_adapter(loaded.model, self.adapter)
        return TrainedModel(loaded.model.eval(), loaded.tokenizer, self.template)

    def merged(self, scale: float = 1.0) -> Any:
        """transformers' model with the adapter merged in, in float32; `scale` other than 1 merges it wrongly."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        with torch.no_grad():
            for name, delta in read_deltas(self.adapter).items():
                weight = model.get_submodule(name).weight
                weight += scale * delta.rows(0, len(weight))
        return model

    def gguf(self, path: Path, scale: float = 1.0, kind: str = "F32", template: str | None = "") -> Path:
        """The merged model as a GGUF file; `template` other than the trained one breaks it, None leaves it out."""
        text = self.template.source if template == "" else template
        write_gguf(self.merged(scale), path, gguf.GGMLQuantizationType[kind], vocabulary(text))
        return path

    @property
    def question(self) -> Question:
        ends = end_ids(Encoder(self.tokenizer), self.template)
        return Question(stop_ids=ends, max_new_tokens=12)

    def rows(self, count: int = 6) -> list[HeldOutRow]:
        """Conversations as they would be trained on."""
        return [self.row(i) for i in range(count)]

    def row(self, index: int) -> HeldOutRow:
        messages = [{"role": "user", "content": f"Say {index}, please."}]
        if index % 3 == 2:
            messages = [{"role": "system", "content": "Be brief."}, *messages]
        answer = f"It is {index * 7}."
        prompt = self.template.render(messages, prompt=True)
        whole = self.template.render([*messages, {"role": "assistant", "content": answer}]).rstrip("\n")
        ids = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole[len(prompt) :])]
        supervised = [False] * len(ids[0]) + [True] * len(ids[1])
        return HeldOutRow(f"rows.jsonl:{index + 1}", messages, None, [*ids[0], *ids[1]], supervised, answer)


def make_tuned(folder: Path, family: str = "llama3-gqa", template: str = "chatml", size: float = 0.05) -> Tuned:
    config = families.config(family)
    config.vocab_size = VOCAB
    config.bos_token_id, config.eos_token_id = BOS, EOS
    made = tokenizer()
    families.make_model(config).to(torch.float32).save_pretrained(folder / "base")
    made.save_pretrained(folder / "base")
    options = LoraOptions(lora_r=4, lora_alpha=12, target_modules="all-linear")
    adapter = make_adapter(folder / "base", folder / "adapter", options=options, size=size)
    return Tuned(folder / "base", adapter, resolve_template(template, Encoder(made)), made)
