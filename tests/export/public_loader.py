"""Run as a program: load GPTQ and AWQ folders with transformers and GPTQModel, and write what they compute.

    python -m tests.export.public_loader IDS FOLDER...

IDS is a file of token ids. Into each FOLDER comes `public.safetensors`, with `logits` [T, V] and, under NAME.weight,
each quantized linear's weight as GPTQModel unpacks it, float32 [out, in].

A process of its own, since importing GPTQModel patches transformers and safetensors. Its pure torch kernels are asked
for: the automatic choice compiles C++ for two minutes.
"""

import json
import sys
from pathlib import Path

import torch
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig


def unpacked(module: nn.Module) -> Tensor:
    """The weight [out, in] by GPTQModel's own code."""
    if type(module).__name__ == "TorchLinear":
        weight = module.dequantize_weight()
    elif type(module).__name__ == "AwqTorchLinear":
        scales = module.scales.float()
        weight = dequantize_gemm(module.qweight, module.qzeros, scales, module.bits, module.group_size)
    else:
        raise TypeError(f"{type(module)}: another kernel than the one that was asked for")
    return weight.t().float().contiguous()


def main(ids: str, *folders: str) -> None:
    tokens = torch.tensor([int(token) for token in Path(ids).read_text().split()])
    for folder in map(Path, folders):
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        if config["quant_method"] == "awq":
            kernel = AwqConfig(bits=4, backend="torch_awq")
        else:
            kernel = GPTQConfig(bits=config["bits"], backend="gptq_torch")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=kernel)
        with torch.no_grad():
            result = {"logits": model(tokens[None]).logits[0].float().contiguous()}
        for name, module in model.named_modules():
            if hasattr(module, "qweight"):
                result[f"{name}.weight"] = unpacked(module)
        save_file(result, folder / "public.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
