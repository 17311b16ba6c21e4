"""What `tests/fuzz.py` feeds with damaged files: valid tiny ones, and the code that reads them.

A target's `stages` are tried one after the other; each may end in a HalfbyteError. A new target goes into `TARGETS`.
"""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

from halfbyte.adapters import LoraOptions, attach, detach, load_adapter, save_adapter
from halfbyte.adapters.heads import is_classifier, read_labels
from halfbyte.adapters.initial import Initial, Shift
from halfbyte.adapters.lora import put
from halfbyte.adapters.peft_io import lora_options, read_adapter_config, read_adapter_tensors
from halfbyte.errors import HalfbyteError
from halfbyte.export.card import already_quantized, licence_of
from halfbyte.export.merge import read_deltas
from halfbyte.linear import segments
from halfbyte.models.classifier import Classifier
from halfbyte.models.load import build_decoder
from halfbyte.models.source import ModelSource, open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.models.tokenizer import from_folder
from halfbyte.quant import QuantOptions
from tests.evaluate.conftest import byte_tokenizer
from tests.fuzz_mutate import Files
from tests.models import families
from tests.models.gguf_files import write_gguf
from tests.models.group_files import FORMS, write_group_folder

Stage = Callable[[], Any]
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@dataclass(frozen=True)
class Target:
    """`seeds` makes valid folders of files (name -> bytes); `stages` are what is done with a damaged one."""

    name: str
    seeds: Callable[[], list[Files]]
    stages: Callable[[Path], Iterable[Stage]]


def run(target: Target, folder: Path) -> list[HalfbyteError]:
    """Try every stage; the errors that were allowed. Whatever else is raised is a finding."""
    errors = []
    for stage in target.stages(folder):
        try:
            stage()
        except HalfbyteError as error:
            errors.append(error)
            if "\n" in str(error) or not str(error).isprintable() or len(str(error)) > 2000:
                raise AssertionError(f"not one printable line: {str(error)[:300]!r}") from error
    return errors


