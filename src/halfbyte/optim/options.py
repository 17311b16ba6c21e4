"""Options of the optimizer and its learning-rate schedule."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from halfbyte.options import Options, Size

ADAPTER_LEARNING_RATE = 2e-4
FULL_LEARNING_RATE = 2e-5
CLIP_NORM = 1.0

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "galore_adamw", "galore_adamw_8bit"]


class OptimOptions(Options):
    """How the weights move: AdamW, where its state is kept, its schedule and its limits."""

    optim: OptimizerName = Field(
        "adamw",
        description="Optimizer: adamw (float32 moments) or adamw_8bit (the moments in one byte each); paged_… keeps "
        "its state and the gradients in a file (on a GPU: its state in pages that move to the host), galore_… gives "
        "the linears' matrices moments of rank galore_rank",
    )
    optim_memory: Size = Field(
        256_000_000, ge=0, description="paged_…: state that stays in memory beside the pages at work, as 2GB"
    )
    optim_offload_dir: Path | None = Field(
        None, description="paged_…: folder of the state's file, best on a fast disk; by default the run's folder"
    )
    per_layer_updates: bool | None = Field(
        None,
        description="Update each tensor as soon as the backward pass has its gradient, so that gradients never stand "
        "whole; without clipping and accumulation. By default on with galore_…",
    )
    galore_rank: int = Field(128, ge=1, description="galore_…: rank of the projected gradients")
    galore_update_proj_gap: int = Field(200, ge=1, description="galore_…: updates between two new projections")
    galore_scale: float = Field(0.25, gt=0, description="galore_…: factor on the projected update, the paper's alpha")
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = Field(
        "std",
        description="galore_…: side that is projected: std (the shorter), reverse_std, right, left or full",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate; by default 2e-4 for adapters, 2e-5 for task dpo and for full fine-tuning, "
        "with GaLore divided by galore_scale",
    )
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+: learning rate of B (and of trained vectors) over that of A, as 16"
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
    max_grad_norm: float | None = Field(
        None,
        ge=0,
        description="Gradients are scaled down to this global norm where they exceed it; 0 turns it off. By default 1, "
        "and 0 with per_layer_updates",
    )

    @model_validator(mode="after")
    def _norm_is_known(self) -> Self:
        if self.by_layer and self.max_grad_norm:
            raise ValueError(
                f"max_grad_norm cannot be {self.max_grad_norm:g} with per_layer_updates"
                f"{' (on with galore_…)' if self.per_layer_updates is None else ''}: a layer is updated before the "
                "norm of the whole gradient is known; leave max_grad_norm out, or set per_layer_updates to false"
            )
        return self

    @property
    def galore(self) -> bool:
        return self.optim.startswith("galore")

    @property
    def paged(self) -> bool:
        return self.optim.startswith("paged")

    @property
    def in_bytes(self) -> bool:
        """Whether moments take one byte an element."""
        return self.optim.endswith("8bit")

    @property
    def by_layer(self) -> bool:
        """`per_layer_updates`, its default made out."""
        return self.galore if self.per_layer_updates is None else self.per_layer_updates

    @property
    def clip_norm(self) -> float:
        """`max_grad_norm`, its default made out."""
        if self.max_grad_norm is None:
            return 0.0 if self.by_layer else CLIP_NORM
        return self.max_grad_norm
