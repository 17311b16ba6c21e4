"""Writes a transformers model as a GPTQ or AWQ folder, its linears rounded to the nearest codes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.quant import awq_format, gptq_format
from halfbyte.quant.group_codes import GroupCodes, round_to_nearest

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
"""Of a family of `families`, so that words and groups of 32 divide its linears."""


@dataclass(frozen=True)
class Form:
    """How the linears are quantized. head: `lm_head` too."""

    method: str = "gptq"
    bits: int = 4
    group_size: int = 32
    act_order: bool = False
    sym: bool = True
    checkpoint_format: str = "gptq"
    g_idx: bool = True
    head: bool = False

    @property
    def config(self) -> dict[str, Any]:
        if self.method == "awq":
            return {"quant_method": "awq", "bits": 4, "group_size": self.group_size, "zero_point": True,
                    "version": "gemm"}  # fmt: skip
        return {"quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "desc_act": self.act_order,
                "sym": self.sym, "checkpoint_format": self.checkpoint_format, "lm_head": self.head}  # fmt: skip


FORMS = {
    "gptq": Form(),
    "gptq-asym": Form(sym=False),
    "gptq-v2": Form(sym=False, checkpoint_format="gptq_v2"),
    "gptq-act-order": Form(act_order=True),
    "gptq-no-g-idx": Form(g_idx=False),
    "gptq-one-group": Form(group_size=-1, sym=False),
    "gptq-8": Form(bits=8),
    "gptq-8-act-order": Form(bits=8, act_order=True, sym=False),
    "awq": Form("awq", sym=False),
}


def codes_of(weight: Tensor, form: Form, seed: int = 0) -> GroupCodes:
    """The weight [out, in] in codes; with act-order its groups are of inputs in a random order."""
    inputs = weight.shape[1]
    size = inputs if form.group_size == -1 else form.group_size
    order = torch.arange(inputs)
    if form.act_order:
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))
    first = gptq_format.FIRST_ZERO[form.checkpoint_format] if form.method == "gptq" else 0
    made = round_to_nearest(weight.float()[:, order], size, form.bits, form.sym, first)
    back = order.argsort()
    return GroupCodes(made.codes[back], made.scales, made.zeros, made.group_of[back].contiguous(), form.bits)


def write_group_folder(model: PreTrainedModel, folder: Path, form: Form) -> dict[str, GroupCodes]:
    """Write the folder; the linears' codes by name."""
    model.save_pretrained(folder)
    tensors = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    made = {}
    for seed, (name, module) in enumerate(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or (name == "lm_head" and not form.head):
            continue
        weight = tensors.pop(f"{name}.weight")
        made[name] = codes_of(weight.t() if isinstance(module, Conv1D) else weight, form, seed)
        if form.method == "awq":
            tensors |= awq_format.pack(made[name], name)
        else:
            tensors |= gptq_format.pack(made[name], name, form.checkpoint_format)
            if not form.g_idx:
                del tensors[f"{name}.g_idx"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=form.config)
    return made


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
