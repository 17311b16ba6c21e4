"""The low-rank adapter of one segment: y += scaling * B (A dropout(x)), with a magnitude (DoRA) or without (LoRA).

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4; Liu et al. 2024,
"DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, whose arithmetic is in `linear.dora`.
Parameters and their moments stay float32, since a bf16 parameter swallows small updates; the products run in
the compute dtype. Creation (rank, scaling, initial values) belongs to `halfbyte.adapters`; this is the place
where the arithmetic needs them.
"""

import torch
from torch import Tensor, nn


class LoraAdapter(nn.Module):
    """Trainable factors `lora_A` [r, in] and `lora_B` [out, r], float32.

    scaling    alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv 2312.03732)
    dropout    probability of zeroing an input of A; active only while `training`
    magnitude  [out]: the trained length of every row of the adapted weight (DoRA); None: plain LoRA
    enabled    False leaves the base alone, at no cost
    """

    magnitude: nn.Parameter | None

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float = 0.0,
        magnitude: Tensor | None = None,
    ) -> None:
        super().__init__()
        if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
            raise ValueError(f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not share a rank")
        if magnitude is not None and magnitude.shape != lora_B.shape[:1]:
            raise ValueError(f"a magnitude {tuple(magnitude.shape)} for lora_B {tuple(lora_B.shape)}")
        self.lora_A = nn.Parameter(lora_A.float())
        self.lora_B = nn.Parameter(lora_B.float())
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude.float())
        self.scaling = scaling
        self.dropout = dropout
        self.enabled = True

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    def delta(self) -> Tensor:
        """The dense update scaling * B A, float32 [out, in]: what a merge adds to the weight (before a magnitude)."""
        return (self.lora_B.detach() @ self.lora_A.detach()) * self.scaling

    def forward(self, x_TI: Tensor) -> Tensor:
        """The update alone, [T, out], through torch's own autograd: the reference, and the path with dropout."""
        x = nn.functional.dropout(x_TI, self.dropout, self.training)
        low = nn.functional.linear(x, self.lora_A.to(x.dtype))
        return nn.functional.linear(low, (self.lora_B * self.scaling).to(x.dtype))

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move between devices, but stay float32 whatever `.to(dtype)` asks."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for parameter in self.parameters(recurse=False):
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        return self
