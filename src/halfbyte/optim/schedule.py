"""The learning rate as a function of the step: no scheduler object, so nothing to save and nothing to restore."""

import math

from halfbyte.optim.options import OptimOptions


def warmup_steps(total_steps: int, options: OptimOptions) -> int:
    """Steps of the linear warm-up: `warmup_steps` where given, else `warmup_ratio` of the run, rounded up."""
    if options.warmup_steps is not None:
        return options.warmup_steps
    return math.ceil(options.warmup_ratio * total_steps)


def learning_rate_at(step: int, total_steps: int, options: OptimOptions) -> float:
    """Learning rate of update `step` (1 for the first, `total_steps` for the last).

    The warm-up rises to the peak at its last step and never gives 0, as no update should be wasted. After it, the
    schedule is transformers': with k = step - 1 updates made, progress is (k - warmup) / (total - warmup), so that the
    rate would reach 0 one step after the end. A step beyond `total_steps` gives the last step's rate's limit, 0
    (constant: the peak).
    """
    if options.learning_rate is None:
        raise ValueError("learning_rate must be resolved before the schedule is asked")
    if step < 1:
        raise ValueError(f"steps count from 1, not {step}")
    peak, warmup = options.learning_rate, warmup_steps(total_steps, options)
    if step <= warmup:
        return peak * step / warmup
    if options.lr_scheduler_type == "constant":
        return peak
    progress = min(1.0, (step - 1 - warmup) / max(1, total_steps - warmup))
    if options.lr_scheduler_type == "linear":
        return peak * (1.0 - progress)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
