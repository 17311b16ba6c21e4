"""The values that cross the border of the training loop, and the ones that it carries from step to step."""

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from halfbyte import ops
from halfbyte.batch import Batch
from halfbyte.errors import UsageError
from halfbyte.optim.adamw import AdamW
from halfbyte.optim.options import OptimOptions
from halfbyte.train.budget import AS_PLANNED, Budget, Layout
from halfbyte.train.options import TrainOptions
from halfbyte.train.update import LossScale, Model, Update

CPU = torch.device("cpu")

StopAsked = Callable[[], bool]
Evaluate = Callable[[StopAsked], Mapping[str, float] | None]


def row_number(row: int) -> str:
    """How a row is named where nobody knows its file and line."""
    return f"row {row}"


@dataclass(frozen=True)
class TrainPlan:
    """Everything that a training run is, beside the model and the folder.

    options, optim      the resolved options; optim.learning_rate must be a number
    total_steps         updates to make
    steps_per_epoch     updates in an epoch; None evaluates at the end only, unless eval_steps says otherwise
    batches_for_update  step (1 for the first) -> its micro-batches; a function of the step alone
    trainable           the trained parameters by name, float32 or bfloat16
    evaluate            called with a function that says whether to stop early; returns `loss`, `supervised_tokens` and
                        other metrics, or None where it was stopped. It leaves the model's parameters alone
    locate              data-set row -> "file:line", for messages
    save_extras         writes more files into a checkpoint's folder (the adapter in PEFT's format)
    identity            what must be the same for a resume to be the same run: base, data, template
    total_tokens        tokens of the whole run, where known, for the time left
    device              where batches are moved to
    loss_scaling        scale the loss against fp16's small range
    figures             what else is known of the update that was just computed, for `step` events: means over its terms
    memory              bytes that the run may take at most; None: what the machine has
    lowered             (this plan, steps down) -> the plan that follows the same updates with less memory
    lowest              how far down that goes
    rehearse            called before the first step of a new run; what it tells is its event's fields (`run.rehearsal`)
    predicted           {"seconds": {phase: seconds}, "probed": bool} of the whole run, for the time left
    final_evaluations   passes over the held-out rows that follow the training, for the time left
    """

    options: TrainOptions
    optim: OptimOptions
    total_steps: int
    batches_for_update: Callable[[int], Sequence[Batch]]
    trainable: Mapping[str, nn.Parameter]
    steps_per_epoch: int | None = None
    evaluate: Evaluate | None = None
    locate: Callable[[int], str] = row_number
    save_extras: Callable[[Path], None] | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    total_tokens: int | None = None
    device: torch.device = CPU
    loss_scaling: bool = False
    figures: Callable[[], Mapping[str, float]] | None = None
    memory: int | None = None
    lowered: "Callable[[TrainPlan, Layout], TrainPlan] | None" = None
    lowest: Layout = AS_PLANNED
    rehearse: "Callable[[Stage], Mapping[str, object]] | None" = None
    predicted: Mapping[str, Any] | None = None
    final_evaluations: int = 0

    def __post_init__(self) -> None:
        if not self.trainable:
            raise UsageError("nothing to train: no adapter is attached and no weight is trainable")
        if self.optim.learning_rate is None:
            raise ValueError("optim.learning_rate must be resolved before training")
        if self.optim.by_layer and self.loss_scaling:
            raise UsageError(
                "per_layer_updates cannot be had in float16: an overflow is found when layers are already updated, and "
                "the loss cannot be scaled again; use --dtype bfloat16 or float32"
            )

    def evaluation_is_due(self, step: int) -> bool:
        """After every `eval_steps` (or epoch), and after the last step."""
        if self.evaluate is None or step == 0:
            return False
        every = self.options.eval_steps or self.steps_per_epoch
        return step >= self.total_steps or (every is not None and step % every == 0)

    def outlook(self) -> dict[str, object]:
        """What `start` and `resume` tell of the time to come (`train.events`), for the time left."""
        options = self.options
        return {
            "predicted": self.predicted,
            "eval_every": (options.eval_steps or self.steps_per_epoch) if self.evaluate is not None else 0,
            "save_steps": options.save_steps,
            "save_minutes": options.save_minutes,
            "final_evaluations": self.final_evaluations,
        }


@dataclass(frozen=True)
class Stage:
    """What a rehearsal has to play with: the run as it stands before its first step.

    model     the plan's own, watched by the run's budget
    folder    the run's folder
    stop      whether somebody asked to stop
    """

    plan: TrainPlan
    model: Model
    optimizer: AdamW
    budget: Budget
    folder: Path
    stop: StopAsked


