"""Tiny random models whose shapes GPTQ's and AWQ's words and groups of 32 divide, and calibration tokens for them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.export.merge import plan_tensors
from halfbyte.export.safetensors_file import Planned
from halfbyte.models.decoder import Decoder
from halfbyte.models.load import build_decoder
from halfbyte.models.options import ModelOptions
from halfbyte.models.safetensors_source import FolderSource
from halfbyte.models.source import ModelSource, open_source
from halfbyte.models.spec import ModelSpec
from halfbyte.quant import DenseWeight, QuantOptions
from halfbyte.quant.group_codes import GroupCodes
from tests.evaluate.conftest import VOCAB, byte_tokenizer
from tests.models import families

GROUP = 32
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}


@dataclass(frozen=True)
class Tiny:
    """A folder, opened, and its tensors as a merge without an adapter plans them."""

    folder: Path
    source: ModelSource
    planned: list[Planned]

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec.from_config(self.source.config)


def make_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Tiny:
    """The family `name` with other sizes; weights of `dtype`, a byte-level tokenizer beside them."""
    config = families.config(name)
    config.vocab_size = VOCAB
    sizes = dict(SIZES)
    if name.startswith("phi3"):  # its head_dim follows from the others
        del sizes["head_dim"]
    for key, value in sizes.items():
        setattr(config, key, value)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[-2:]  # Gemma 3: a sliding layer and a full one
    families.make_model(config, dtype=dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return open_tiny(folder, dtype)


def open_tiny(folder: Path, dtype: torch.dtype = torch.float32) -> Tiny:
    options = ModelOptions(model=str(folder))
    source = open_source(str(folder))
    return Tiny(folder, source, plan_tensors(options, source, {}, None, dtype))


def documents(lengths: tuple[int, ...] = (180, 61, 127, 40), vocab: int = VOCAB, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]


def decoder(planned: list[Planned], spec: ModelSpec, replaced: dict[str, Tensor] | None = None) -> Decoder:
    """The planned model in float32, some of its tensors replaced."""
    tensors = {tensor.name: tensor for tensor in planned}

    def read(name: str) -> Tensor:
        if replaced is not None and name in replaced:
            return replaced[name]
        return torch.cat(list(tensors[name].rows()))

    model = Decoder.build(spec, lambda name, _: DenseWeight(read(name).float()), read, torch.float32)
    return model.eval()


def read_codes(folder: Path) -> dict[str, GroupCodes]:
    """Linear -> the codes of a GPTQ or AWQ folder."""
    source = open_source(str(folder))
    assert isinstance(source, FolderSource)
    found = {name: source.group_codes(name) for name in source.prequantized_bytes()}
    return {name.removesuffix(".weight"): codes for name, codes in found.items() if codes is not None}


def load_folder(folder: Path) -> Decoder:
    """The decoder on the folder's codes, computing in float32."""
    source = open_source(str(folder))
    spec = ModelSpec.from_config(source.config)
    return build_decoder(source, spec, QuantOptions(), torch.float32, torch.device("cpu")).eval()
