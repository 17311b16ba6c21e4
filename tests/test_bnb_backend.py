"""halfbyte inside bitsandbytes: off unless asked for, then its reference bit for bit, in real processes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.ops import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no native kernels here")

# What every program begins with. `reference` calls bitsandbytes' implementation in PyTorch past the dispatcher.
PRELUDE = """
import itertools, sys, warnings
import torch
warnings.simplefilter("ignore")
import bitsandbytes
from bitsandbytes import functional as F
from torch._C import DispatchKey
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
out, ops = sys.argv[1], torch.ops.bitsandbytes

def reference(op, *arguments):
    with torch.compiler.set_stance("force_eager"):
        return op._op_dk(DispatchKey.CompositeExplicitAutograd, *arguments)

def constants(state):
    if not state.nested:
        return state.absmax
    values = reference(ops.dequantize_blockwise.default, state.absmax, state.state2.absmax, state.state2.code,
                       state.state2.blocksize, torch.float32)
    return values + state.offset

def dense(codes, state):
    return reference(ops.dequantize_4bit.default, codes, constants(state), state.blocksize, state.quant_type,
                     state.shape, state.dtype)
"""
ON = {"HALFBYTE_BNB": "1"}


def launch(program: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "HALFBYTE_BNB"}
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(program), str(path)],
        env=kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run(program: str, path: Path, **environment: str) -> Any:
    """What the program saved."""
    done = launch(program, path, **environment)
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


def test_installed_but_not_asked_for_nothing_is_taken_over(tmp_path: Path) -> None:
    program = """
    from importlib.metadata import entry_points
    from halfbyte import bnb_backend
    found = [entry.value for entry in entry_points(group="bitsandbytes.backends")]
    torch.save([bnb_backend.enabled(), "halfbyte.ops" in sys.modules, found], out)
    """
    enabled, loaded, found = run(program, tmp_path / "out", HALFBYTE_BNB="0")
    assert found == ["halfbyte.bnb_backend:autoload"]
    assert not enabled
    assert not loaded


FORMATS = """
from halfbyte import bnb_backend
assert bnb_backend.enabled()
generator = torch.Generator().manual_seed(0)
shapes = [(1, 1), (5,), (3, 32), (7, 33), (4, 80), (5, 96), (3, 300), (2, 3, 40), (64, 256), (9, 4096), (0, 64)]
floats = [torch.float32, torch.bfloat16, torch.float16]
compared = 0
for shape, dtype, kind, blocksize, nested in itertools.product(
    shapes, floats, ["nf4", "fp4"], [32, 64, 4096], [False, True]
):
    if nested and 0 in shape:
        continue  # bitsandbytes takes the mean of no constants
    x = torch.randn(shape, generator=generator).to(dtype)
    codes, state = F.quantize_4bit(x, blocksize=blocksize, quant_type=kind, compress_statistics=nested)
    expected_codes, expected_absmax = reference(ops.quantize_4bit.default, x, blocksize, kind, torch.uint8)
    assert torch.equal(codes, expected_codes), (shape, dtype, kind, blocksize)
    if not nested:
        assert torch.equal(state.absmax, expected_absmax)
    if 0 in shape:
        continue  # nor does it view no codes
    expected = dense(codes, state).view(shape)
    assert torch.equal(F.dequantize_4bit(codes, state).view(shape), expected), (shape, dtype, kind, blocksize, nested)
    into = torch.full(shape, 7, dtype=dtype)
    F.dequantize_4bit(codes, state, out=into)
    assert torch.equal(into, expected)
    if len(shape) == 2:
        strided = torch.empty(shape[::-1], dtype=dtype).t()
        F.dequantize_4bit(codes, state, out=strided)
        assert torch.equal(strided, expected)
        for rows in (1, 3):
            a = torch.randn(rows, 2, shape[1], generator=generator).to(dtype)
            bias = torch.randn(shape[0], generator=generator).to(dtype)
            for b in (None, bias):
                wanted = torch.nn.functional.linear(a, expected, b)
                assert torch.equal(bitsandbytes.matmul_4bit(a, codes, state, bias=b), wanted)
    compared += 1
