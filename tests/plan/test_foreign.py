"""Memory and time of other architectures: what the fallback holds byte by byte, and a whole process's peak."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from halfbyte.adapters import LoraOptions, attach
from halfbyte.errors import UsageError
from halfbyte.models.fallback import Fallback
from halfbyte.models.foreign_spec import ForeignSpec
from halfbyte.models.seq2seq import Seq2Seq
from halfbyte.models.source import open_source
from halfbyte.plan import foreign
from halfbyte.plan.calibration import GPU
from halfbyte.plan.catalog import find_machine, find_model
from halfbyte.plan.memory import Job
from halfbyte.quant import QuantOptions
from tests.models import test_fallback, test_seq2seq

MODELS = {"gpt2": test_fallback.ARCHITECTURES["gpt2"], "bloom": test_fallback.ARCHITECTURES["bloom"]}
MODELS |= {"flan-t5": test_seq2seq.ARCHITECTURES["flan-t5"], "bart": test_seq2seq.ARCHITECTURES["bart"]}


def job(method: str = "qlora", dtype: str = "float32", **changes: Any) -> Job:
    values: dict[str, Any] = {"quant": QuantOptions(), "lora": LoraOptions(lora_r=4), "micro_tokens": 96, "longest": 32}
    return Job(method, dtype, **(values | changes))


def built(name: str, folder: Path, asked: Job) -> tuple[ForeignSpec, Any]:
    if name in test_seq2seq.ARCHITECTURES:
        test_seq2seq.write_pair(name, folder)
    else:
        test_fallback.write_model(*MODELS[name], folder)
    source = open_source(str(folder))
    quant = asked.quant if asked.method == "qlora" else None
    kind = Seq2Seq if source.config.get("is_encoder_decoder") else Fallback
    made = kind.build(source, quant, getattr(torch, asked.dtype), "cpu", 0)
    return ForeignSpec.from_config(source.config), made


@pytest.mark.parametrize(
    "asked",
    [
        job("lora"),
        job("lora", "bfloat16"),
        job(),
        job(quant=QuantOptions(double_quant=False)),
        job(dtype="bfloat16", quant=QuantOptions(quant_type="int8", blocksize=32)),
    ],
    ids=["lora", "lora-bf16", "nf4", "nf4-single", "int8-bf16"],
)
@pytest.mark.parametrize("name", list(MODELS))
def test_base_and_adapter_bytes_are_exact(name: str, asked: Job, tmp_path: Path) -> None:
    spec, made = built(name, tmp_path, asked)
    tensors = {id(t): t for t in (*made.parameters(), *segment_buffers(made))}
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    assert sum(foreign.base_bytes(spec, asked)) == held
    report = attach(made, asked.lora)
    parts = foreign.phases(spec, asked)["train"]
    assert parts["adapters"] == parts["gradients"] == 4 * report.trainable_parameters
    assert parts["optimizer"] == 8 * report.trainable_parameters
    assert parts["base weights"] + parts["quantization constants"] == held


def segment_buffers(model: Any) -> list[torch.Tensor]:
    """Buffers of the weights; those that transformers computes are as large as a position or two."""
    from halfbyte.linear import segments

    return [buffer for segment in segments(model).values() for buffer in segment.weight.buffers()]


def test_phases_and_components_are_those_of_every_plan() -> None:
    spec = ForeignSpec.from_config(find_model("gpt2"))
    made = foreign.phases(spec, job())
    assert list(made) == ["load", "train", "evaluate", "save"]
    assert {"runtime", "base weights", "quantization constants", "adapters"} <= set(made["load"])
    assert {"gradients", "optimizer", "activations", "loss", "workspace"} <= set(made["train"])
    assert all(type(n) is int and n >= 0 for parts in made.values() for n in parts.values())


def test_more_of_anything_takes_more() -> None:
    spec = ForeignSpec.from_config(find_model("gpt2"))

    def train(**changes: Any) -> int:
        rows = changes.pop("rows", None)
        parts = foreign.phases(spec, job(**({"micro_tokens": 128, "longest": 128} | changes)), rows)["train"]
        return sum(n for name, n in parts.items() if name != "runtime")

    assert train() < train(micro_tokens=256) < train(micro_tokens=512)
    assert train(micro_tokens=512, checkpointing=True) < train(micro_tokens=512)
    assert train(method="lora") > train()
    assert train(rows=4) == train(micro_tokens=512)
    assert train(supervised=0.1) < train()
    assert train(dtype="bfloat16") < train()


def test_an_encoder_decoders_sides() -> None:
    spec = ForeignSpec.from_config(transformers.T5Config(**test_seq2seq.T5).to_dict())
    asked = job(micro_tokens=200, longest=100)
    assert foreign.micro_batch(spec, asked) == (2, 100, 100)
    assert foreign.micro_batch(spec, asked, source_share=0.75) == (2, 75, 25)
    assert foreign.micro_batch(spec, asked, rows=3, source_share=1.0) == (3, 100, 1)
    known, unknown = (
        sum(foreign.activation_bytes(spec, asked, foreign.micro_batch(spec, asked, None, s))) for s in (0.75, None)
    )
    assert known < unknown


def test_experts_are_estimated_from_above() -> None:
    """Mixtral's router asks for values, so nothing can be run without them."""
    small = transformers.MixtralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
    ).to_dict()  # fmt: skip
    spec, asked = ForeignSpec.from_config(small), job()
    batch = foreign.micro_batch(spec, asked)
    assert foreign.traced_batch(spec, asked, batch) is None
    assert sum(foreign.activation_bytes(spec, asked, batch)) > foreign.estimated_bytes(spec, asked, batch) > 0
    assert foreign.training_flops(spec, asked) > 0


