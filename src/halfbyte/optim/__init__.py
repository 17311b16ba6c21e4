"""Optimizers: one AdamW, the learning rate as a function of the step, clipping.

The options and the schedule are here and need no torch, so that the command line starts fast; the optimizer itself is
`halfbyte.optim.adamw.AdamW`.
"""

from halfbyte.optim.options import ADAPTER_LEARNING_RATE, FULL_LEARNING_RATE, OptimOptions
from halfbyte.optim.schedule import learning_rate_at, warmup_steps

__all__ = ["ADAPTER_LEARNING_RATE", "FULL_LEARNING_RATE", "OptimOptions", "learning_rate_at", "warmup_steps"]
