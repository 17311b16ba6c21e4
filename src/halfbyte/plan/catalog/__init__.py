"""What people start from: machines and models by name, as plain YAML that a user extends.

    machines(extra=None) -> {name: Machine}     GPUs and processors: vendors' figures, and the user's own entries
    find_machine(name, extra=None) -> Machine   UsageError with the nearest names for an unknown one
    models() -> {name: Model}                   shapes only: the fields of config.json that a plan reads
    find_model(name) -> dict                    a model's config.json

`models.yaml` and `machines.yaml` lie beside this file; `$XDG_CONFIG_HOME/halfbyte/machines.yaml` is the user's.
"""

from halfbyte.plan.catalog.machines import Machine, find_machine, machines, user_file
from halfbyte.plan.catalog.models import Model, find_model, models

__all__ = ["Machine", "Model", "find_machine", "find_model", "machines", "models", "user_file"]
