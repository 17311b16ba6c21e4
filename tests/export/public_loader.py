"""Run as a program: load a GPTQ or AWQ folder with transformers and GPTQModel, and write what it computes.

    python -m tests.export.public_loader FOLDER IDS OUT [DTYPE]

IDS is a file of numbers; OUT becomes a safetensors file with `logits` [T, V] and, under `weights.NAME`, each
quantized linear's weight as GPTQModel dequantizes it. A process of its own, since importing GPTQModel patches
transformers and safetensors. Its pure torch kernel is asked for: the automatic choice compiles C++ for two minutes.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig


def main(folder: str, ids: str, out: str, dtype: str = "float32") -> None:
    config = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
    if config["quant_method"] == "awq":
        kernel = AwqConfig(bits=4, backend="torch_awq")
    else:
        kernel = GPTQConfig(bits=config["bits"], backend="gptq_torch")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), quantization_config=kernel)
    tokens = torch.tensor([int(token) for token in Path(ids).read_text().split()])
    with torch.no_grad():
        result = {"logits": model(tokens[None]).logits[0].float().contiguous()}
    for module in model.modules():
        if hasattr(module, "qweight"):
            assert type(module).__name__ in ("TorchLinear", "AwqTorchLinear"), type(module)
    save_file(result, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
