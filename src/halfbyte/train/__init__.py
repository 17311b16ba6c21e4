"""Training: the loop, its events, its checkpoints, and who watches.

`options` needs no torch; the loop is `halfbyte.train.loop.train`.
"""

from halfbyte.train.options import EFFECTIVE_BATCH, TrainOptions, batch_rows, count_steps

__all__ = ["EFFECTIVE_BATCH", "TrainOptions", "batch_rows", "count_steps"]
