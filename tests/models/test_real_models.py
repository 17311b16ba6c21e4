"""The decoder equals transformers on two real models: logits and LoRA gradients, from the GGUF file itself.

Ours reads the GGUF file; transformers reads it too, once, into a Hugging Face folder beside it (about a minute).
Gemma 3 270M runs whole; Qwen2.5-Coder 1.5B runs layer by layer, forwards and backwards, so that float32 fits
into 3 GB. As in test_families the bound is transformers' own float32 error, measured in float64.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from halfbyte.adapters import LoraOptions, adapter_state, attach, load_adapter_state
from halfbyte.batch import IGNORE
from halfbyte.linear import segments
from halfbyte.models import rope
from halfbyte.models.blocks import rms_norm
from halfbyte.models.decoder import Context, Layer
from halfbyte.models.load import load_model
from halfbyte.models.options import ModelOptions
from halfbyte.models.source import ModelSource, open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import DenseWeight
from tests.models.families import error, float64, make_batch, make_float64, reference
from tests.models.test_families import TIMES, assert_close

FOLDER = Path.home() / ".cache" / "halfbyte-models"
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # PEFT's call
]


def gguf_and_folder(name: str) -> tuple[Path, Path]:
    """(the GGUF file, transformers' reading of it as a bf16 folder). Skips where the file is not on this machine."""
    gguf, folder = FOLDER / f"{name}.gguf", FOLDER / name
    if not gguf.exists():
        pytest.skip(f"{gguf} is not on this machine")
    if not folder.exists():
        model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=gguf.name, dtype=torch.bfloat16)
        # Plain bf16 weights by now, but transformers refuses to save what bears a quantizer's marks.
        model.hf_quantizer, model.is_quantized = None, False
        for holder, mark in ((model.config, "quantization_config"), (model, "quantization_method")):
            if hasattr(holder, mark):
                delattr(holder, mark)
        partial = folder.with_suffix(".partial")
        model.save_pretrained(partial)
        transformers.AutoTokenizer.from_pretrained(FOLDER, gguf_file=gguf.name).save_pretrained(partial)
        partial.rename(folder)
    return gguf, folder


def lora_values(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# -- Gemma 3 270M, whole ------------------------------------------------------------------------------------------


def test_gemma() -> None:
    gguf, folder = gguf_and_folder("gemma-3-270m")
    loaded = load_model(ModelOptions(model=str(gguf), device="cpu"), dtype=torch.float32)
    ours = loaded.model
    text = (
        "The quick brown fox jumps over the lazy dog. Der Wald steht schwarz und schweiget, und aus den Wiesen steiget"
    )
    words = loaded.tokenizer(text)["input_ids"]
    batch = make_batch((len(words), 40), vocab=250_000)
    batch.input_ids[: len(words)] = torch.tensor(words)
    batch.targets[: len(words) - 1] = torch.tensor(words[1:])
    attach(ours, LoraOptions(lora_r=4, lora_alpha=8))
    state = lora_values({name: value.shape for name, value in adapter_state(ours).items()})
    load_adapter_state(ours, state)
    logits = ours.logits(batch.input_ids, batch.lengths)
    ours.checkpointing = True
    loss, _ = ours.train().loss(batch)
    loss.backward()
    mine = {
        f"base_model.model.{name}.{factor}.default.weight": getattr(segment.adapter, factor).grad
        for name, segment in segments(ours).items()
        for factor in ("lora_A", "lora_B")
    }
    del ours, loaded
    gc.collect()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, lora)
    peft.set_peft_model_state_dict(theirs, state)
    float32 = reference(theirs, batch, lambda name: "lora_" in name)
    model = theirs.unload()
    with float64():
        base = peft.get_peft_model(make_float64(model), lora, autocast_adapter_dtype=False).double()
        del theirs, model
        gc.collect()
        peft.set_peft_model_state_dict(base, {name: value.double() for name, value in state.items()})
        exact = reference(base, batch, lambda name: "lora_" in name)
    assert_close(logits, float32.logits, exact.logits, "logits")
    assert_close(loss.detach(), float32.loss, exact.loss, "loss")
    assert set(mine) == set(exact.gradients)
    for name, gradient in exact.gradients.items():
        assert_close(mine[name], float32.gradients[name], gradient, name)


# -- Qwen2.5-Coder 1.5B, layer by layer ---------------------------------------------------------------------------


