"""The options of quantization: the formats, and which weight takes which."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field, field_validator

from halfbyte.errors import UsageError
from halfbyte.options import Options, nearest

QuantType = Literal["nf4", "fp4", "e2m1", "int4", "int8"]
Format = Literal["nf4", "fp4", "e2m1", "int4", "int8", "bf16", "fp16", "fp32"]
UNQUANTIZED = ("bf16", "fp16", "fp32")
Blocksize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]


class QuantOptions(Options):
    """How the base model's linear weights are stored."""

    quant_type: QuantType = Field(
        "nf4",
        description="format of quantized weights: nf4, fp4 (bitsandbytes' own), e2m1 (the standard 4-bit float), "
        "int4 or int8",
    )
    blocksize: Blocksize = Field(64, description="weights that share one constant: 32, 64, … 4096")
    double_quant: bool = Field(True, description="store the blocks' constants in 8 bits: 0.37 bits a weight less")
    requantize: bool = Field(
        False,
        description="a base that is a quantized file (GGUF, GPTQ, AWQ, bitsandbytes): quantize it anew in quant_type; "
        "without it, training keeps the file's own blocks, which are what is served",
    )
    quant_pattern: Mapping[str, Format] = Field(
        default_factory=dict,
        description="a format per module, e.g. 'down_proj: bf16'; a key is a module's name, its end, or a glob",
    )

    @field_validator("quant_pattern")
    @classmethod
    def _no_empty_key(cls, value: Mapping[str, Format]) -> Mapping[str, Format]:
        if "" in value:
            raise ValueError("an empty module name")
        return value

    def format_of(self, module: str) -> Format:
        """The format that the module of this full name (`model.layers.0.mlp.down_proj`) takes; the first key wins.

        A key matches the whole name, the name's end after a dot (`down_proj`, `mlp.down_proj`), or as a glob over
        the whole name (`model.layers.[01].*`).
        """
        for key, chosen in self.quant_pattern.items():
            if _is_meant(key, module):
                return chosen
        return self.quant_type

    def require_modules(self, linears: Iterable[str], others: Iterable[str]) -> None:
        """UsageError for a key of `quant_pattern` that matches none of the model's linears.

        others  its modules that are never quantized: a key may say so of them
        """
        names = list(linears)
        unquantized = [*names, *others]
        for key, chosen in self.quant_pattern.items():
            known = unquantized if chosen in UNQUANTIZED else names
            if not any(_is_meant(key, name) for name in known):
                hint = f"did you mean *.{key}?" if any(fnmatchcase(name, f"*.{key}") for name in names) else None
                raise UsageError(
                    f"quant_pattern: {key!r} matches no linear of the model; {hint or nearest(key, names)}"
                )


def _is_meant(key: str, module: str) -> bool:
    return module == key or module.endswith(f".{key}") or fnmatchcase(module, key)
