"""The options that choose a base model and how it is held."""

from typing import Literal

from pydantic import Field

from halfbyte.options import Options


class ModelOptions(Options):
    """Which model, from where, in which type, on which device."""

    model: str = Field(
        description="the base model: a Hugging Face folder, a Hub id such as Qwen/Qwen3-0.6B, a GGUF file, or "
        "ollama:NAME[:TAG] for a model in Ollama's store",
    )
    revision: str | None = Field(None, description="the Hub's branch, tag or commit; the main branch by default")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="type of computation: auto takes bfloat16 where it is measured to be fast, else float32",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a CUDA GPU where there is one")
    allow_unquantized_share: float = Field(
        0.1,
        ge=0.0,
        le=1.0,
        description="the largest share of parameters that may stay 16-bit in a quantized model, for families without "
        "a decoder of their own",
    )
