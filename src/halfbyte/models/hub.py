"""Models from the Hugging Face Hub, through huggingface_hub and its cache.

Only what a model needs is fetched (safetensors, configs, tokenizer), never a pickle and never code. The
files are listed and the disk is checked before the first byte, and whatever goes wrong is one line.
"""

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import huggingface_hub
from huggingface_hub import errors

from halfbyte.errors import DoesNotFit, HalfbyteError, UsageError
from halfbyte.files import require_free_space, write_atomic

log = logging.getLogger(__name__)

_PART = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"{_PART}(/{_PART}(/[\w./ -]+\.gguf)?)?")
Part = Literal["all", "config", "tokenizer"]
_CONFIG = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
)
_NEEDED = ("*.safetensors", "model.safetensors.index.json", *_CONFIG, *_TOKENIZER)
_PARTS: dict[Part, tuple[str, ...]] = {"all": _NEEDED, "config": _CONFIG, "tokenizer": (*_CONFIG, *_TOKENIZER)}
_NOT_NEEDED = ("*/*", "consolidated*", "adapter_*")  # folders hold other formats; Mistral repeats itself in one file
_PICKLE = re.compile(r"[^/]+\.(bin|pt|pth|ckpt)")
HTTP_ERROR: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # httpx's root error, whichever httpx the hub uses


@dataclass(frozen=True)
class Download:
    """A folder (or one GGUF file) in the Hub's cache, and the commit that it is."""

    path: Path
    revision: str | None


def is_hub_id(model: str) -> bool:
    """Whether `model` can be a Hub id ("owner/name", "name") or a GGUF file in one ("owner/name/file.gguf")."""
    return _HUB_ID.fullmatch(model) is not None and ".." not in model


def download(model: str, revision: str | None = None, cache: Path | None = None, part: Part = "all") -> Download:
    """Bring `model` to this machine, or find it in the cache; see `open_source`.

    part   "config": its config.json, whatever its weights are; "tokenizer": that and the tokenizer's files

    Offline (HF_HUB_OFFLINE=1), or where the Hub cannot be reached, the cached copy is used if there is one.
    Raises UsageError (not there, gated, pickles only), DoesNotFit (disk) or HalfbyteError (network).
    """
    repo, _, file = _split(model)
    folder = Path(cache or huggingface_hub.constants.HF_HUB_CACHE).expanduser()
    if huggingface_hub.is_offline_mode():
        return _cached(repo, file, revision, folder, "HF_HUB_OFFLINE is set", part)
    with _one_line(repo, revision):
        try:
            info = api().model_info(repo, revision=revision, files_metadata=True)
        except errors.HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
            return _cached(repo, file, revision, folder, f"the Hub answers {error.response.status_code}", part)
        except HTTP_ERROR as error:
            return _cached(repo, file, revision, folder, f"the Hub cannot be reached ({error})", part)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        wanted = [file] if file else _choose(repo, sizes, part)
        if file and file not in sizes:
            raise UsageError(f"{repo} has no file {file} on the Hub{_gguf_hint(repo, sizes)}")
        _check_disk(repo, info.sha, wanted, sizes, folder)
        path = Path(
            huggingface_hub.snapshot_download(
                repo, revision=info.sha, cache_dir=folder, allow_patterns=wanted, endpoint=_endpoint()
            )
        )
        if revision is None or revision != info.sha:
            _remember(folder, repo, revision or "main", str(info.sha))
    return Download(path / file if file else path, info.sha)


def _split(model: str) -> tuple[str, str, str]:
    parts = model.split("/", 2)
    return ("/".join(parts[:2]), "/", parts[2]) if len(parts) == 3 else (model, "", "")


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def api() -> huggingface_hub.HfApi:
    """huggingface_hub's client, for HF_ENDPOINT as it is now (the library reads it once, when it is imported)."""
    return huggingface_hub.HfApi(endpoint=_endpoint())