@dataclass
class TrainState:
    """What a checkpoint carries beside tensors. Sums are over the whole run, all its sessions.

    seconds        of the updates alone; other_seconds: of evaluating and saving
    loss_sum       over `terms`: supervised tokens, or pairs of answers
    layout         what was lowered for want of memory
    window_*       sums since the last `step` event, for logging_steps > 1
    """

    step: int = 0
    seconds: float = 0.0
    other_seconds: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    terms: int = 0
    loss_sum: float = 0.0
    window_seconds: float = 0.0
    window_tokens: int = 0
    window_supervised_tokens: int = 0
    window_terms: int = 0
    window_loss_sum: float = 0.0
    window_figures: dict[str, float] = field(default_factory=dict)
    last_loss: float | None = None
    evaluated_step: int = 0
    eval_loss: float | None = None
    best_step: int | None = None
    best_eval_loss: float | None = None
    evaluations_without_gain: int = 0
    loss_scale: float = 1.0
    loss_scale_good_updates: int = 0
    layout: Layout = AS_PLANNED

    def add(self, update: Update, seconds: float, figures: Mapping[str, float]) -> None:
        """Count one update; `figures` are further means over its terms."""
        self.step += 1
        self.last_loss = update.loss
        self.seconds += seconds
        self.tokens += update.tokens
        self.supervised_tokens += update.supervised_tokens
        self.terms += update.terms
        self.loss_sum += update.loss * update.terms
        self.window_seconds += seconds
        self.window_tokens += update.tokens
        self.window_supervised_tokens += update.supervised_tokens
        self.window_terms += update.terms
        self.window_loss_sum += update.loss * update.terms
        for name, value in figures.items():
            self.window_figures[name] = self.window_figures.get(name, 0.0) + value * update.terms

    def take_window(self) -> dict[str, float | int]:
        """The fields of a `step` event, and an empty window."""
        taken: dict[str, float | int] = {
            "seconds": round(self.window_seconds, 6),
            "tokens": self.window_tokens,
            "supervised_tokens": self.window_supervised_tokens,
            "loss": self.window_loss_sum / self.window_terms,
            **{name: value / self.window_terms for name, value in self.window_figures.items()},
        }
        self.window_seconds, self.window_tokens, self.window_supervised_tokens = 0.0, 0, 0
        self.window_terms, self.window_loss_sum, self.window_figures = 0, 0.0, {}
        return taken

    def take_evaluation(self, loss: float) -> bool:
        """Note an evaluation after the current step; True if it is the best so far, which NaN never is."""
        self.evaluated_step, self.eval_loss = self.step, loss if math.isfinite(loss) else None
        best = self.best_eval_loss is None or loss < self.best_eval_loss
        if best and math.isfinite(loss):
            self.best_step, self.best_eval_loss, self.evaluations_without_gain = self.step, loss, 0
            return True
        self.evaluations_without_gain += 1
        return False

    def take_scale(self, scale: LossScale) -> None:
        self.loss_scale, self.loss_scale_good_updates = scale.value, scale.good_updates

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The state that `to_json` wrote. Before pairs of answers, terms were supervised tokens under other names."""
        older = {
            f"{window}{now}": values[f"{window}{then}"]
            for window in ("", "window_")
            for now, then in (("terms", "supervised_tokens"), ("loss_sum", "nll"))
            if f"{window}{now}" not in values
        }
        values = {"window_figures": {}, **values, **older, "layout": Layout(**values.get("layout", {}))}
        return cls(**{f.name: values[f.name] for f in fields(cls)})


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    status              completed or stopped_early
    seconds             of training, with evaluating and saving, over all sessions; work that a kill lost is not counted
    update_seconds      of the updates alone, which tokens_per_second counts
    train_loss          mean over the supervised tokens (or pairs) of the whole run; final_loss: of the last update
    eval_loss           of the last evaluation
    checkpoint          the last one
    layout              what was lowered for want of memory
    evaluated           the last evaluation was of the weights that it ended with
    memory_by_component bytes of "gradients" (the most that stood in the parameters) and of the "optimizer" in memory
    """

    status: str
    step: int
    total_steps: int
    seconds: float
    update_seconds: float
    tokens: int
    supervised_tokens: int
    tokens_per_second: float
    train_loss: float | None
    final_loss: float | None
    eval_loss: float | None
    best_step: int | None
    best_eval_loss: float | None
    peak_memory_bytes: int
    checkpoint: Path | None
    layout: Layout = AS_PLANNED
    evaluated: bool = False
    memory_by_component: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"checkpoint": self.checkpoint.name if self.checkpoint else None}


def environment(device: torch.device) -> dict[str, str]:
    """What the bits of a result depend on, beside the run itself: recorded with checkpoints, compared on resume."""
    try:
        ours = version("halfbyte")
    except PackageNotFoundError:
        ours = "not installed"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
    return {
        "halfbyte": ours,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "kernels": ops.backend(device.type).name,
        "gpu": gpu,
    }


def _processor() -> str:
    """The processor's name, from Linux where it says, else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