@pytest.mark.parametrize("name", list(MODELS))
def test_the_estimate_from_above_is_above(name: str) -> None:
    kind, arguments = MODELS[name]
    spec, asked = ForeignSpec.from_config(getattr(transformers, kind)(**arguments).to_dict()), job()
    batch = foreign.micro_batch(spec, asked)
    traced = foreign.traced_batch(spec, asked, batch)
    loss = foreign.activation_bytes(spec, asked, batch)[1]
    assert foreign.estimated_bytes(spec, asked, batch) + loss > traced.peak


def test_time_grows_with_tokens_and_shrinks_with_the_machine() -> None:
    spec = ForeignSpec.from_config(find_model("gpt2"))
    asked = job(dtype="bfloat16", longest=256, micro_tokens=1024, train_tokens=10**6, micro_batches=1000, steps=100)
    slow, fast = (foreign.seconds(spec, asked, find_machine(n).rates()) for n in ("rtx-3060", "h100"))
    assert list(slow) == ["load", "train", "evaluate", "save"]
    assert fast["train"] < slow["train"]
    assert slow["evaluate"] == 0
    # Forward and backward of the linears and the head, and attention on top.
    least = 4.0 * (spec.linear_parameters + spec.head_parameters) * 10**6
    assert least < foreign.training_flops(spec, asked) < 1.5 * least


def test_full_fine_tuning_is_refused_and_the_interval_is_wider() -> None:
    spec = ForeignSpec.from_config(find_model("gpt2"))
    with pytest.raises(UsageError, match="method full is built for the decoder's families only"):
        foreign.phases(spec, job("full"))
    assert foreign.CALIBRATION.memory_spread > GPU.memory_spread
    assert foreign.CALIBRATION.runs == 0


# -- a process of its own ---------------------------------------------------------------------------------------------

LARGER: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": 8000, "n_embd": 512, "n_layer": 6, "n_head": 8, "n_positions": 512, "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "t5": (
        "T5Config",
        {
            "vocab_size": 8000, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 3, "num_heads": 8,
            "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
CHILD = """
import json, sys, torch
from tests.plan.test_foreign import train_steps
print(json.dumps(train_steps(sys.argv[1], sys.argv[2] == "True")))
"""
ROWS, SOURCE, ANSWER = 4, 384, 128


def train_steps(folder: str, checkpointing: bool) -> dict[str, int]:
    """Two steps of QLoRA in this process; its resident set before, and its peak after."""
    from halfbyte.batch import IGNORE, Batch
    from halfbyte.heap import give_back
    from halfbyte.optim import OptimOptions
    from halfbyte.optim.adamw import AdamW

    source = open_source(folder)
    pair = bool(source.config.get("is_encoder_decoder"))
    made = (Seq2Seq if pair else Fallback).build(source, QuantOptions(), torch.float32, "cpu", 0)
    if isinstance(made, Seq2Seq):
        made.begin_with(source.config)
    attach(made, LoraOptions(lora_r=8))
    made.train()
    made.checkpointing = checkpointing
    give_back()
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    optimizer = AdamW(trained, OptimOptions())
    length = SOURCE + ANSWER
    ids = torch.randint(3, 8000, (ROWS * length,))
    targets = torch.full_like(ids, IGNORE).view(ROWS, length)
    targets[:, SOURCE - 1 : -1] = ids.view(ROWS, length)[:, SOURCE:]
    if not pair:
        targets[:, :-1] = ids.view(ROWS, length)[:, 1:]
    positions = torch.arange(length).repeat(ROWS)
    batch = Batch(ids, positions, targets.flatten(), (length,) * ROWS, sources=(SOURCE,) * ROWS if pair else ())
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on: loading has one of its own
    before = status("VmRSS")
    for _ in range(2):
        give_back()  # as the loop does between updates
        loss, count = made.loss(batch)
        loss.backward()
        optimizer.step(1e-4, 1 / count)
    return {"before": before, "peak": status("VmHWM")}


def status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("name", "checkpointing"), [("gpt2", True), ("t5", False), ("t5", True)])
def test_a_fresh_process_peaks_where_the_plan_says(name: str, checkpointing: bool, tmp_path: Path) -> None:
    """What training adds to the loaded process, measured as the operating system counts it."""
    kind, arguments = LARGER[name]
    config = getattr(transformers, kind)(**arguments)
    auto = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path), str(checkpointing)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    measured = json.loads(done.stdout.splitlines()[-1])
    spec = ForeignSpec.from_config(open_source(str(tmp_path)).config)
    asked = job(
        lora=LoraOptions(lora_r=8), longest=SOURCE + ANSWER, micro_tokens=ROWS * (SOURCE + ANSWER),
        checkpointing=checkpointing,
    )  # fmt: skip
    parts = foreign.phases(spec, asked, source_share=SOURCE / (SOURCE + ANSWER))["train"]
    added = sum(parts[k] for k in ("gradients", "optimizer", "activations", "loss", "workspace"))
    actual = measured["peak"] - measured["before"]
    assert 0.5 * added < actual <= foreign.CALIBRATION.memory(added).p95