def _choose(repo: str, sizes: dict[str, int], part: Part) -> list[str]:
    """The files to fetch, or why there is nothing to fetch."""
    wanted = sorted(name for name in sizes if _matches(name, _PARTS[part]) and not _matches(name, _NOT_NEEDED))
    if part != "all" and "config.json" in sizes:
        return wanted
    if any(name.endswith(".safetensors") for name in wanted):
        if "config.json" in sizes:
            return wanted
        raise UsageError(f"{repo} on the Hub has no config.json: it is not a transformers model")
    if "adapter_config.json" in sizes:
        raise UsageError(f"{repo} on the Hub is an adapter: give its base as model, and the adapter as adapter_path")
    if hint := _gguf_hint(repo, sizes):
        raise UsageError(f"{repo} on the Hub holds GGUF files{hint}")
    if pickles := sorted(name for name in sizes if _PICKLE.fullmatch(name)):
        raise UsageError(
            f"{repo} on the Hub has its weights only as pickles ({pickles[0]}), which can run code and are never "
            "loaded: choose a model with safetensors"
        )
    raise UsageError(f"{repo} on the Hub has no weights in safetensors")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _gguf_hint(repo: str, sizes: dict[str, int]) -> str:
    files = sorted(name for name in sizes if name.endswith(".gguf"))
    return f": name one, for example {repo}/{files[0]}" if files else ""


def _check_disk(repo: str, sha: str | None, wanted: list[str], sizes: dict[str, int], folder: Path) -> None:
    have = _repo_folder(folder, repo) / "snapshots" / str(sha)
    missing = sum(sizes[name] for name in wanted if not (have / name).exists())
    if missing:
        require_free_space(folder, missing, f"downloading {repo}")


def _repo_folder(folder: Path, repo: str) -> Path:
    return folder / "--".join(["models", *repo.split("/")])


def _remember(folder: Path, repo: str, revision: str, sha: str) -> None:
    """Note which commit a branch was, as the cache itself does, so that the model is found offline by that name."""
    ref = _repo_folder(folder, repo) / "refs" / revision
    write_atomic(ref, sha)


def _cached(repo: str, file: str, revision: str | None, folder: Path, why: str, part: Part) -> Download:
    """The copy in the cache; the message says why the Hub was not asked."""
    try:
        found = huggingface_hub.snapshot_download(
            repo,
            revision=revision,
            cache_dir=folder,
            local_files_only=True,
            allow_patterns=[file] if file else list(_PARTS[part]),
            ignore_patterns=None if file else list(_NOT_NEEDED),
        )
    except (OSError, ValueError):
        found = None
    path = None if found is None else Path(found, file) if file else Path(found)
    if path is None or not (path.exists() if file else _holds(path, part)):
        wanted = f"{repo} at revision {revision}" if revision else repo
        raise UsageError(
            f"{wanted} is not in the cache ({folder}) and {why}: connect once to download it, or give a local folder"
        )
    log.warning("%s: using the copy in the cache, since %s", repo, why)
    return Download(path, Path(str(found)).name)


def _holds(folder: Path, part: Part) -> bool:
    """Whether a snapshot has what was asked for: a plan leaves one behind that has no weights."""
    return (folder / "config.json").is_file() and (part != "all" or any(folder.glob("*.safetensors")))


@contextmanager
def _one_line(repo: str, revision: str | None) -> Iterator[None]:
    """The Hub's many exceptions, each as one sentence that says what to do."""
    try:
        yield
    except HalfbyteError:
        raise
    except errors.GatedRepoError:
        raise UsageError(
            f"{repo} is gated on the Hub: accept its conditions at {page(repo)}, then log in with `hf auth login` "
            "(or set HF_TOKEN)"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UsageError(
            f"{repo} is neither a folder here nor a model on the Hub that you may see: check the spelling at "
            f"{page(repo)}; for a private model log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{repo} has no revision {revision!r} on the Hub: see {page(repo)}/tree/main") from None
    except errors.HFValidationError as error:
        raise UsageError(f"{repo} is neither a folder here nor a Hub id: {error}") from None
    except (OSError, HTTP_ERROR) as error:
        raise _network_or_disk(repo, error) from error


def _network_or_disk(repo: str, error: Exception) -> HalfbyteError:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFit(
            f"downloading {repo}: the disk of {huggingface_hub.constants.HF_HUB_CACHE} is full; free some space, or "
            "set HF_HOME to a folder on another disk, and run again (it continues)"
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return HalfbyteError(f"downloading {repo} failed: {first}; run again (it continues where it stopped)")


def page(repo: str) -> str:
    """The web page of a repository."""
    return f"{_endpoint() or huggingface_hub.constants.ENDPOINT}/{repo}"