def _files(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _tiny(name: str) -> Any:
    """transformers' model of a family in one layer, as small as its RoPE allows; the same at each call."""
    kind, arguments = families.FAMILIES[name]
    layers = 6 if name.startswith("gemma3") else 1
    sizes = {} if name in ("phi3-longrope", "llama3-gqa") else SMALL  # their factors are made for their own head
    config = {**arguments, **sizes, "vocab_size": 48, "num_hidden_layers": layers}
    return families.make_model(getattr(transformers, kind)(**config))


def _made(make: Callable[[Path], Any]) -> Files:
    folder = Path(tempfile.mkdtemp())
    try:
        make(folder)
        return _files(folder)
    finally:
        shutil.rmtree(folder)


# -- GGUF -------------------------------------------------------------------------------------------------------------


def _gguf_seeds() -> list[Files]:
    kinds = gguf.GGMLQuantizationType
    seeds = []
    for name, kind in (
        ("llama3-head-dim", kinds.Q8_0),
        ("qwen2", kinds.Q4_0),
        ("qwen3", kinds.F16),
        ("gemma2", kinds.Q5_1),
        ("gemma1", kinds.BF16),
        ("gemma3-small", kinds.Q8_0),
        ("phi3-longrope", kinds.F32),
        ("llama3-gqa", kinds.F32),
    ):
        seeds.append(_made(lambda f, n=name, k=kind: write_gguf(_tiny(n), f / "model.gguf", k)))
    seeds.append(_made(lambda f: _byte_level_gguf(f / "model.gguf")))
    seeds.append(_made(lambda f: _blocks_gguf(f / "model.gguf")))
    return seeds


def _byte_level_gguf(path: Path) -> None:
    """Metadata and a byte-level vocabulary with merges, every special token, and a template."""
    writer = gguf.GGUFWriter(path, "qwen2")
    for add, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, 32), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 32), (writer.add_head_count, 2), (writer.add_head_count_kv, 1),
        (writer.add_layer_norm_rms_eps, 1e-6),
    ):  # fmt: skip
        add(value)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "he", "ll", "hell", "<|end|>", "<|user|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 4])
    writer.add_token_merges(["h e", "l l", "he ll"])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_pad_token_id(len(tokens) - 2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks_gguf(path: Path) -> None:
    """One tensor of each quantized type, of random bytes."""
    writer, chance = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    for add, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, 256), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 256), (writer.add_head_count, 4), (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_tokenizer_model, "llama"),
        (writer.add_token_list, ["<unk>", "a", "b"]), (writer.add_token_scores, [0.0, 1.0, 2.0]),
    ):  # fmt: skip
        add(value)
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    types = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_0", "IQ4_NL")
    for name, kind in zip(names, types, strict=True):
        chosen = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[chosen]
        raw = chance.integers(0, 256, (8, 256 // block * size), dtype=np.uint8)
        writer.add_tensor(f"blk.0.{name}.weight", raw, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_all(source: ModelSource) -> None:
    for name in source.tensors():
        source.read(name)


def _build(source: ModelSource, quant: QuantOptions | None) -> None:
    spec = ModelSpec.from_config(source.config)
    decoder = build_decoder(source, spec, quant, torch.float32, torch.device("cpu"))
    decoder.logits(torch.arange(min(5, spec.vocab_size)))


def _tokenize(tokenizer: Any) -> None:
    ids = tokenizer("hello <s> wörld 1 \n").input_ids
    tokenizer.decode(ids)


def _source_stages(place: str) -> Iterable[Stage]:
    """Open a model and do with it what training does."""
    opened: list[ModelSource] = []
    yield lambda: opened.append(open_source(place))
    if not opened:
        return
    (source,) = opened
    yield lambda: _read_all(source)
    yield lambda: source.fingerprint
    yield lambda: source.generation
    yield lambda: (licence_of(source), already_quantized(source))
    if source.kind == "gguf":
        yield lambda: _tokenize(source.tokenizer())
    if ModelSpec.serves(source.config):
        yield lambda: _build(source, None)
        yield lambda: _build(source, QuantOptions())


# -- folders ----------------------------------------------------------------------------------------------------------


def _folder_seeds() -> list[Files]:
    seeds = []
    for name in ("llama3-head-dim", "qwen2", "gemma2", "mistral-full", "llama-yarn", "gemma3-small", "phi3-longrope"):
        model = _tiny(name)
        for size in ("1GB", "6KB") if name == "qwen2" else ("1GB",):
            seeds.append(_made(lambda f, m=model, s=size: m.save_pretrained(f, max_shard_size=s)))
    wrapped = dict(seeds[0])
    config = json.loads(wrapped["config.json"])
    wrapped["config.json"] = json.dumps(
        {"model_type": "gemma3", "text_config": config | {"model_type": "llama"}}
    ).encode()
    return [*seeds, wrapped, _four_bit()]


def _four_bit() -> Files:
    """bitsandbytes' keys, double-quantized."""
    model = _tiny("llama3-head-dim")
    folder = Path(tempfile.mkdtemp())
    try:
        model.save_pretrained(folder)
        loaded = _decoder(folder, QuantOptions(double_quant=True))
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        for name, segment in segments(loaded).items():
            del tensors[f"{name}.weight"]
            tensors |= segment.weight.to_bnb(f"{name}.weight")  # type: ignore[operator]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True,
                                         "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        return _files(folder)
    finally:
        shutil.rmtree(folder)


def _group_seeds() -> list[Files]:
    """GPTQ, with and without act-order, in 4 and 8 bits, and AWQ."""
    seeds = []
    for form in ("gptq", "gptq-8-act-order", "gptq-no-g-idx", "awq"):
        seeds.append(_made(lambda f, name=form: write_group_folder(_tiny("llama3-head-dim"), f, FORMS[name])))
    return seeds


def _decoder(folder: Path, quant: QuantOptions | None) -> Any:
    source = open_source(str(folder))
    return build_decoder(source, ModelSpec.from_config(source.config), quant, torch.float32, torch.device("cpu"))


# -- adapters ---------------------------------------------------------------------------------------------------------


@cache
def _adapter_model() -> Any:
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp())
    try:
        _tiny("llama3-head-dim").save_pretrained(folder)
        return _decoder(folder, None)
    finally:
        shutil.rmtree(folder)


def _adapter_seeds() -> list[Files]:
    seeds = []
    for options in (
        LoraOptions(lora_r=2, target_modules="all-linear"),
        LoraOptions(lora_r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
        LoraOptions(lora_r=2, target_modules=["v_proj"], use_dora=True, modules_to_save=["lm_head", "model.norm"]),
        LoraOptions(lora_r=2, target_modules=["o_proj"], init_lora_weights="pissa"),
    ):
        model = _adapter_model()
        attach(model, options.model_copy(update={"init_lora_weights": "default"}), seed=0)
        for segment in segments(model).values():
            if options.shifts_base and segment.adapter is not None:
                a, b = torch.ones(2, segment.in_features), torch.ones(segment.out_features, 2)
                put(segment, Initial(a, b, Shift(a, b, 2.0)), 2.0)
        seeds.append(_made(lambda f, o=options, m=model: save_adapter(m, f, o, "owner/base")))
        _without_adapters(model)
    model, plain = _classifier(), LoraOptions(lora_r=2)
    attach(model, plain, seed=0)
    seeds.append(_made(lambda f: save_adapter(model, f, plain, "owner/base")))
    _without_adapters(model)
    return seeds


def _without_adapters(model: Any) -> None:
    detach(model)
    for segment in segments(model).values():
        segment.add_module("shift", None)


def _classifier() -> Classifier:
    body = _adapter_model()
    return Classifier(body, torch.ones(3, body.spec.hidden_size), ("bad", "fair", "good"))


def _adapter_stages(folder: Path) -> Iterable[Stage]:
    yield lambda: lora_options(read_adapter_config(folder))
    yield lambda: read_adapter_tensors(folder)
    yield lambda: [delta.rows(0, 1) for delta in read_deltas(folder).values()]
    yield lambda: read_labels(folder)
    yield lambda: _load_adapter(folder)


def _load_adapter(folder: Path) -> None:
    model = _classifier() if is_classifier(read_adapter_config(folder)) else _adapter_model()
    try:
        load_adapter(model, folder)
        model.logits(torch.arange(3))
    finally:
        _without_adapters(model)


# -- tokenizers, Ollama -----------------------------------------------------------------------------------------------


def _tokenizer_seeds() -> list[Files]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    inner = Tokenizer(
        models.BPE({"<unk>": 0, "▁": 1, "h": 2, "e": 3, "he": 4, "<0x0A>": 5}, [("h", "e")], byte_fallback=True,
                   unk_token="<unk>", fuse_unk=True)
    )  # fmt: skip
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    from transformers import PreTrainedTokenizerFast

    second = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")
    second.chat_template = "{{ messages[0].content }}"
    return [_made(lambda f, t=made: t.save_pretrained(f)) for made in (byte_tokenizer(), second)]


def _ollama_seeds() -> list[Files]:
    """A store: a manifest and its blobs, with a valid GGUF file."""
    import hashlib

    model = _gguf_seeds()[0]["model.gguf"]
    blobs = {"model": model, "template": b"{{ .Prompt }}", "params": b'{"stop": ["<s>"]}', "system": b"You."}
    layers, files = [], Files()
    for kind, data in blobs.items():
        digest = hashlib.sha256(data).hexdigest()
        layers.append(
            {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}
        )
        files[f"blobs/sha256-{digest}"] = data
    files["manifests/registry.ollama.ai/library/tiny/latest"] = json.dumps(
        {"schemaVersion": 2, "layers": layers}
    ).encode()
    return [files]


def _ollama_stages(folder: Path) -> Iterable[Stage]:
    os.environ["OLLAMA_MODELS"] = str(folder)
    return _source_stages("ollama:tiny")


TARGETS = [
    Target("gguf", _gguf_seeds, lambda folder: _source_stages(str(folder / "model.gguf"))),
    Target("folder", _folder_seeds, lambda folder: _source_stages(str(folder))),
    Target("group-folder", _group_seeds, lambda folder: _source_stages(str(folder))),
    Target("adapter", _adapter_seeds, _adapter_stages),
    Target("tokenizer", _tokenizer_seeds, lambda folder: [lambda: _tokenize(from_folder(folder))]),
]
if importlib.util.find_spec("halfbyte.models.ollama") is not None:
    TARGETS.append(Target("ollama", _ollama_seeds, _ollama_stages))
