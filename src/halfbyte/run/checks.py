"""What a config, its options and its rows cannot mean together: refused before anything is planned."""

from halfbyte.data import Prepared
from halfbyte.errors import UsageError
from halfbyte.evaluate.preference import DpoOptions
from halfbyte.run.config import RunConfig


def check_options(config: RunConfig, prepared: Prepared | None) -> None:
    """UsageError for options that were set and that this optimizer, or these rows, leave without effect."""
    names = type(config).model_fields
    idle: dict[str, str] = {}
    if not config.galore:
        idle |= {name: "optim galore_…" for name in names if name.startswith("galore_")}
    if not config.paged:
        idle |= dict.fromkeys(("optim_memory", "optim_offload_dir"), "optim paged_…")
    if prepared is not None and not prepared.pairs:
        idle |= dict.fromkeys(DpoOptions.model_fields, "task dpo, and these rows are no pairs of answers")
    if prepared is not None and not prepared.labels:
        idle["label_names"] = "rows with labels, and these have none"
    for name, purpose in idle.items():
        if getattr(config, name) != names[name].get_default(call_default_factory=True):
            raise UsageError(f"{name} is for {purpose}: leave it out")


def check_task(config: RunConfig, prepared: Prepared | None) -> None:
    """UsageError where the rows and the method do not go together."""
    if prepared is None:
        return
    odd = next((example for example in prepared.eval if (example.rejected is not None) != prepared.pairs), None)
    if odd is not None:
        raise UsageError(
            f"{odd.origin}: held-out rows must be of the kind that is trained on, "
            f"{'pairs of answers (prompt, chosen, rejected)' if prepared.pairs else 'not pairs of answers'}"
        )
    if prepared.pairs and config.method == "full":
        raise UsageError(
            "task dpo compares the model with what it was before, which is the base with its adapter switched off; "
            "method full changes the base itself: use lora or qlora"
        )
