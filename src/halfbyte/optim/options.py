"""Options of the optimizer and its learning-rate schedule."""

from typing import Literal

from pydantic import Field

from halfbyte.options import Options

ADAPTER_LEARNING_RATE = 2e-4
FULL_LEARNING_RATE = 2e-5


class OptimOptions(Options):
    """How the weights move: AdamW, its schedule and its limits."""

    optim: Literal["adamw", "adamw_8bit"] = Field(
        "adamw", description="Optimizer: adamw (float32 moments) or adamw_8bit (the moments in one byte each)"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; by default 2e-4 for adapters and 2e-5 for full fine-tuning"
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Shape of the learning rate after the warm-up: constant, linear or cosine (both to 0)"
    )
    warmup_ratio: float = Field(
        0.03, ge=0, le=1, description="Share of all steps over which the learning rate rises from 0 to its peak"
    )
    warmup_steps: int | None = Field(None, ge=0, description="Warm-up in steps; overrides warmup_ratio")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay, applied to matrices and not to norms or biases"
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of AdamW's first moment")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of AdamW's second moment")
    adam_epsilon: float = Field(1e-8, gt=0, description="Added to AdamW's denominator")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Gradients are scaled down to this global norm where they exceed it; 0 turns it off"
    )
