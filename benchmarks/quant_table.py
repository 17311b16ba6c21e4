"""The QLoRA paper's table of formats, on small models: perplexity, bits a parameter, error. Markdown and JSON.

    python benchmarks/quant_table.py OUT MODEL --text FILE.txt [--name NAME] [--note TEXT] [--articles 3] [--windows 16]
                                     [--length 512] [--dtype float32] [--threads 2] [--wait-while FILE]
    python benchmarks/quant_table.py OUT               the table of what OUT holds

Formats (`quant_formats.py`) at blocks of 32 to 4096, against the model's own 16 bits. All linears of the body are
quantized, as QLoRA does; embedding, head and norms stay as they are.

- Text: FILE has an article a line. Every `--articles`-th is read, so that a model can be trained on the others; each is
  cut into windows of `--length` tokens (one of them the begin-of-text token where the tokenizer has one), and
  `--windows` of them are drawn, always in the same order. Within a window every token but the first is predicted.
- Perplexity is compared with 16 bits over the same windows: 95 % intervals from a bootstrap over windows, paired.
- Bits a parameter are read from files: every cell's quantized tensors are written in bitsandbytes' layout and removed.
- The error on normal random weights needs no model.

A cell is a file in OUT/NAME. Killed and called again, the script goes on behind the last one; called with more windows,
it evaluates those that are missing. `--wait-while FILE` holds it between two cells for as long as that file is there.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from quant_formats import (
    BLOCKSIZES,
    FORMATS,
    count,
    norm_ratio,
    normal_error,
    quantize_as,
    relative_error,
    stored,
    write,
)
from quant_report import markdown
from torch import Tensor

from halfbyte.batch import IGNORE, Batch
from halfbyte.files import sha256_file, write_atomic
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import held_dtype, resolve_dtype
from halfbyte.models.model_source import ModelSource
from halfbyte.models.source import open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import DenseWeight, Weight

TOKENS_AT_ONCE = 4096
BASE = "16bit"


@dataclass(frozen=True)
class Cell:
    format: str
    blocksize: int | None = None

    @property
    def name(self) -> str:
        return self.format if self.blocksize is None else f"{self.format}-{self.blocksize}"


# The block size that everybody uses first, so that a table half done says most.
ORDER = (64, *(size for size in BLOCKSIZES if size != 64))
CELLS = [Cell(BASE), *(Cell(name, size) for size in ORDER for name in FORMATS)]


def windows(text: Path, tokenizer: Any, articles: int, length: int) -> Tensor:
    """int64 [all windows, length] of the text, in an order that never changes."""
    lines = text.read_text(encoding="utf-8").splitlines()[articles - 1 :: articles]
    begin = tokenizer.bos_token_id
    head = [begin] if begin is not None and tokenizer("a")["input_ids"][0] == begin else []
    body = length - len(head)
    found = []
    for line in lines:
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        found += [head + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found)[order]


@torch.no_grad()
def window_nll(decoder: Decoder, ids: Tensor) -> list[float]:
    """The summed negative log-likelihood of each window of `ids` [N, L], L - 1 tokens each."""
    found: list[float] = []
    for part in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1])):
        count, length = part.shape
        targets = torch.cat([part[:, 1:], part.new_full((count, 1), IGNORE)], dim=1).flatten()
        positions = torch.arange(length).repeat(count)
        batch = Batch(part.flatten(), positions, targets, (length,) * count)
        found += (-decoder.token_logprobs(batch)).view(count, -1).double().sum(dim=1).tolist()
    return found


class Model:
    """A model that is built again for every cell. What is never quantized is read once."""

    def __init__(self, path: str, dtype: str, folder: Path) -> None:
        self.source: ModelSource = open_source(path)
        self.spec = ModelSpec.from_config(self.source.config)
        self.dtype = resolve_dtype(dtype, torch.device("cpu"))
        self.folder = folder
        self.linears = [f"{linear.name}.weight" for linear in self.spec.linears()]
        self.parameters = self.spec.linear_parameters
        self._kept: dict[str, Tensor] = {}

    def _read(self, name: str) -> Tensor:
        if name not in self._kept:
            self._kept[name] = self.source.read(name)
        return self._kept[name]

    def _dense(self, tensor: Tensor) -> DenseWeight:
        return DenseWeight(tensor.to(held_dtype(tensor.dtype, self.dtype, torch.device("cpu"))))

    def build(self, quantized: Callable[[Tensor], Weight]) -> Decoder:
        """The decoder, its linears as `quantized` makes them."""

        def weight(name: str, quantizable: bool) -> Weight:
            return quantized(self.source.read(name)) if quantizable else self._dense(self._read(name))

        return Decoder.build(self.spec, weight, self._read, self.dtype).eval()

    def rest_bytes(self) -> int:
        """The size of a file with everything that no cell quantizes, in the type of the model's file."""
        path = self.folder / "rest.safetensors"
        left = {name: self.source.read(name) for name, _ in self.spec.tensors() if name not in set(self.linears)}
        size = write(path, left)
        path.unlink()
        return size


