"""GPTQ and AWQ folders, loaded and run by transformers with GPTQModel: the loader that a user has."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from halfbyte.export.awq import write_awq_folder
from halfbyte.export.gptq import GptqOptions, write_gptq_folder
from halfbyte.models.source import open_source
from halfbyte.quant.group_codes import GroupCodes
from tests.export import int4_models
from tests.export.int4_models import Tiny, documents, read_codes

SITE = os.environ.get("HALFBYTE_TEST_GPTQMODEL")
"""A folder of packages that only the loader's process sees: GPTQModel beside this environment, not in it."""
HERE = SITE is not None or all(importlib.util.find_spec(name) is not None for name in ("gptqmodel", "optimum"))
pytestmark = [
    pytest.mark.slow,  # importing GPTQModel alone takes several seconds
    pytest.mark.skipif(
        not HERE, reason="needs gptqmodel and optimum, installed or in the folder HALFBYTE_TEST_GPTQMODEL"
    ),
]

FAMILIES = ("gemma3-small", "llama3-gqa", "qwen2", "phi3")
VARIANTS = {
    "gptq": GptqOptions(),
    "gptq-desc-act": GptqOptions(order="desc_act"),
    "gptq-asym": GptqOptions(sym=False),
    "gptq-v2": GptqOptions(sym=False, checkpoint_format="gptq_v2"),
    "gptq-8": GptqOptions(bits=8),
    "awq": None,
}
# GPTQModel keeps biases in float16 and multiplies codes and scales in it; for AWQ it computes in float16 throughout.
LARGEST_DIFFERENCE = {"gptq": 1e-4, "awq": 0.05}
IDS = documents((57,), seed=4)[0]


@dataclass(frozen=True)
class Loaded:
    tiny: Tiny
    folders: dict[str, Path]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """Every family in every variant, written by us; one process of the public loader has run them all."""
    root = tmp_path_factory.mktemp("public")
    made = {}
    for name in FAMILIES:
        tiny = int4_models.make_tiny(name, root / name / "base")
        folders = {}
        # All variants of one family; the other families in the two usual ones.
        for variant in VARIANTS if name == "llama3-gqa" else ("gptq", "awq"):
            options, folder = VARIANTS[variant], root / name / variant
            if options is None:
                write_awq_folder(folder, tiny.source, tiny.planned, documents(), dtype=torch.float32)
            else:
                write_gptq_folder(folder, tiny.source, tiny.planned, documents(), options, dtype=torch.float32)
            folders[variant] = folder
        made[name] = Loaded(tiny, folders)
    (root / "ids").write_text(" ".join(map(str, IDS.tolist())))
    every = [str(folder) for one in made.values() for folder in one.folders.values()]
    command = [sys.executable, "-m", "tests.export.public_loader", str(root / "ids"), *every]
    path = os.pathsep.join(filter(None, (SITE, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return made


CASES = [(name, v) for name in FAMILIES for v in (VARIANTS if name == "llama3-gqa" else ("gptq", "awq"))]


def as_multiplied(linear: GroupCodes, variant: str) -> Tensor:
    """The weight in float32, rounded where the public kernel rounds."""
    return linear.dequantize(torch.float32 if variant == "awq" else torch.float16).float()


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_public_loader_unpacks_what_we_packed(loaded: dict[str, Loaded], name: str, variant: str) -> None:
    folder = loaded[name].folders[variant]
    public = load_file(folder / "public.safetensors")
    codes = read_codes(folder)
    assert {key for key in public if key.endswith(".weight")} == {f"{linear}.weight" for linear in codes}
    source = open_source(str(folder))
    for linear, held in codes.items():
        assert torch.equal(public[f"{linear}.weight"], as_multiplied(held, variant)), linear
        base = source.prequantized(f"{linear}.weight")
        assert base is not None
        rounded = base.dequantize(torch.float32 if variant == "awq" else torch.float16).float()
        assert torch.equal(public[f"{linear}.weight"], rounded), linear


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_the_public_loader_computes_what_our_decoder_does(loaded: dict[str, Loaded], name: str, variant: str) -> None:
    tiny, folder = loaded[name].tiny, loaded[name].folders[variant]
    public = load_file(folder / "public.safetensors")["logits"]
    replaced: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if key.endswith((".weight", ".bias")):
            replaced[key] = tensor.half().float() if key.endswith(".bias") else tensor
    replaced |= {f"{linear}.weight": as_multiplied(held, variant) for linear, held in read_codes(folder).items()}
    ours = int4_models.decoder(tiny.planned, tiny.spec, replaced).logits(IDS)
    assert float((public - ours).abs().max()) < LARGEST_DIFFERENCE[variant[:4].rstrip("-")]