torch.save(compared, out)
"""


@pytest.mark.parametrize("isa", ["", *(pytest.param(isa, marks=pytest.mark.slow) for isa in native.ISAS)])
def test_every_shape_and_format_equals_the_reference(tmp_path: Path, isa: str) -> None:
    if isa:
        try:
            native.use(isa)
        except Exception:
            pytest.skip(f"no {isa} here")
        finally:
            native.use(None)
    assert run(FORMATS, tmp_path / "out", **ON, **({"HALFBYTE_ISA": isa} if isa else {})) == 10 * 3 * 2 * 3 * 2


def test_corners_are_bitsandbytes_own(tmp_path: Path) -> None:
    program = """
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    spoilt = x.clone()
    spoilt[2, 3], spoilt[4, 5] = float("nan"), float("inf")
    results = {"wide": ops.quantize_4bit(x.double(), 64, "nf4", torch.uint8)[0]}
    results["nan"] = ops.quantize_4bit(spoilt, 64, "nf4", torch.uint8)[0]
    codes, state = F.quantize_4bit(x, quant_type="nf4", quant_storage=torch.bfloat16)
    results["storage"], results["stored"] = codes, F.dequantize_4bit(codes, state)
    errors = []
    for call in (
        lambda: ops.dequantize_4bit(codes, state.absmax, 64, "int4", [6, 64], torch.float32),
        lambda: ops.dequantize_4bit(codes, state.absmax, 64, "nf4", [7, 64], torch.float32),
        lambda: ops.dequantize_4bit(codes, state.absmax, 48, "nf4", [6, 64], torch.float32),
        lambda: ops.quantize_4bit(x, 64, "int4", torch.uint8),
    ):
        try:
            call()
        except Exception:
            errors.append(True)
    results["errors"] = len(errors)
    torch.save(results, out)
    """
    theirs, ours = run(program, tmp_path / "theirs"), run(program, tmp_path / "ours", **ON)
    for name in ("wide", "nan", "storage", "stored"):
        assert torch.equal(theirs[name].view(torch.uint8), ours[name].view(torch.uint8)), name
    assert ours["errors"] == 4


def test_it_can_be_taken_and_given_back(tmp_path: Path) -> None:
    program = """
    from halfbyte import bnb_backend
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0))
    codes, state = F.quantize_4bit(x, quant_type="nf4")
    right = dense(codes, state)
    def into():
        try:
            F.dequantize_4bit(codes, state, out=torch.empty(5, 96))
        except NotImplementedError:
            return False
        return True
    seen = []
    for change in (bnb_backend.disable, bnb_backend.enable, bnb_backend.enable, bnb_backend.disable):
        change()
        seen.append((bnb_backend.enabled(), into(), F.dequantize_4bit(codes, state)))
    torch.save([seen, right], out)
    """
    seen, right = run(program, tmp_path / "out")
    assert [state for state, _, _ in seen] == [False, True, True, False]
    assert [into for _, into, _ in seen] == [False, True, True, False]
    assert torch.equal(seen[1][2], right)
    assert torch.equal(seen[0][2], seen[3][2])


def test_the_operators_pass_torchs_own_checks(tmp_path: Path) -> None:
    program = """
    x = torch.randn(8, 96)
    codes, state = F.quantize_4bit(x, quant_type="nf4")
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.quantize_4bit.default, (x, 64, "nf4", torch.uint8), test_utils=checks)
    rest = (state.absmax, 64, "nf4", [8, 96], torch.float32)
    torch.library.opcheck(ops.dequantize_4bit.default, (codes, *rest), test_utils=checks)
    # bitsandbytes' own fake of this one compares a shape with a list, and refuses every call.
    torch.library.opcheck(ops.dequantize_4bit.out, (codes, *rest, torch.empty(8, 96)), test_utils=checks[:1])
    torch.library.opcheck(ops.gemm_4bit.default, (torch.randn(3, 96), codes, [8, 96], state.absmax, 64, "nf4"),
                          test_utils=checks)
    # A graph recorded without bitsandbytes' autograd function, which torch frowns at, keeps a weight of its own.
    warnings.simplefilter("ignore")
    a = torch.randn(3, 96, requires_grad=True)
    y = ops.gemm_4bit(a, codes, [8, 96], state.absmax, 64, "nf4")
    ops.gemm_4bit(torch.randn(3, 96), torch.zeros_like(codes), [8, 96], state.absmax, 64, "nf4")
    y.sum().backward()
    torch.save([a.grad, dense(codes, state).sum(0).expand(3, 96)], out)
    """
    gradient, expected = run(program, tmp_path / "out", **ON)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"HALFBYTE_BNB": "yes"}, "HALFBYTE_BNB=yes is neither 0 nor 1"),
        ({"HALFBYTE_BNB": "1", "HALFBYTE_NATIVE": "0"}, "nothing faster than bitsandbytes here: reference"),
    ],
)
def test_what_cannot_be_had_is_an_error(tmp_path: Path, environment: dict[str, str], said: str) -> None:
    done = launch("", tmp_path / "out", **environment)
    assert done.returncode != 0
    assert said in done.stderr


TRAINING = """
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
warnings.simplefilter("ignore")
folder = sys.argv[1] + "-model"
config = transformers.LlamaConfig(vocab_size=64, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
torch.manual_seed(0)
transformers.LlamaForCausalLM(config).save_pretrained(folder)
quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                               bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
linears = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
weights = [dense(m.weight.data, m.weight.quant_state) for m in linears]
torch.manual_seed(1)
model = get_peft_model(prepare_model_for_kbit_training(model, use_gradient_checkpointing=False),
                       LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"))
model.train()
tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(0))

def step():
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]

fast = step()
# The same model with its weights dense.
for linear, weight in zip(linears, weights):
    linear.forward = lambda x, weight=weight: torch.nn.functional.linear(x, weight)
torch.save([len(linears), fast, step()], out)
"""


@pytest.mark.parametrize("hidden", [64, 96])
def test_a_peft_qlora_step_equals_the_dense_one(tmp_path: Path, hidden: int) -> None:
    count, fast, dense = run(TRAINING.replace("HIDDEN", str(hidden)), tmp_path / "on", **ON)
    assert count == 14
    assert len(fast) == 1 + 2 * 14
    assert all(torch.equal(a, b) for a, b in zip(fast, dense, strict=True))


def test_a_peft_qlora_step_is_the_same_without_it(tmp_path: Path) -> None:
    _, with_it, _ = run(TRAINING.replace("HIDDEN", "64"), tmp_path / "on", **ON)
    _, without, _ = run(TRAINING.replace("HIDDEN", "64"), tmp_path / "off")
    for a, b in zip(with_it, without, strict=True):
        torch.testing.assert_close(a, b)
