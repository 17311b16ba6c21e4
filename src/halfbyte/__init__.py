"""halfbyte: fine-tune language models with LoRA and QLoRA on the hardware that you already have.

    import halfbyte as hb

    config = hb.RunConfig(model="Qwen/Qwen3-0.6B", data="rows.jsonl")
    print(hb.plan(config).reason)
    result = hb.train(config)
    print(hb.evaluate(result.path))
    model = hb.load(result.path)          # an nn.Module for one's own loop

Importing halfbyte is cheap: what a name needs is imported when the name is first used. `halfbyte.plan`,
`halfbyte.train`, `halfbyte.evaluate` and `halfbyte.compare` are packages that can also be called, as the verbs of the
same names.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from halfbyte.compare.api import compare
    from halfbyte.run.api import classify, evaluate, load, plan, resume, train
    from halfbyte.run.config import RunConfig, load_config
    from halfbyte.run.run import RunResult

__all__ = [
    "RunConfig",
    "RunResult",
    "classify",
    "compare",
    "evaluate",
    "load",
    "load_config",
    "plan",
    "resume",
    "train",
]

_HOMES = {
    "RunConfig": "halfbyte.run.config",
    "RunResult": "halfbyte.run.run",
    "classify": "halfbyte.run.api",
    "load": "halfbyte.run.api",
    "load_config": "halfbyte.run.config",
    "resume": "halfbyte.run.api",
}
_VERBS = {
    "compare": "halfbyte.compare.api",
    "evaluate": "halfbyte.run.api",
    "plan": "halfbyte.run.api",
    "train": "halfbyte.run.api",
}


class _Verb(ModuleType):
    """A package that is also a verb: `hb.train(config)` trains, `halfbyte.train.loop` is the loop."""

    def __call__(self, *args: Any, **values: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(_VERBS[name]), name)(*args, **values)


class _Package(ModuleType):
    """Python binds a sub-package's name here when it is first imported: that is when it learns to be called."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and type(value) is ModuleType:
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return import_module(f"halfbyte.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'halfbyte' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
