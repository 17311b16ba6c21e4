"""What `tests/kill.py` kills: everything of halfbyte that writes final files, on tiny models."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from halfbyte.adapters import LoraOptions, attach, save_adapter
from halfbyte.compare.render import write_report
from halfbyte.export.folder import new_folder
from halfbyte.export.gguf_adapter import write_gguf_adapter
from halfbyte.export.gguf_writer import write_gguf
from halfbyte.export.merge import MergeOptions, merge, plan_tensors, read_deltas
from halfbyte.files import new_file, new_files, write_atomic
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import open_source
from halfbyte.quant import QuantOptions
from halfbyte.run.outputs import write_weights
from halfbyte.tensorfile import Planned
from halfbyte.train import checkpoint
from halfbyte.train.dpo import REFERENCE, Reference, write_references
from halfbyte.train.events import drop_after
from tests.compare.invented import five, one_seed_base
from tests.export.conftest import make_adapter, save_base
from tests.kill import Case

BIG = 3 << 20
LORA = LoraOptions(lora_r=2, target_modules="all-linear")


def nothing(folder: Path) -> None:
    pass


@cache
def model() -> Path:
    """A tiny base and an adapter on it, made once, outside of the folders that are killed in."""
    import atexit
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="kill-model-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    save_base("llama3-gqa", folder / "base")
    make_adapter(folder / "base", folder / "adapter")
    return folder


@cache
def loaded(seed: int) -> Any:
    """The model with a fresh adapter."""
    made = load_model(ModelOptions(model=str(model() / "base")), None, torch.float32, "cpu")
    attach(made.model, LORA, seed=seed)
    return made


@cache
def unfrozen() -> Any:
    made = load_model(ModelOptions(model=str(model() / "base")), None, torch.float32, "cpu")
    made.model.unfreeze()  # type: ignore[operator]
    return made


def cases() -> Iterator[Case]:
    yield Case("file", nothing, lambda f: write_atomic(f / "deep" / "a.json", b"x" * BIG))
    yield Case("file-over", lambda f: _put(f / "a.json", "old"), lambda f: write_atomic(f / "a.json", "new" * 1000))
    yield Case("new-file", lambda f: _put(f / "a.bin", "old"), _piecewise)
    yield Case("new-files", lambda f: _put(f / "b.json", "old"), _several)
    yield Case("folder", nothing, _fill, units=("out",))
    yield Case("folder-over", lambda f: _put(f / "out" / "config.json", "{}"), _fill, units=("out",))
    yield Case("report", nothing, lambda f: write_report(one_seed_base(), f))
    yield Case("report-over", lambda f: write_report(five(), f), lambda f: write_report(one_seed_base(), f))
    yield Case("events", _events, lambda f: _drop(f / "events.jsonl"))
    yield Case("adapter", nothing, lambda f: _save_adapter(f, 1))
    yield Case("adapter-over", lambda f: _save_adapter(f, 1), lambda f: _save_adapter(f, 2))
    yield Case("checkpoint", nothing, lambda f: _save(f, 3), ("checkpoint-3",), _whole_checkpoint)
    yield Case("checkpoint-over", lambda f: _save(f, 3), lambda f: _save(f, 3), ("checkpoint-3",), _whole_checkpoint)
    yield Case("reference", lambda f: _reference(f, 1), lambda f: _reference(f, 2))
    yield Case("rotate", _three, lambda f: _rotate(f), ("checkpoint-1", "checkpoint-2", "checkpoint-3"))
    yield Case("weights", nothing, lambda f: write_weights(f, unfrozen(), "float32"))
    yield Case(
        "weights-over", lambda f: _put(f / "config.json", "{}"), lambda f: write_weights(f, unfrozen(), "float32")
    )
    yield Case("merge", nothing, lambda f: _merge(f / "out"), ("out",))
    yield Case("merge-over", lambda f: _merge(f / "out", "float32"), lambda f: _merge(f / "out"), ("out",))
    yield Case("gguf", nothing, lambda f: _gguf(f / "out.gguf"))
    yield Case("gguf-over", lambda f: _put(f / "out.gguf", "old"), lambda f: _gguf(f / "out.gguf"))
    yield Case("gguf-adapter", nothing, lambda f: _gguf_adapter(f / "out.gguf"))


def naive() -> Case:
    """What a writer does that thinks of nothing; the harness must find it out."""

    def write(folder: Path) -> None:
        (folder / "a.json").write_text("new" * 10_000)
        (folder / ".b.partial").write_text("new" * 10_000)
        (folder / ".b.partial").rename(folder / "b.json")

    return Case("naive", lambda folder: _put(folder / "a.json", "old"), write)


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _piecewise(folder: Path) -> None:
    with new_file(folder / "a.bin") as part, part.open("wb") as file:
        for i in range(3):
            file.write(bytes([i]) * (1 << 20))


def _several(folder: Path) -> None:
    with new_files(folder) as part:
        for name in ("a.json", "b.json", "c.json"):
            (part / name).write_text(name * 1000)


def _fill(folder: Path) -> None:
    with new_folder(folder / "out") as out:
        (out / "config.json").write_text('{"new": true}')
        (out / "weights").write_bytes(b"w" * BIG)
        (out / "sub").mkdir()
        (out / "sub" / "x").write_text("x")


def _events(folder: Path) -> None:
    lines = [json.dumps({"event": "step", "step": i}) for i in range(200)]
    _put(folder / "events.jsonl", "\n".join(lines) + '\n{"torn')


def _drop(path: Path) -> None:
    drop_after(path, 50)


def _reference(folder: Path, value: float) -> None:
    said = torch.full((50_000, 2), value, dtype=torch.float64)
    write_references(folder / REFERENCE, Reference(said, said + 1), {"base": "tiny"})


def _save_adapter(folder: Path, seed: int) -> None:
    save_adapter(loaded(seed).model, folder, LORA.model_copy(update={"lora_r": 2}), f"base-{seed}")


def _save(run: Path, step: int) -> None:
    tensors = {"a": torch.full((300_000,), float(step)), "b": torch.ones(3)}
    state = {"train": {}, "identity": {}}
    checkpoint.remove_leftovers(run)
    checkpoint.save(run, step, tensors, [Planned.of("m", tensors["a"] * 2)], state, lambda f: _save_adapter(f, step))


def _whole_checkpoint(folder: Path) -> str | None:
    """Not by its bytes: it has a time in it."""
    try:
        found = checkpoint.load(folder)
    except checkpoint.Damaged as error:
        return str(error)
    return None if torch.equal(found.trainable["a"], torch.full((300_000,), 3.0)) else "holds other values"


def _three(run: Path) -> None:
    for step in (1, 2, 3):
        _save(run, step)


def _rotate(run: Path) -> None:
    checkpoint.remove_leftovers(run)
    checkpoint.rotate(run, keep=1, best_step=None)


def _merge(out: Path, dtype: str = "bfloat16") -> None:
    options = MergeOptions(verify=False, shard_gb=1e-4, overwrite=True, merge_dtype=dtype)  # type: ignore[arg-type]
    merge(ModelOptions(model=str(model() / "base")), model() / "adapter", out, QuantOptions(), options)


def _gguf(path: Path) -> None:
    """A merged model as one GGUF file."""
    options = ModelOptions(model=str(model() / "base"))
    source = open_source(options.model)
    planned = plan_tensors(options, source, read_deltas(model() / "adapter"), None, torch.bfloat16)
    write_gguf(path, planned, source, "Q8_0", None)


def _gguf_adapter(path: Path) -> None:
    source = open_source(str(model() / "base"))
    write_gguf_adapter(path, read_deltas(model() / "adapter"), source, "tiny")
