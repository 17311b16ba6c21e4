"""AWQ's tensors in the "gemm" layout, both ways, as AutoAWQ wrote them and GPTQModel, vLLM and transformers read them.

For a linear NAME of I inputs and O outputs in 4 bits, 8 codes a word:

    NAME.qweight   int32 [I, O / 8]     word c of input i: outputs 8 c + ORDER[k] in bits 4 k … 4 k + 3
    NAME.qzeros    int32 [G, O / 8]     in the same order
    NAME.scales    float16 [G, O]

ORDER interleaves even and odd outputs, for a CUDA trick that turns pairs of nibbles into pairs of half floats.
Source: AutoAWQ 0.2.9, `WQLinear_GEMM.from_linear` (order_map); GPTQModel 7.7, `pack_awq_columns`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.errors import UsageError
from halfbyte.quant.gptq_format import get, require_finite, require_shape
from halfbyte.quant.group_codes import GroupCodes, contiguous_groups
from halfbyte.quant.int32_words import pack_words, unpack_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = ("qweight", "qzeros", "scales")
_BACK = tuple(ORDER.index(k) for k in range(8))


def shapes(outputs: int, inputs: int, group_size: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Suffix -> (shape, dtype) of a linear's tensors."""
    groups = inputs // group_size
    return {
        "qweight": ((inputs, outputs // 8), torch.int32),
        "qzeros": ((groups, outputs // 8), torch.int32),
        "scales": ((groups, outputs), torch.float16),
    }


def pack(codes: GroupCodes, name: str) -> dict[str, Tensor]:
    """The tensors of the linear `name` (without .weight). ValueError for what the format has no place for."""
    if codes.bits != 4 or not codes.is_contiguous:
        raise ValueError(f"{name}: AWQ holds 4 bits in contiguous groups")
    return {
        f"{name}.qweight": pack_words(_ordered(codes.codes, ORDER), 4),
        f"{name}.qzeros": pack_words(_ordered(codes.zeros, ORDER), 4),
        f"{name}.scales": codes.scales.contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], name: str) -> GroupCodes:
    """The linear `name` of a file's tensors; a UsageError names the tensor that is missing or wrong."""
    qweight, scales = get(tensors, f"{name}.qweight", torch.int32, 2), get(tensors, f"{name}.scales", None, 2)
    inputs, (groups, outputs) = qweight.shape[0], scales.shape
    require_shape(f"{name}.qweight", qweight, (inputs, outputs // 8))
    qzeros = get(tensors, f"{name}.qzeros", torch.int32, 2)
    require_shape(f"{name}.qzeros", qzeros, (groups, outputs // 8))
    require_finite(f"{name}.scales", scales)
    if outputs % 8 or groups == 0 or inputs % groups:
        raise UsageError(f"{name}: {inputs} inputs in {groups} groups for {outputs} outputs is no layout of AWQ's")
    return GroupCodes(
        _ordered(unpack_words(qweight, 4), _BACK),
        scales.to(torch.float16).contiguous(),
        _ordered(unpack_words(qzeros, 4), _BACK),
        contiguous_groups(inputs, inputs // groups),
        4,
    )


def _ordered(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Within every eight columns, column `order[k]` comes to place k."""
    return codes.view(codes.shape[0], -1, 8)[..., list(order)].flatten(1)