def make_cell(model: Model, cell: Cell) -> tuple[Decoder, dict[str, Any]]:
    """The model in a format, and what there is to say of its weights."""
    if cell.blocksize is None:
        return model.build(model._dense), {"bits": {"values": 16.0, "tensors": 16.0, "file": 16.0}}
    chosen, size = FORMATS[cell.format], cell.blocksize
    made: list[tuple[float, float]] = []

    def quantized(tensor: Tensor) -> Weight:
        weight = quantize_as(tensor, chosen, size)
        made.append(relative_error(weight, tensor))
        return weight

    decoder = model.build(quantized)
    path = model.folder / f"{cell.name}.safetensors"
    tensors: dict[str, Tensor] = {}
    for module in decoder.modules():
        if getattr(module, "weight", None) is not None and f"{getattr(module, 'name', '')}.weight" in model.linears:
            tensors |= stored(module.weight, f"{module.name}.weight")
    write(path, tensors)
    bits = count(path, model.linears, model.parameters)
    path.unlink()
    return decoder, {"bits": asdict(bits), "relative_error": norm_ratio(made)}


def run_cell(model: Model, cell: Cell, ids: Tensor, settings: dict[str, Any]) -> None:
    """Evaluate what is missing of a cell, and write its file."""
    path = model.folder / f"{cell.name}.json"
    held: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"settings": settings, "nll": []}
    if held["settings"] != settings:
        raise SystemExit(f"{path} was made with other settings, {held['settings']}: take another OUT or --name")
    if len(held["nll"]) >= len(ids):
        return
    started = time.perf_counter()
    decoder, said = make_cell(model, cell)
    built = time.perf_counter()
    held["nll"] += window_nll(decoder, ids[len(held["nll"]) :])
    seconds = {"quantize": built - started, "evaluate": time.perf_counter() - built}
    held |= {"format": cell.format, "blocksize": cell.blocksize, "seconds": seconds, **said}
    write_atomic(path, json.dumps(held, indent=1) + "\n")
    ppl = math.exp(sum(held["nll"]) / (len(held["nll"]) * (ids.shape[1] - 1)))
    print(f"{cell.name}: perplexity {ppl:.3f}, {seconds['quantize']:.0f} + {seconds['evaluate']:.0f} s", flush=True)


def run_model(args: argparse.Namespace) -> None:
    name = args.name or Path(args.model).name
    model = Model(args.model, args.dtype, args.out / name)
    model.folder.mkdir(parents=True, exist_ok=True)
    every = windows(args.text, model.source.tokenizer(), args.articles, args.length)
    ids = every[: args.windows]
    settings = {
        "model": model.source.fingerprint,
        "text": sha256_file(args.text),
        "articles": args.articles,
        "length": args.length,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    facts = {
        "name": name,
        "note": args.note,
        "windows": len(ids),
        "of_windows": len(every),
        "linears": len(model.linears),
        "linear_parameters": model.parameters,
        "parameters": model.spec.total_parameters,
        "rest_bytes": model.rest_bytes(),
        **settings,
    }
    write_atomic(model.folder / "model.json", json.dumps(facts, indent=1) + "\n")
    for cell in CELLS:
        while args.wait_while is not None and args.wait_while.exists():
            time.sleep(5)
        run_cell(model, cell, ids, settings)


def normal_errors(out: Path) -> None:
    """Mean |error| on normal random values, for every format and block size; made once."""
    path = out / "normal.json"
    held: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    for cell in CELLS[1:]:
        if cell.name not in held and cell.blocksize is not None:
            held[cell.name] = normal_error(FORMATS[cell.format], cell.blocksize)
            write_atomic(path, json.dumps(held, indent=1) + "\n")


def collect(out: Path) -> dict[str, Any]:
    """All that OUT holds, as plain data."""
    models = []
    for facts in sorted(out.glob("*/model.json")):
        cells = [json.loads(path.read_text()) for path in sorted(facts.parent.glob("*.json")) if path != facts]
        models.append({**json.loads(facts.read_text()), "cells": cells})
    normal = out / "normal.json"
    return {"normal": json.loads(normal.read_text()) if normal.is_file() else {}, "models": models}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--name", help="the model's name in the table (default: its folder's)")
    parser.add_argument("--note", default="", help="what a reader must know of the model's weights")
    parser.add_argument("--articles", type=int, default=3, help="read every n-th line of the text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512, help="tokens a window")
    parser.add_argument("--dtype", default="float32", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--wait-while", type=Path, help="wait between cells while this file exists")
    args = parser.parse_args(words)
    if args.model and not args.text:
        parser.error("--text is needed for a model")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model:
        run_model(args)
    normal_errors(args.out)
    found = collect(args.out)
    write_atomic(args.out / "table.json", json.dumps(found, indent=1) + "\n")
    write_atomic(args.out / "table.md", markdown(found))
    print(markdown(found))


if __name__ == "__main__":
    main()
