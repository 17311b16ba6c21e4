"""Options of a training run: how many rows, how long, what is saved and shown.

The defaults are the ones that halfbyte prints at the start. A batch counts rows: packing changes how rows lie in
memory, never which rows an update sees.
"""

import math
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from halfbyte.options import Options

EFFECTIVE_BATCH = 16

SinkName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrainOptions(Options):
    """How long to train, and what to keep of it."""

    output_dir: Path | None = Field(None, description="Folder of the run; by default runs/<date>-<model>-<method>")
    per_device_train_batch_size: int | None = Field(
        None, ge=1, description="Rows computed at once (a micro-batch); by default what fits and fills a batch of 16"
    )
    gradient_accumulation_steps: int | None = Field(
        None, ge=1, description="Micro-batches in one update; by default so that an update sees 16 rows"
    )
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the training rows")
    max_steps: int | None = Field(None, ge=1, description="Updates to make; overrides num_train_epochs")
    save_steps: int | None = Field(
        None, ge=1, description="Write a checkpoint every so many updates, in addition to save_minutes"
    )
    save_minutes: float | None = Field(
        15.0, gt=0, description="Write a checkpoint after so many minutes; null turns it off"
    )
    save_total_limit: int = Field(
        2, ge=1, description="Checkpoints to keep: the last so many, and the best one beside them"
    )
    eval_steps: int | None = Field(
        None, ge=1, description="Evaluate every so many updates; by default after every epoch. The end always is"
    )
    eval_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of rows in one forward pass of an evaluation; by default 4,096, fewer where memory asks "
        "for it",
    )
    logging_steps: int = Field(1, ge=1, description="Updates summed up in one step event of events.jsonl")
    gradient_checkpointing: bool | None = Field(
        None, description="Recompute activations in the backward pass to save memory; by default if memory asks for it"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after so many evaluations in a row without a better loss"
    )
    load_best_model_at_end: bool = Field(
        False, description="Finish with the weights of the best evaluation instead of the last ones"
    )
    seed: int = Field(42, ge=0, lt=2**63, description="Seed of everything random: order of rows, adapters, dropout")
    rehearsal: bool | None = Field(
        None,
        description="Try the longest micro-batch, evaluation and checkpoint before the first step, and time them; by "
        "default where that takes under 2 % of the run",
    )
    report_to: tuple[SinkName, ...] = Field(
        (), description="Also send events to: tensorboard, wandb, mlflow, trackio (several: a list)"
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: object) -> object:
        """`report_to: wandb`, `a,b`, `none` and null are what people write elsewhere."""
        if value is None or value == "none":
            return ()
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value


def batch_rows(options: TrainOptions, fits: int = EFFECTIVE_BATCH) -> tuple[int, int]:
    """(rows in a micro-batch, micro-batches in an update).

    What the options leave open is filled so that their product is 16, as near as whole numbers allow; `fits` is how
    many rows of a micro-batch memory allows, and only bounds what is left open.
    """
    per_device, accumulation = options.per_device_train_batch_size, options.gradient_accumulation_steps
    if per_device is None:
        share = max(1, round(EFFECTIVE_BATCH / accumulation)) if accumulation else EFFECTIVE_BATCH
        divisors = [rows for rows in range(1, min(max(1, fits), share) + 1) if accumulation or share % rows == 0]
        per_device = divisors[-1]
    if accumulation is None:
        accumulation = max(1, round(EFFECTIVE_BATCH / per_device))
    return per_device, accumulation


def count_steps(rows: int, rows_per_update: int, options: TrainOptions) -> tuple[int, int]:
    """(updates in an epoch, updates in the run). The last update of an epoch takes the rows that are left."""
    if rows < 1:
        raise ValueError("no rows to train on")
    per_epoch = math.ceil(rows / rows_per_update)
    return per_epoch, options.max_steps or max(1, math.ceil(per_epoch * options.num_train_epochs - 1e-9))
