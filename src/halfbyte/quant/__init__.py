"""Frozen weights in 16 bits or in blocks of 4 and 8, all one thing to the layers above: a shape and `dequantize()`."""

from halfbyte.quant.bnb_format import bnb_keys
from halfbyte.quant.gguf_weight import GgufWeight
from halfbyte.quant.group_weight import GroupWeight
from halfbyte.quant.options import QuantOptions
from halfbyte.quant.weight import DTYPE_NAMES, DTYPES, BlockWeight, DenseWeight, Weight, quantize

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "BlockWeight",
    "DenseWeight",
    "GgufWeight",
    "GroupWeight",
    "QuantOptions",
    "Weight",
    "bnb_keys",
    "quantize",
]