class Theirs:
    """transformers' layers of a folder, made one at a time with PEFT's adapters in them."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.config: Any = transformers.AutoConfig.from_pretrained(folder)
        # As transformers runs by default; the float64 reference writes the attention out.
        self.config._attn_implementation = "sdpa" if dtype == torch.float32 else "eager"
        self.dtype = dtype
        self.source = open_source(str(folder))

    def read(self, name: str) -> Tensor:
        return self.source.read(name).to(self.dtype)

    def layer(self, index: int, state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        prefix = f"model.layers.{index}."
        layer = Qwen2DecoderLayer(self.config, index).to(self.dtype)
        layer.load_state_dict({name: self.read(prefix + name) for name in layer.state_dict()})
        targets = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets), layer)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                key = f"base_model.model.{prefix}{name}".replace(".default", "")
                parameter.data = state[key].to(self.dtype)
        self.adapters = {f"{prefix}{n}".replace(".default.weight", ""): p for n, p in layer.named_parameters()}
        rotary = Qwen2RotaryEmbedding(self.config)

        def run(x: Tensor) -> Tensor:
            length = x.shape[0]
            mask = None
            if self.dtype == torch.float64:
                mask = torch.full((length, length), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
            positions = torch.arange(length)[None]
            out = layer(x[None], attention_mask=mask, position_embeddings=rotary(x[None], positions))
            hidden: Tensor = (out[0] if isinstance(out, tuple) else out).reshape(length, -1)
            return hidden

        return run

    def gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.adapters.items() if "lora_" in name and p.grad is not None}

    def logits(self, x: Tensor) -> Tensor:
        norm = Qwen2RMSNorm(x.shape[1], self.config.rms_norm_eps).to(self.dtype)
        norm.load_state_dict({"weight": self.read("model.norm.weight")})
        return norm(x) @ self.read("lm_head.weight").T


class Ours:
    """Our layers of a GGUF file, made one at a time with our adapters in them."""

    def __init__(self, source: ModelSource) -> None:
        self.source, self.spec = source, ModelSpec.from_config(source.config)

    def read(self, name: str) -> Tensor:
        # The file has norms in float32, which transformers has rounded to bf16 on the way into its folder.
        return self.source.read(name).bfloat16().float()

    def layer(self, index: int, state: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        self.made = Layer(self.spec, index, lambda name, _: DenseWeight(self.read(name)), self.read)
        attach(self.made, LoraOptions(lora_r=4, lora_alpha=8))
        load_adapter_state(self.made, {name: state[name] for name in adapter_state(self.made)})

        def run(x: Tensor) -> Tensor:
            length = x.shape[0]
            table = rope.table(self.spec.rope, torch.arange(length), [length], x.dtype)
            result: Tensor = self.made(x, Context((length,), {self.spec.rope: table}))
            return result

        return run

    def gradients(self) -> dict[str, Tensor]:
        return {
            f"{name}.{factor}": getattr(segment.adapter, factor).grad
            for name, segment in segments(self.made).items()
            for factor in ("lora_A", "lora_B")
        }

    def logits(self, x: Tensor) -> Tensor:
        x = rms_norm(x, self.read("model.norm.weight"), self.spec.norm_eps, self.spec.norm_plus_one)
        return x @ self.read("lm_head.weight").T


def forward(side: Theirs | Ours, ids: Tensor, state: dict[str, Tensor]) -> list[Tensor]:
    """The input of each layer, and of the last norm."""
    inputs = [side.read("model.embed_tokens.weight")[ids]]
    layers = side.spec.num_layers if isinstance(side, Ours) else side.config.num_hidden_layers
    with torch.no_grad():
        for index in range(layers):
            inputs.append(side.layer(index, state)(inputs[-1]))
    return inputs


def backward(
    side: Theirs | Ours, inputs: list[Tensor], targets: Tensor, state: dict[str, Tensor]
) -> Iterator[tuple[str, Any]]:
    """Yields ("logits", …), ("loss", …), then the adapters' gradients of each layer, the last first."""
    x = inputs[-1].requires_grad_()
    logits = side.logits(x)
    loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    loss.backward()
    yield "logits", logits.detach()
    yield "loss", loss.detach()
    del logits, loss
    gradient = x.grad
    for index in range(len(inputs) - 2, -1, -1):
        x = inputs[index].detach().requires_grad_()
        side.layer(index, state)(x).backward(gradient)
        gradient = x.grad
        yield f"layer {index}", side.gradients()


def test_qwen() -> None:
    gguf, folder = gguf_and_folder("qwen2.5-coder-1.5b")
    ours = Ours(open_source(str(gguf)))
    shapes = {}
    for linear in ours.spec.linears():
        shapes[f"base_model.model.{linear.name}.lora_A.weight"] = torch.Size((4, linear.in_features))
        shapes[f"base_model.model.{linear.name}.lora_B.weight"] = torch.Size((linear.out_features, 4))
    state = lora_values(shapes)
    batch = make_batch((48,), vocab=150_000)
    theirs, exact = Theirs(folder, torch.float32), Theirs(folder, torch.float64)
    streams = [backward(side, forward(side, batch.input_ids, state), batch.targets, state) for side in (ours, theirs)]
    with float64():
        inputs = forward(exact, batch.input_ids, state)
    streams.append(backward(exact, inputs, batch.targets, state))
    for (what, mine), (_, float32) in zip(*streams[:2], strict=True):
        with float64():
            _, reference64 = next(streams[2])
        if isinstance(mine, Tensor):
            assert_close(mine, float32, reference64, what)
            continue
        assert set(mine) == set(reference64)
        # Qwen's large query and key biases make single tensors of a layer noisy in either program (the fused
        # attention's backward most of all: up to 1.5 % in the first layer), so the layer's worst is what is compared.
        worst = [max(error(side[n], exact_n) for n, exact_n in reference64.items()) for side in (mine, float32)]
        assert worst[0] <= TIMES * worst[1], f"{what}: {worst[0]:.2e}, transformers' own error is {worst[1]:.2e}"
