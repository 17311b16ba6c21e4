"""Two claims about memory that no comparison of runs decides (docs/claims.md, 10 and 38), tried in fresh processes.

    python benchmarks/claims_memory.py -m gemma-3-270m --larger qwen2.5-coder-1.5b -o docs/study/memory

10, paged optimizers prevent out-of-memory crashes: full fine-tuning of -m, a few updates by hand, under a limit on the
process's memory (RLIMIT_DATA, which counts what cannot be paged out to a file) between what AdamW and paged AdamW were
seen to need; and once more with rows so long that activations are what is short.

38, one layer's 16-bit weights in memory at a time: the peak of a forward and backward pass of --larger in NF4 beside
that of the same model in 16 bits, with halfbyte and with transformers and bitsandbytes, over the bytes of one decoder
layer in 16 bits. What the passes keep for the backward pass is the same in both, so what is left is decoded weights and
whatever comes with decoding them.

Writes memory-claims.json, which `halfbyte compare --claims` reads beside the reports. Folders with safetensors are
needed, for transformers reads no GGUF file in 4 bits. Linux.
"""

import argparse
import gc
import json
import math
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from halfbyte.adapters import LoraOptions, attach
from halfbyte.batch import Batch
from halfbyte.compare.cells import machine_of
from halfbyte.compare.compare import versions
from halfbyte.errors import HalfbyteError
from halfbyte.heap import give_back
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.optim import OptimOptions
from halfbyte.optim.adamw import AdamW
from halfbyte.plan.hardware import detect
from halfbyte.quant import QuantOptions
from halfbyte.train.budget import is_shortage
from halfbyte.train.memory import process_memory

FILE = "memory-claims.json"
UPDATES = 3
ROUNDS = 3


def random_batch(length: int, vocabulary: int) -> Batch:
    """One row of random tokens, all supervised."""
    row = torch.randint(10, min(30000, vocabulary), (length + 1,), generator=torch.Generator().manual_seed(0))
    return Batch(row[:-1], torch.arange(length), row[1:], (length,))


def data_bytes() -> int:
    """Writable private memory of this process, used or not (VmData)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))


# ---------------------------------------------------------------- in a process of its own


def full(model: str, optim: str, length: int, limit: int | None) -> dict[str, Any]:
    """A few updates of all weights: the largest VmData seen, or why it ended."""
    loaded = load_model(ModelOptions(model=model), None, torch.bfloat16)
    net: Any = loaded.model
    assert loaded.spec is not None
    net.checkpointing = True
    named = net.unfreeze()
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    highest, losses = data_bytes(), []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            options = OptimOptions(optim=optim, optim_memory=64_000_000, learning_rate=2e-5)  # type: ignore[arg-type]
            optimizer = AdamW(named, options, folder=Path(scratch))
            batch = random_batch(length, loaded.spec.vocab_size)
            for _ in range(UPDATES):
                optimizer.zero_grad()
                nll, count = net.loss(batch)
                (nll / count).backward()
                highest = max(highest, data_bytes())
                optimizer.step(2e-5)
                highest = max(highest, data_bytes())
                losses.append(float(nll.detach()) / count)
        except (MemoryError, RuntimeError, OSError, HalfbyteError) as error:
            if not is_shortage(error):
                raise
            return {"finished": False, "updates": len(losses), "message": f"{type(error).__name__}: {error}"[:120]}
    return {"finished": True, "updates": len(losses), "data_bytes": highest, "loss": losses[-1]}


def passes(model: str, by: str, quantized: bool, length: int) -> dict[str, Any]:
    """What a forward and backward pass took at its peak beyond what the loaded model takes."""
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    batch = random_batch(length, vocabulary)
    if by == "halfbyte":
        loaded = load_model(ModelOptions(model=model), QuantOptions() if quantized else None, torch.bfloat16)
        ours: Any = loaded.model
        attach(ours, LoraOptions(lora_r=8), 0)

        def once(tokens: Batch) -> None:
            nll, count = ours.loss(tokens)
            (nll / count).backward()
    else:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ) if quantized else None  # fmt: skip
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=how)
        theirs = get_peft_model(theirs, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        theirs.train()

        def once(tokens: Batch) -> None:
            ids = tokens.input_ids[None]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                theirs(input_ids=ids, labels=ids).loss.backward()

    once(random_batch(2, vocabulary))  # gradients and libraries' workspaces are there from here on
    gc.collect()
    give_back()  # else what the heap kept of loading would be taken again, and be no growth
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (man proc_pid_clear_refs)
    before, _ = process_memory()
    once(batch)
    return {"bytes": process_memory()[1] - before}


# ---------------------------------------------------------------- the programs


def apart(name: str, **values: Any) -> dict[str, Any]:
    """A function of this file in a fresh process."""
    words = [sys.executable, __file__, "--apart", json.dumps({"name": name, **values})]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode < 0 and values.get("limit") is not None:  # libraries that do not look at what malloc returns
        return {"finished": False, "message": f"the process died of signal {-done.returncode}"}
    done.check_returncode()
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{name} {values}: {found}", file=sys.stderr)
    return found  # type: ignore[no-any-return]


def paged(model: str) -> dict[str, Any]:
    """Claim 10."""
    short = {
        optim: apart("full", model=model, optim=optim, length=64, limit=None) for optim in ("adamw", "paged_adamw")
    }
    between = (short["adamw"]["data_bytes"] + short["paged_adamw"]["data_bytes"]) // 2
    state = {optim: apart("full", model=model, optim=optim, length=64, limit=between) for optim in short}
    long = {optim: apart("full", model=model, optim=optim, length=32768, limit=between) for optim in short}
    return {"model": Path(model).name, "needed": short, "limit": between, "state_is_short": state, "activations": long}


def layers(model: str) -> dict[str, Any]:
    """Claim 38."""
    sizes = []
    for file in Path(model).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys() if ".layers.0." in name]  # noqa: SIM118
            sizes += [math.prod(shape) for shape in shapes if len(shape) == 2]
    found: dict[str, Any] = {"model": Path(model).name, "layer_bytes": 2 * sum(sizes)}
    found["largest_linear_bytes"] = 2 * max(sizes)
    for by in ("halfbyte", "transformers and bitsandbytes"):
        more = []
        for _ in range(ROUNDS):
            four, sixteen = (
                apart("passes", model=model, by=by, quantized=q, length=64)["bytes"] for q in (True, False)
            )
            more.append(four - sixteen)
        found[by] = more
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="a small model's folder, for full fine-tuning")
    parser.add_argument("--larger", help="a larger model's folder")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--apart", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.apart is not None:
        name = arguments.apart.pop("name")
        print(json.dumps({"full": full, "passes": passes}[name](**arguments.apart)))
        return
    if None in (arguments.model, arguments.larger, arguments.output):
        parser.error("-m, --larger and -o are needed")
    said = {
        "schema_version": 1, "machine": machine_of(detect()),
        "versions": versions() | {name: version(name) for name in ("peft", "bitsandbytes")},
        "paged": paged(arguments.model), "layers": layers(arguments.larger),
    }  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / FILE).write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
