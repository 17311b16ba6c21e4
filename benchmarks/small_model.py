"""A small language model trained from scratch in bfloat16, for studies that need weights that were never quantized.

    python benchmarks/small_model.py DIR --text FILE.jsonl|FILE.json ... [--epochs 3] [--tokens-a-row 256]

A byte-level BPE of 4,096 words and a Llama of 4.2M parameters, both made from the text of the given files, every weight
trained by halfbyte itself (`method: full`). DIR/model is the finished model, DIR/base the random one it began as.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import halfbyte as hb

VOCAB, EOS = 4096, "<eos>"


def texts_of(files: Sequence[Path]) -> Iterator[str]:
    """Every string of some length in the files' rows, whatever the column."""
    for file in files:
        content = file.read_text(encoding="utf-8")
        rows = json.loads(content) if file.suffix == ".json" else content.splitlines()
        for row in rows:
            if isinstance(row, str) and not row.startswith("{"):
                yield row
                continue
            values = (json.loads(row) if isinstance(row, str) else row).values()
            text = "\n".join(str(value) for value in values if isinstance(value, str) and value.strip())
            if text:
                yield text


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS)


def make_base(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, texts: Sequence[str], tokenizer: Any, length: int) -> None:
    """The texts one after the other, shuffled, in rows of `length` tokens."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [token for i in order for token in (*tokenizer(texts[i])["input_ids"], tokenizer.eos_token_id)]
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, len(ids), length):
            file.write(json.dumps({"text": tokenizer.decode(ids[start : start + length])}) + "\n")


def train_small(folder: Path, files: Sequence[Path], epochs: float, length: int, rate: float = 2e-3) -> Path:
    """The finished model's folder; made once."""
    done = folder / "model"
    if (done / "result.json").is_file():
        return done
    texts = list(texts_of(files))
    tokenizer = make_tokenizer(texts)
    make_base(folder / "base", tokenizer)
    write_rows(folder / "rows.jsonl", texts, tokenizer, length)
    hb.train(
        model=str(folder / "base"),
        data=str(folder / "rows.jsonl"),
        output_dir=done,
        overwrite=True,
        method="full",
        dtype="bfloat16",
        num_train_epochs=epochs,
        learning_rate=rate,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        max_seq_length=2 * length,
        eval_split=0.02,
        eval_max_rows=100,
        lr_scheduler_type="cosine",
    )
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--tokens-a-row", type=int, default=256)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    print(train_small(args.folder, args.text, args.epochs, args.tokens_a_row))


if __name__ == "__main__":
    main()
