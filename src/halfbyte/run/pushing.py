"""`halfbyte push`: what a run, an adapter or an exported folder says about where it came from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfbyte.adapters.peft_io import CONFIG as ADAPTER_CONFIG
from halfbyte.adapters.peft_io import read_adapter_config
from halfbyte.errors import UsageError
from halfbyte.export.push import PushOptions, check_repo
from halfbyte.export.uploads import Model, Origin, collect
from halfbyte.models.hub import is_hub_id
from halfbyte.run import folder
from halfbyte.train.run_directory import CONFIG, RESULT, running


def collect_target(name: str, repo: str, options: PushOptions) -> Model:
    """The model that `name` points at, ready for `export.push`. UsageError for an unfinished run."""
    check_repo(repo)
    if options.base_model is not None and (not is_hub_id(options.base_model) or options.base_model.count("/") > 1):
        raise UsageError(f"--base-model {options.base_model}: not a Hub id such as Qwen/Qwen3-0.6B")
    path = Path(name).expanduser()
    return collect(path, _origin(path, options.base_model))


def _origin(path: Path, base_model: str | None) -> Origin:
    if (path / CONFIG).is_file():
        return _of_run(path, base_model)
    if (path / ADAPTER_CONFIG).is_file() and base_model is None:
        named = read_adapter_config(path).get("base_model_name_or_path")
        if isinstance(named, str) and is_hub_id(named) and not Path(named).exists():
            base_model = "/".join(named.split("/")[:2])
    return Origin(base_model)


def _of_run(path: Path, base_model: str | None) -> Origin:
    config, record = folder.read_config(path)
    if running(path) is not None:
        raise UsageError(f"{path} is still running: push it when it has finished")
    if not (path / RESULT).is_file():
        raise UsageError(f"{path} is not finished: `halfbyte resume {path}`, or push one of its checkpoint folders")
    recorded = record.get("base_model") or {}
    from_hub = recorded.get("kind") == "hub" or recorded.get("revision") is not None
    if base_model is None and from_hub and is_hub_id(config.model):
        base_model = "/".join(config.model.split("/")[:2])
    here = {text: Path(text).name for text in _texts(config.model_dump(mode="json")) if _is_local(text)}
    if not from_hub:
        model = Path(config.model)
        here[config.model] = base_model or model.name
        here[f'"{model.parent}", gguf_file='] = '"path/to/its/folder", gguf_file='
    method = config.method
    return Origin(base_model, here, ("halfbyte", method))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _is_local(text: str) -> bool:
    """An absolute path, or a relative one that leads out of the run's own folder."""
    return text.startswith(("/", "~/", "../")) and Path(text).name != ""
