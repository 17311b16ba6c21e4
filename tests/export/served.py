"""llama.cpp itself, through llama-cpp-python: what a GGUF file that we write is worth."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

F32_CACHE = 0  # GGML_TYPE_F32


@contextmanager
def llama(path: Path, n_ctx: int = 256, lora: Path | None = None, **options: Any) -> Iterator[Any]:
    """The model in llama.cpp on one thread: float32 key-value cache, no flash attention, logits of every token."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = llama_cpp.Llama(
        str(path),
        n_ctx=n_ctx,
        n_batch=n_ctx,
        n_threads=1,
        n_threads_batch=1,
        logits_all=True,
        flash_attn=False,
        type_k=F32_CACHE,
        type_v=F32_CACHE,
        yarn_attn_factor=-1.0,  # what the file says: llama-cpp-python's own defaults replace it
        yarn_beta_fast=-1.0,
        yarn_beta_slow=-1.0,
        lora_path=None if lora is None else str(lora),
        verbose=False,
        **options,
    )
    try:
        yield model
    finally:
        model.close()


def logits(path: Path, ids: Tensor, n_ctx: int = 256, lora: Path | None = None) -> Tensor:
    """[T] token ids -> [T, vocab], in one batch."""
    with llama(path, n_ctx, lora) as model:
        model.eval(ids.tolist())
        return torch.tensor(np.array(model.scores[: len(ids)]))


def quantize(source: Path, out: Path, file_type: int) -> None:
    """llama.cpp's own quantizer, from one GGUF file to another."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), params) == 0
