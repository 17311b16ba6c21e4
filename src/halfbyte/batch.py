"""One micro-batch: documents laid end to end, without padding.

`data` makes it and `models` eats it. Shape letters: T tokens in all.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Documents end to end.

    input_ids     int64 [T]
    position_ids  int64 [T]  restart at 0 in each document
    targets       int64 [T]  the id that position t must predict (the next token's), or IGNORE; the shift is done
    lengths       tokens of each document; they sum to T. Attention never crosses a document's border.
    rows          the data-set row behind each document, for messages; may be empty
    paired        documents 2i and 2i + 1 are the better and the worse answer to one prompt (`task: dpo`)
    sources       encoder-decoders: how many tokens of each document the encoder reads; the others are the answer, and
                  the target of a source's last position is the answer's first token. Empty for all other models

    A classifier's targets are class numbers, at the last position of each document.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    lengths: tuple[int, ...]
    rows: tuple[int, ...] = ()
    paired: bool = False
    sources: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def supervised_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())

    @property
    def loss_terms(self) -> int:
        """How many terms the loss is a mean over: the supervised tokens, or the pairs."""
        return len(self.lengths) // 2 if self.paired else self.supervised_tokens

    def to(self, device: torch.device) -> "Batch":
        """The batch with its tensors on `device`."""
        if self.input_ids.device == device:
            return self
        moved = (t.to(device, non_blocking=True) for t in (self.input_ids, self.position_ids, self.targets))
        input_ids, position_ids, targets = moved
        return replace(self, input_ids=input_ids, position_ids=position_ids, targets=targets)
