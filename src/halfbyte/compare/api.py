"""`hb.compare`: the verb for Python."""

from pathlib import Path
from typing import Any

from halfbyte.compare.compare import Comparison, silent
from halfbyte.compare.compare import compare as run_comparison
from halfbyte.compare.options import CompareOptions, load_request
from halfbyte.compare.process import Tell


def compare(
    config: Path | str | None = None, /, *, dry_run: bool = False, on_event: Tell = silent, **values: Any
) -> Comparison:
    """Run several methods with several seeds and write one report; `.report` is report.json's content.

    values   fields of the comparison (methods, seeds, vary, output, …) and of the runs (model, data, max_steps, …)

        hb.compare(model="my-model", data="rows.jsonl", methods=("lora", "qlora"), seeds=3, output="report").report
    """
    options = {name: value for name, value in values.items() if name in CompareOptions.model_fields}
    fields = {name: value for name, value in values.items() if name not in options}
    request = load_request(Path(config) if config is not None else None, fields, options)
    return run_comparison(request, on_event, dry_run, "hb.compare")
