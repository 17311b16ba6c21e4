"""GPTQ's tensors, both ways, as GPTQModel, AutoGPTQ, vLLM and transformers write and read them.

For a linear NAME of I inputs and O outputs in codes of b bits, 32 / b codes a word (n):

    NAME.qweight   int32 [I / n, O]     word r of column o: inputs r n … r n + n - 1, the first in the lowest bits
    NAME.qzeros    int32 [G, O / n]     word c of group g: outputs c n … c n + n - 1
    NAME.scales    float16 [G, O]
    NAME.g_idx     int32 [I]            the group of each input; inputs keep their places with act-order too

`checkpoint_format` "gptq" (version 1) stores each zero point minus one, modulo 2^b; "gptq_v2" as it is. Loaders of
version 1 add the one back to whole words, and where a zero point 0 had become 15 it carries into its neighbour: so
nothing below 1 is ever written (`FIRST_ZERO`), and a 15 that is read means 0.

Sources: GPTQModel 7.7, `PackableQuantLinear.pack` and `convert_gptq_v1_to_v2_format_module`; vLLM, `gptq.py`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.quant.group_codes import GroupCodes, contiguous_groups
from halfbyte.quant.int32_words import pack_words, unpack_words

BITS = (4, 8)
FORMATS = ("gptq", "gptq_v2")
FIRST_ZERO = {"gptq": 1, "gptq_v2": 0}
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


def shapes(outputs: int, inputs: int, group_size: int, bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Suffix -> (shape, dtype) of a linear's tensors."""
    word, groups = 32 // bits, -(-inputs // group_size)
    return {
        "qweight": ((inputs // word, outputs), torch.int32),
        "qzeros": ((groups, outputs // word), torch.int32),
        "scales": ((groups, outputs), torch.float16),
        "g_idx": ((inputs,), torch.int32),
    }


def pack(codes: GroupCodes, name: str, checkpoint_format: str = "gptq") -> dict[str, Tensor]:
    """The tensors of the linear `name` (without .weight). ValueError for a zero point that version 1 cannot hold."""
    first = FIRST_ZERO[checkpoint_format]
    if codes.zeros.numel() and int(codes.zeros.min()) < first:
        raise ValueError(f"{name}: a zero point of 0 cannot be written as {checkpoint_format}")
    return {
        f"{name}.qweight": pack_words(codes.codes.t(), codes.bits).t().contiguous(),
        f"{name}.qzeros": pack_words(codes.zeros - first, codes.bits),
        f"{name}.scales": codes.scales.contiguous(),
        f"{name}.g_idx": codes.group_of.contiguous(),
    }


def unpack(
    tensors: Mapping[str, Tensor], name: str, bits: int = 4, checkpoint_format: str = "gptq", group_size: int = 0
) -> GroupCodes:
    """The linear `name` of a file's tensors; a UsageError names the tensor that is missing or wrong.

    group_size  only for files without g_idx (written without act-order by some tools); 0: inputs / groups
    """
    if bits not in BITS:
        raise UsageError(f"{name}: GPTQ in {bits} bits; 4 and 8 can be read: use another quantization of the model")
    if checkpoint_format not in FORMATS:
        raise UsageError(f"{name}: checkpoint_format {checkpoint_format!r}; {' and '.join(FORMATS)} can be read")
    qweight, scales = get(tensors, f"{name}.qweight", torch.int32, 2), get(tensors, f"{name}.scales", None, 2)
    word = 32 // bits
    inputs, (groups, outputs) = qweight.shape[0] * word, scales.shape
    require_shape(f"{name}.qweight", qweight, (qweight.shape[0], outputs))
    qzeros = get(tensors, f"{name}.qzeros", torch.int32, 2)
    require_shape(f"{name}.qzeros", qzeros, (groups, outputs // word))
    require_finite(f"{name}.scales", scales)
    zeros = (unpack_words(qzeros, bits) + (FIRST_ZERO[checkpoint_format])) & (2**bits - 1)
    return GroupCodes(
        unpack_words(qweight.t(), bits).t().contiguous(),
        scales.to(torch.float16).contiguous(),
        zeros,
        _group_of(tensors, name, inputs, groups, group_size),
        bits,
    )


def _group_of(tensors: Mapping[str, Tensor], name: str, inputs: int, groups: int, group_size: int) -> Tensor:
    key = f"{name}.g_idx"
    if key not in tensors:
        size = inputs if group_size == -1 else min(group_size, inputs) or -(-inputs // max(groups, 1))
        if size <= 0 or -(-inputs // size) != groups:
            raise UsageError(f"{name}: {inputs} inputs in groups of {size} are not the {groups} groups of its scales")
        return contiguous_groups(inputs, size)
    group_of = get(tensors, key, torch.int32, 1)
    require_shape(key, group_of, (inputs,))
    if inputs and not 0 <= int(group_of.min()) <= int(group_of.max()) < groups:
        raise UsageError(f"{key} names groups beyond the {groups} that {name}.scales has: the file is damaged")
    return group_of.contiguous()


def get(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype | None, dims: int) -> Tensor:
    """The tensor at `key`, of `dtype` (None: a floating-point one) and `dims` dimensions, or a UsageError."""
    if key not in tensors:
        raise UsageError(f"{key} is missing: not a whole quantized checkpoint")
    tensor = tensors[key]
    right = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if not right or tensor.dim() != dims:
        wanted = "floating point" if dtype is None else str(dtype).removeprefix("torch.")
        raise UsageError(f"{key}: {tensor.dtype} {list(tensor.shape)}, {wanted} in {dims} dimensions is needed")
    return tensor


def require_shape(key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """UsageError unless the tensor has this shape."""
    if tuple(tensor.shape) != shape:
        raise UsageError(
            f"{key}: {list(tensor.shape)}, but the tensors beside it need {list(shape)}: the file is damaged"
        )


def require_finite(key: str, tensor: Tensor) -> None:
    """UsageError for NaN or infinite values, which would spoil whatever is computed with them."""
    if not bool(torch.isfinite(tensor).all()):
        raise UsageError(f"{key} holds NaN or infinite values: the file is damaged")
