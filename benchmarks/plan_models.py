"""Models of random weights for `benchmarks/plan_accuracy.py`: shapes from 60M to 3B, written once, one layer at a time.

Every one has the same byte-level tokenizer of 32,000 words, trained on invented words, so that nothing is downloaded.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halfbyte.models.spec import ModelSpec
from halfbyte.tensorfile import Planned, write_file

VOCAB, EOS = 32_000, "<eos>"
REAL = {
    "gemma": "gemma-3-270m",
    "qwen": "qwen2.5-coder-1.5b",
    "gemma-gguf": "gemma-3-270m.gguf",
    "qwen-gguf": "qwen2.5-coder-1.5b.gguf",
}
"""The two real models below --models: in 16 bits, and in the blocks of their files."""

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu"}


def _shape(
    family: dict[str, Any], layers: int, width: int, mlp: int, heads: int, kv: int, **more: Any
) -> dict[str, Any]:
    return {
        **family,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-50m": _shape(_LLAMA, 8, 512, 1408, 8, 4, tie_word_embeddings=False),
    "qwen2-130m": _shape({**_LLAMA, "model_type": "qwen2"}, 12, 768, 2816, 12, 4),
    "phi3-350m": _shape({**_LLAMA, "model_type": "phi3", "pad_token_id": 0}, 24, 1024, 3072, 16, 8),
    "qwen3-600m": _shape({**_LLAMA, "model_type": "qwen3", "head_dim": 128}, 28, 1024, 3072, 16, 8),
    "llama-1b": _shape(_LLAMA, 22, 2048, 5632, 32, 4, tie_word_embeddings=False),
    "llama-3b": _shape(_LLAMA, 28, 3072, 8192, 24, 8),
}


def words(count: int, seed: int) -> str:
    """Invented text: words of two or three syllables, some far more common than others."""
    source = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "ir")]
    made = []
    for _ in range(count):
        common = min(source.random(), source.random())
        made.append("".join(syllables[int(common * len(syllables)) - i] for i in range(2 + source.randrange(2))))
    return " ".join(made)


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator((words(200, seed) for seed in range(500)), trainer)
    # Words of its own up to the size that every model has: a vocabulary's size is what memory depends on.
    inner.add_tokens([f"<word{i}>" for i in range(VOCAB - inner.get_vocab_size())])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make(name: str, folder: Path) -> Path:
    """The folder of one model of `SHAPES`; written on first use, in its bfloat16."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    config = SHAPES[name]
    architectures = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}
    config = config | {"architectures": [architectures[config["model_type"]] + "ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    torch.manual_seed(0)

    def planned(tensor: str, shape: tuple[int, ...]) -> Planned:
        def rows() -> Any:
            ones = tensor.endswith("norm.weight")
            for start in range(0, shape[0], 4096):
                size = (min(4096, shape[0] - start), *shape[1:])
                yield torch.ones(size, dtype=torch.bfloat16) if ones else (0.02 * torch.randn(size)).to(torch.bfloat16)

        return Planned(tensor, shape, torch.bfloat16, rows)

    write_file(folder / "model.safetensors", [planned(*found) for found in ModelSpec.from_config(config).tensors()])
    return folder


def find(name: str, real: Path, made: Path) -> Path:
    """The folder of a real model below `real`, or of one that is made below `made`."""
    if name in REAL:
        return real / REAL[name]
    return make(name, made / name)
