"""Codes of 4 or 8 bits in int32 words, the first code in the lowest bits: the unit of GPTQ's and AWQ's files."""

import torch
from torch import Tensor


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] codes to int32 [..., n * bits / 32]; n is a multiple of 32 / bits."""
    if bits == 4:
        codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    # Flat first: a turned matrix of one row counts as contiguous, with strides that another type cannot have.
    return codes.reshape(-1).view(torch.int32).view(*codes.shape[:-1], -1)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_words`."""
    codes = words.contiguous().view(torch.uint8)
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return codes
