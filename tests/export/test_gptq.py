"""GPTQ: against a textbook version in float64, against rounding, with broken input, and the folder it writes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.gptq import GptqOptions, Gram, factorize, quantize_gptq, write_gptq_folder
from halfbyte.export.int4_folder import choose_group_size
from halfbyte.export.layer_by_layer import LayerByLayer
from halfbyte.export.safetensors_file import Planned
from halfbyte.models.source import open_source
from halfbyte.quant.group_codes import GroupCodes, fit_grid, round_to_nearest
from tests.export import int4_models
from tests.export.int4_models import GROUP, Tiny, documents, load_folder, read_codes

ORDERS = ("inputs", "activation", "desc_act")


def problem(outputs: int = 12, inputs: int = 96, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and X^T X of correlated inputs of unlike sizes, both float64."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = randn(tokens, inputs) @ randn(inputs, inputs) * randn(inputs).exp()
    return randn(outputs, inputs), x.t() @ x / tokens


def textbook(weight: Tensor, hessian: Tensor, options: GptqOptions, group_size: int) -> Tensor:
    """Algorithm 1 without blocks or Cholesky: after each input, it is eliminated from H^-1 (equations 2 and 3)."""
    inputs = weight.shape[1]
    rest, result = weight.clone(), torch.zeros_like(weight)
    order = torch.arange(inputs)
    if options.order != "inputs":
        order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian + options.damp_percent * hessian.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    left = order.tolist()
    for step, i in enumerate(order.tolist()):
        if options.order == "activation":
            members, values = range(i // group_size * group_size, (i // group_size + 1) * group_size), weight
        else:
            first = step // group_size * group_size
            members, values = order[first : first + group_size].tolist(), rest
        if options.order == "activation" or step % group_size == 0:
            group = values[:, list(members)]
            scales, zeros = fit_grid(group.amin(1), group.amax(1), options.bits, options.sym, 1)
        codes = ((rest[:, i] / scales).round() + zeros).clamp(0, 2**options.bits - 1)
        result[:, i] = (codes - zeros) * scales
        error = (rest[:, i] - result[:, i]) / inverse[i, i]
        rest[:, left] -= error[:, None] * inverse[i, left]
        rest[:, i] = result[:, i]
        inverse = inverse - inverse[:, [i]] @ inverse[[i], :] / inverse[i, i]
        left = left[1:]
    return result


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_the_textbook(order: str, sym: bool, bits: int) -> None:
    # 160 inputs: a whole block of 128 and a part of one; groups of 32, so that several lie in a block.
    weight, hessian = problem(outputs=9, inputs=160)
    options = GptqOptions(order=order, sym=sym, bits=bits)  # type: ignore[arg-type]
    factor = factorize(hessian, options.damp_percent, order != "inputs")
    codes = quantize_gptq(weight, factor, 32, options)
    expected = textbook(weight, hessian, options, 32)
    assert float((codes.dequantize(torch.float64) - expected).abs().max()) < 1e-6
    assert codes.is_contiguous == (order != "desc_act")


def test_the_factor_is_the_cholesky_factor_of_the_inverse() -> None:
    _, hessian = problem()
    factor = factorize(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(96, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert torch.allclose(factor.upper, expected, rtol=1e-8, atol=1e-10)


def hessian_error(weight: Tensor, codes: GroupCodes, hessian: Tensor) -> float:
    error = codes.dequantize(torch.float64) - weight
    return float(((error @ hessian) * error).sum())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.sampled_from(ORDERS), st.booleans(), st.sampled_from([1, 40, 300]))
def test_loses_no_more_than_rounding(seed: int, order: str, sym: bool, tokens: int) -> None:
    weight, hessian = problem(outputs=16, tokens=tokens, seed=seed)
    options = GptqOptions(order=order, sym=sym)  # type: ignore[arg-type]
    factor = factorize(hessian, options.damp_percent, order != "inputs")
    codes = quantize_gptq(weight, factor, 32, options)
    assert hessian_error(weight, codes, hessian) <= hessian_error(
        weight, round_to_nearest(weight, 32, sym=sym), hessian
    )


def test_float32_does_as_well_as_float64() -> None:
    weight, hessian = problem(outputs=32)
    errors = []
    for dtype in (torch.float64, torch.float32):
        factor = factorize(hessian.to(dtype))
        errors.append(hessian_error(weight, quantize_gptq(weight.to(dtype), factor, 32, GptqOptions()), hessian))
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_uncorrelated_inputs_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    factor = factorize(torch.eye(64))
    codes = quantize_gptq(weight, factor, 32, GptqOptions(order="inputs"))
    assert torch.equal(codes.codes, round_to_nearest(weight, 32, sym=True).codes)


def test_a_singular_hessian_is_damped() -> None:
    """One token in 96 dimensions, an input that is always zero, and a matrix that rounding has made indefinite."""
    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    factor = factorize(x.t() @ x)
    assert factor.damping == 0.01
    indefinite = torch.diag(torch.tensor([4.0, 1.0, -0.1]))
    assert factorize(indefinite, 0.01).damping == pytest.approx(0.1)
    assert bool(torch.isfinite(factorize(torch.zeros(4, 4)).upper).all())


def test_a_hopeless_hessian_is_refused() -> None:
    with pytest.raises(HalfbyteError, match="cannot be inverted even with its whole diagonal"):
        factorize(torch.diag(torch.tensor([4.0, 1.0, -3.0])))
    with pytest.raises(HalfbyteError, match="Hessian is not finite"):
        factorize(torch.full((4, 4), float("nan")))


def test_gram_sums_over_pieces() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    gram = Gram(8)
    for piece in x.to(torch.bfloat16).split(20):
        gram.add(piece)
    exact = x.to(torch.bfloat16).double()
    assert torch.allclose(gram.matrix.double(), exact.t() @ exact, rtol=1e-5)


# -- the folder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return int4_models.make_tiny("llama3-gqa", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def folder(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gptq") / "out"
    heard: list[tuple[int, int]] = []
    report = write_gptq_folder(
        out, llama.source, llama.planned, documents(), on_progress=lambda *at: heard.append(at), dtype=torch.float32
    )
    assert heard == [(i + 1, 14) for i in range(14)]
    assert (report.linears, report.group_size, report.bits, report.tokens) == (14, GROUP, 4, 408)
    assert json.dumps(report.to_json())
    return out


def test_the_config_says_what_the_tensors_are(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    expected = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
    assert quantization.items() >= (expected | {"checkpoint_format": "gptq"}).items()
    assert config["dtype"] == "float32"
    assert (folder / "tokenizer.json").is_file()


def test_everything_else_is_the_planned_tensor(llama: Tiny, folder: Path) -> None:
    from safetensors.torch import load_file

    written = load_file(folder / "model.safetensors")
    linears = {linear.name for linear in llama.spec.linears()}
    kept = [tensor for tensor in llama.planned if tensor.name.removesuffix(".weight") not in linears]
    for tensor in kept:
        assert torch.equal(written[tensor.name], torch.cat(list(tensor.rows())))
    assert len(written) == len(kept) + 4 * len(linears)


def test_later_layers_were_given_what_quantized_ones_give(llama: Tiny, folder: Path) -> None:
    """The last linear once more, by hand: its Hessian is of what the quantized model before it gives."""
    codes = read_codes(folder)
    replaced = {f"{name}.weight": held.dequantize() for name, held in codes.items()}
    last = "model.layers.1.mlp.down_proj"
    source = {tensor.name: torch.cat(list(tensor.rows())) for tensor in llama.planned}
    replaced[f"{last}.weight"] = source[f"{last}.weight"]
    model = int4_models.decoder(llama.planned, llama.spec, replaced)
    gram = Gram(160)
    handle = model.layers[1].down.register_forward_pre_hook(lambda _, args: gram.add(args[0]))  # type: ignore[union-attr]
    for document in documents():
        model.logits(document)
    handle.remove()
    expected = quantize_gptq(source[f"{last}.weight"], factorize(gram.matrix, 0.01, True), GROUP, GptqOptions())
    same = (codes[last].codes == expected.codes).float().mean()
    assert float(same) > 0.99  # sums in another order turn a tie now and then


@pytest.mark.parametrize("options", [GptqOptions(order="desc_act"), GptqOptions(sym=False), GptqOptions(bits=8)])
@pytest.mark.parametrize("name", ["gemma3-small", "phi3", "llama-biases"])
def test_the_model_stays_close(name: str, options: GptqOptions, tmp_path: Path) -> None:
    tiny = int4_models.make_tiny(name, tmp_path / "base")
    write_gptq_folder(tmp_path / "out", tiny.source, tiny.planned, documents(), options, dtype=torch.float32)
    codes = {f"{linear}.weight": held for linear, held in read_codes(tmp_path / "out").items()}
    quantized = {name: held.dequantize() for name, held in codes.items()}
    assert {held.is_contiguous for held in codes.values()} == {options.order != "desc_act"}
    source = {tensor.name: torch.cat(list(tensor.rows())).float() for tensor in tiny.planned}
    rounded = {key: round_to_nearest(source[key], GROUP, options.bits, options.sym).dequantize() for key in quantized}
    ids = documents((90,), seed=9)[0]
    exact = int4_models.decoder(tiny.planned, tiny.spec).logits(ids)

    def distance(replaced: dict[str, Tensor]) -> float:
        return float(
            (int4_models.decoder(tiny.planned, tiny.spec, replaced).logits(ids) - exact).square().mean().sqrt()
        )

    # A random model on random tokens: little to gain over rounding, but nothing may be lost or misplaced.
    assert distance(quantized) < 1.1 * distance(rounded)


def test_the_folder_is_read_back_as_a_decoder(llama: Tiny, folder: Path) -> None:
    ids = documents((50,), seed=5)[0]
    replaced = {f"{name}.weight": held.dequantize() for name, held in read_codes(folder).items()}
    expected = int4_models.decoder(llama.planned, llama.spec, replaced).logits(ids)
    assert torch.equal(load_folder(folder).logits(ids), expected)


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "0 tokens are too few"),
        ([torch.arange(100)], "100 tokens are too few"),
        ([torch.arange(300)], "token ids 0 to 299 where the model has 258"),
        ([torch.arange(300) % 258 - 1], "token ids -1 to 256"),
        ([torch.zeros(20, 20)], "token ids"),
    ],
)
def test_calibration_that_does_not_do(llama: Tiny, tmp_path: Path, calibration: list[Tensor], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write_gptq_folder(tmp_path / "out", llama.source, llama.planned, calibration)
    assert list(tmp_path.iterdir()) == []


def test_activations_that_are_not_finite(llama: Tiny, tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    broken = [
        dataclasses.replace(t, rows=lambda t=t: iter([torch.full(t.shape, torch.inf)])) if t.name == name else t
        for t in llama.planned
    ]
    with pytest.raises(HalfbyteError, match="inputs that are not finite"):
        write_gptq_folder(tmp_path / "out", llama.source, broken, documents(), dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_widths_that_no_group_divides(llama: Tiny) -> None:
    spec = llama.spec
    assert choose_group_size(spec, None, 8) == 32
    with pytest.raises(UsageError, match="96, 160, 192 inputs, which groups of 128 do not divide: use group_size 32"):
        choose_group_size(spec, 128, 8)
    narrow = dataclasses.replace(spec, hidden_size=48, head_dim=8)
    with pytest.raises(UsageError, match="48, 160 inputs, which groups of 32 do not divide; export to gguf"):
        choose_group_size(narrow, None, 8)
    odd = dataclasses.replace(spec, intermediate_size=164)
    with pytest.raises(UsageError, match=r"gate_proj is 164 x 96: both must be multiples of 8"):
        choose_group_size(odd, None, 8)
    wide = dataclasses.replace(spec, hidden_size=640, intermediate_size=2048, head_dim=256, num_heads=4)
    assert choose_group_size(wide, None, 8) == 128


def test_another_architecture(tmp_path: Path) -> None:
    from tests.export.conftest import save_base

    save_base("gpt2", tmp_path / "base")
    with pytest.raises(UsageError, match="'gpt2' is not one; export hf or bnb-4bit"):
        write_gptq_folder(tmp_path / "out", open_source(str(tmp_path / "base")), [], documents())


def test_one_layer_is_held_at_a_time(llama: Tiny) -> None:
    """The planned tensors are read once each, a layer when its turn comes."""
    read: list[str] = []

    def spied(tensor: Planned) -> Planned:
        def rows():  # type: ignore[no-untyped-def]
            read.append(tensor.name)
            yield from tensor.rows()

        return dataclasses.replace(tensor, rows=rows)

    model = LayerByLayer([spied(t) for t in llama.planned], llama.spec, documents(), torch.float32)
    assert read == ["model.embed_tokens.weight", "model.norm.weight"]
    model.advance(model.layer(0))
    assert not any("layers.1" in name for name in read)
    assert len(read) == len(set(read))


def test_layers_in_their_turn_compute_what_the_model_does(llama: Tiny) -> None:
    model = LayerByLayer(llama.planned, llama.spec, documents(), torch.float32)
    for index in range(llama.spec.num_layers):
        model.advance(model.layer(index))
    whole = int4_models.decoder(llama.planned, llama.spec)
    lengths = tuple(len(document) for document in documents())
    positions = torch.cat([torch.arange(length) for length in lengths])
    expected = whole.hidden(torch.cat(documents()), positions, lengths)
    assert torch.allclose(whole.norm(torch.cat(model._states)), expected, atol=1e-5)
