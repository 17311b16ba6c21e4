"""A tiny real model, tiny real data and a plan: what the training tests run, also in other processes."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.adapters.lora import LoraOptions, attach
from halfbyte.data.examples import Example
from halfbyte.data.packing import collate
from halfbyte.data.records import Origin
from halfbyte.data.sampler import Sampler
from halfbyte.models.decoder import Decoder
from halfbyte.models.spec import ModelSpec
from halfbyte.optim import OptimOptions
from halfbyte.quant import DenseWeight, QuantOptions, Weight, quantize
from halfbyte.train import TrainOptions
from halfbyte.train.evaluation import evaluation_loss
from halfbyte.train.events import Listener
from halfbyte.train.feed import Feed
from halfbyte.train.loop import train
from halfbyte.train.run_directory import RunDirectory
from halfbyte.train.state import CPU, TrainPlan, TrainResult

VOCABULARY = 64
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def decoder(dropout: float = 0.0, quantized: bool = False, layers: int = 2) -> Decoder:
    """Random weights, LoRA on every linear; B is not zero, so that every gradient is alive."""
    torch.set_num_threads(1)
    spec = ModelSpec.from_config(CONFIG | {"num_hidden_layers": layers})
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) / 8 for name, shape in spec.tensors()}

    def weight(name: str, quantizable: bool) -> Weight:
        return quantize(values[name], QuantOptions()) if quantized and quantizable else DenseWeight(values[name])

    def tensor(name: str) -> Tensor:
        return values[name] + 1 if "norm" in name else values[name]

    model = Decoder.build(spec, weight, tensor)
    attach(model, LoraOptions(lora_r=4, lora_dropout=dropout), seed=1)
    for name, parameter in trainable(model).items():
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def examples(count: int = 40, seed: int = 5, file: str = "rows.jsonl") -> list[Example]:
    """Rows in which each token follows from the one before; the first third is not supervised."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(count):
        length = int(rng.integers(5, 20))
        ids = (rng.integers(1, VOCABULARY) + 3 * np.arange(length)) % VOCABULARY
        supervised = np.arange(length) >= max(1, length // 3)
        made.append(Example(ids.astype(np.int32), supervised, Origin(file, index + 1), index=index))
    return made


def make_plan(model: Any, steps: int = 20, rows: int = 40, optim: str = "adamw", **options: Any) -> TrainPlan:
    """A plan with 8 rows an update in micro-batches of 4, and held-out rows that follow the same rule."""
    chosen = TrainOptions(**{"save_minutes": None, "seed": 3} | options)
    feed = Feed(examples(rows), Sampler(rows, seed=3), rows_per_update=8, micro_batch=4)
    held_out = [collate(examples(12, seed=99))]
    return TrainPlan(
        options=chosen,
        optim=OptimOptions(learning_rate=2e-2, optim=optim),  # type: ignore[arg-type]
        total_steps=steps,
        steps_per_epoch=feed.steps_per_epoch,
        batches_for_update=feed.batches_for_update,
        trainable=trainable(model),
        evaluate=lambda stop: evaluation_loss(model, held_out, CPU, stop),
        locate=feed.locate,
        identity={"base": "tiny", "data": "rule"},
        total_tokens=feed.tokens(steps),
    )


def run(
    path: Path, steps: int = 20, resume: bool = False, listeners: tuple[Listener, ...] = (), **options: Any
) -> TrainResult:
    """Train a new tiny decoder in `path`, or go on with it."""
    options = dict(options)
    threads = options.pop("threads", 1)
    model = decoder(dropout=options.pop("dropout", 0.1), quantized=options.pop("quantized", False))
    torch.set_num_threads(threads)
    model.checkpointing = options.pop("checkpointing", False)
    plan = make_plan(model, steps, **options)
    with RunDirectory.resume(path) if resume else RunDirectory.create(path) as directory:
        return train(model, plan, directory, listeners)


def kill_at_step(step: int) -> Listener:
    """A listener that kills its own process, as the kernel would, after the event of a step."""

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return listen


def run_and_die(path: Path, die_after: int, resume: bool, options: dict[str, Any]) -> None:
    """For another process: train, and be killed after a step."""
    run(path, resume=resume, listeners=(kill_at_step(die_after),), **options)


def run_or_resume(path: Path, options: dict[str, Any]) -> None:
    """For another process that may be killed at any moment: begin or go on."""
    from halfbyte.train.run_directory import is_run

    run(path, resume=path.is_dir() and is_run(path), **options)


def run_and_die_at_call(path: Path, function: str, count: int, options: dict[str, Any]) -> None:
    """For another process: be killed just before the `count`-th call of os.fsync or the like."""
    import halfbyte.files as files  # noqa: F401  every module reaches these through `os` or pathlib, which calls `os`

    original: Callable[..., Any] = getattr(os, function)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(os, function, dying)
    run_or_resume(path, options)


def with_batches(plan: TrainPlan, **changes: Any) -> TrainPlan:
    return replace(plan, **changes)
