"""What `train` and `resume` show: the settings at the start, the plan, progress, and what came out."""

from typing import Any, Self

from halfbyte.cli import screen
from halfbyte.run.methods import PRESETS
from halfbyte.train.progress import Progress

SHOWN = (
    "lora_r", "lora_alpha", "lora_dropout", "target_modules", "learning_rate", "lr_scheduler_type", "warmup_ratio",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_seq_length",
    "packing", "eval_split", "gradient_checkpointing", "dtype", "quant_type", "save_minutes", "save_total_limit",
    "seed",
)  # fmt: skip
"""The settings that a run prints at its start, defaults included."""


class Reporter:
    """A listener of a run's events that prints to stderr; `quiet` (for --json) keeps only warnings."""

    name = "the terminal"

    def __init__(self, quiet: bool = False) -> None:
        self.console = screen.console(stderr=True)
        self.progress = Progress(self.console)
        self.quiet = quiet
        self.finished = False

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        self.finished |= kind == "finished"
        if self.quiet:
            if kind == "warning":
                self.progress(event)
            return
        show = getattr(self, f"_show_{kind}", None)
        if show is not None:
            show(event)
        else:
            self.progress(event)

    def _show_prepared(self, event: dict[str, Any]) -> None:
        audit = event["audit"]
        share = audit.supervised_train / max(audit.tokens_train, 1)
        self._line(
            f"data: {audit.rows_train:,} rows ({audit.data_format}), {audit.rows_eval:,} held out, "
            f"{audit.tokens_train:,} tokens, {share:.0%} of them supervised"
        )
        for warning in audit.warnings():
            self._line(f"warning: {warning}", style="yellow")

    def _show_planned(self, event: dict[str, Any]) -> None:
        config, plan = event["config"], event["plan"]
        values = {name: getattr(config, name) for name in SHOWN}
        hidden = {"full": ("lora_", "target_modules", "quant_"), "lora": ("quant_",)}.get(config.method, ("-",))
        if plan.chosen.job.held and not config.requantize:
            hidden = (*hidden, "quant_")  # the file's own blocks
        # What a method's name sets is printed, too: it is short for these.
        own = {field for preset in PRESETS.values() for field in preset.fields}
        defaults = {field: type(config).model_fields[field].default for field in sorted(own)}
        values |= {k: getattr(config, k) for k, default in defaults.items() if getattr(config, k) != default}
        if config.task == "dpo":
            values |= {name: value for name, value in config.model_dump().items() if name.startswith("dpo_")}
        shown = [f"{k} {screen.value(v)}" for k, v in values.items() if v is not None and not k.startswith(hidden)]
        self._line(f"settings: {', '.join(shown)}")
        chosen = plan.chosen
        self._line(
            f"method {config.method_name}: {plan.reason}; expected peak {screen.gigabytes(chosen.peak)} "
            f"(up to {screen.gigabytes(chosen.peak_p95)} of {screen.gigabytes(plan.budget)}), "
            f"{screen.duration(chosen.total_seconds)}"
        )
        self._line(f"run: {config.output_dir}")

    def _show_loaded(self, event: dict[str, Any]) -> None:
        share = event["trainable_parameters"] / max(event["total_parameters"], 1)
        self._line(
            f"model loaded in {screen.duration(event['seconds'])}: {event['trainable_parameters']:,} of "
            f"{event['total_parameters']:,} parameters are trained ({share:.2%})"
        )
        held = ", ".join(f"{count} in {name}" for name, count in event["formats"].items())
        self._line(f"base: linears held {held}")
        self._line(f"backend: {event['backend']} ({event['backend_reason']})")

    def _show_reference(self, event: dict[str, Any]) -> None:
        if event["pairs_done"] == 0:
            self._line(f"reference: what the model says of {event['pairs']:,} pairs of answers, asked once")

    def _show_finished(self, event: dict[str, Any]) -> None:
        result = event["result"]
        if result["base_eval_loss"] is not None:
            self._line(f"held-out loss: {result['base_eval_loss']:.4f} before, {result['eval_loss']:.4f} after")
        if "rewards/accuracies" in result["metrics"]:
            share = result["metrics"]["rewards/accuracies"]
            low, high = result["metrics"]["intervals"].get("rewards/accuracies", (0, 1))
            self._line(f"held-out pairs won: {share:.1%} (95 %: {low:.1%} to {high:.1%})")
        if "accuracy" in result["metrics"]:
            before, after = result["metrics"]["base"]["accuracy"], result["metrics"]["accuracy"]
            self._line(f"held-out accuracy: {before:.1%} before, {after:.1%} after")
        predicted = result["predicted"]
        if predicted:
            self._line(
                f"peak memory {screen.gigabytes(result['peak_memory_bytes'])} (expected "
                f"{screen.gigabytes(predicted['peak_memory_bytes']['p50'])}), {screen.duration(result['seconds'])} "
                f"(expected {screen.duration(predicted['seconds']['p50'])})"
            )
        self._line(f"saved in {event['path']}; try: halfbyte chat {event['path']}")

    def _line(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.progress.close()
