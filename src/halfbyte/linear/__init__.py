"""A base linear, its segments and its adapters, as one operation."""

from halfbyte.linear.cross_entropy import linear_cross_entropy, linear_logits
from halfbyte.linear.grouped import GroupedLinear, Remake, Segment, segments
from halfbyte.linear.lora import LoraAdapter

__all__ = ["GroupedLinear", "LoraAdapter", "Remake", "Segment", "linear_cross_entropy", "linear_logits", "segments"]
