"""From the names in a checkpoint's files to the names of transformers' modules.

They differ where a file was written from the bare body (GPT-2: `h.0.attn…` for `transformer.h.0.attn…`), where
transformers renamed a module, and where it keeps several file tensors as one parameter (a mixture of experts).
transformers publishes these rules as data, `get_model_conversion_mapping`, which PEFT reads too.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from halfbyte.errors import UsageError
from halfbyte.quant import Weight


class CheckpointNames:
    """Resolves one model's checkpoint names. Feed every tensor to `resolve`, then take what `finish` made."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameters = model.state_dict()
        rules = get_model_conversion_mapping(model)
        self.renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.collected: dict[str, Any] = {}

    def target(self, name: str) -> tuple[str, str | None]:
        """(parameter that a file's tensor belongs to, the rule's pattern if it is a part of it or needs a change)."""
        target, pattern = self._rename(name, self.renamings, self.converters)
        if target not in self.parameters and name in self.parameters:
            # A file that has today's names must not be renamed by yesterday's rules.
            target, pattern = self._rename(name, [], [])
        return target, pattern

    def resolve(self, name: str, value: Tensor | Weight) -> Iterator[tuple[str, Tensor | Weight]]:
        """The parameter that a file's tensor is, if it is one alone; a part of one is kept for `finish`."""
        target, pattern = self.target(name)
        if pattern is None:
            yield target, value
            return
        if isinstance(value, Weight):
            raise UsageError(f"{name}: is quantized, and is a part of {target}, which stays 16-bit")
        if target not in self.collected:
            rule = next(rule for rule in self.converters if pattern in rule.source_patterns)
            self.collected[target] = deepcopy(rule)
        self.collected[target].add_tensor(target, name, pattern, value)

    def finish(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that are made of several file tensors."""
        while self.collected:
            target, rule = self.collected.popitem()
            for name, value in rule.convert(target, model=self.model, config=self.model.config).items():
                yield name, value[0] if isinstance(value, list) else value

    def _rename(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        prefix = self.model.base_model_prefix
        result: tuple[str, str | None] = rename_source_key(name, renamings, converters, prefix, self.parameters)
        return result
