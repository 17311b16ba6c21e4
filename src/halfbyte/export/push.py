"""Uploading a model to the Hugging Face Hub: in one commit, private unless asked, over nobody's model.

    push(collect(path), "user/name")    create the repository where it is missing, compare with what is there, upload

The protocol is huggingface_hub's. An upload that broke is continued by repeating it: what has arrived stays there.
`export.uploads` says what is uploaded.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors
from pydantic import Field

from halfbyte.adapters.peft_io import CONFIG as ADAPTER_CONFIG
from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.export.safetensors_file import INDEX
from halfbyte.export.uploads import Model
from halfbyte.models import hub
from halfbyte.options import Options

_WEIGHTS = re.compile(r".+\.(safetensors|gguf|bin|pt|pth|ckpt)")
_BELONGS_TO_WEIGHTS = (INDEX, "config.json", ADAPTER_CONFIG)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class PushOptions(Options):
    """How a model goes to the Hub."""

    public: bool = Field(default=False, description="create the repository for everyone to see (else it is private)")
    revision: str = Field(default="main", min_length=1, description="branch to upload to; it is created if missing")
    message: str = Field(default="Upload from halfbyte", min_length=1, description="the commit's message")
    base_model: str | None = Field(
        default=None, description="Hub id of the base model for the card, where the run knows only a file of it"
    )
    overwrite: bool = Field(default=False, description="replace another model that the repository holds")
    dry_run: bool = Field(default=False, description="only say what would be uploaded; nothing is sent")


@dataclass(frozen=True)
class Pushed:
    """What is on the Hub now. `commit` is None after a dry run."""

    repo: str
    url: str
    revision: str
    private: bool
    commit: str | None
    model: Model
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "repo": self.repo,
            "url": self.url,
            "revision": self.revision,
            "private": self.private,
            "commit": self.commit,
            "kind": self.model.kind,
            "files": [{"name": upload.name, "bytes": upload.nbytes} for upload in self.model.uploads],
            "notes": list(self.notes),
        }


def check_repo(repo: str) -> None:
    """UsageError unless `repo` is owner/name."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or len(repo) > 128 or repo.endswith(".git"):
        raise UsageError(f"{repo!r} is not a repository's name: give user/name, of letters, digits, '.', '_' and '-'")


def push(model: Model, repo: str, options: PushOptions | None = None) -> Pushed:
    """Upload `model` to `repo` ("user/name"), made if it is missing; one commit, so that it is there whole or not.

    Raises UsageError where there is no valid token, no right to write, or another model in the repository that
    `overwrite` does not give up; HalfbyteError where the network or the Hub fails, to be repeated.
    """
    options = options or PushOptions()
    check_repo(repo)
    url = hub.page(repo)
    if options.dry_run:
        return Pushed(repo, url, options.revision, not options.public, None, model, model.notes)
    api, notes = hub.api(), list(model.notes)
    with _one_line(repo):
        api.whoami()
        there, private, branch_exists = _look(api, repo, options)
        doomed: list[str] = []
        if there is None:
            api.create_repo(repo, private=not options.public, exist_ok=True)
            private = not options.public
        else:
            _check_visibility(repo, private, options, notes)
            doomed = _make_room(repo, model, there, options.overwrite or not branch_exists)
        if options.revision != "main" and not branch_exists:
            api.create_branch(repo, branch=options.revision, exist_ok=True)
        commit = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(upload.name, upload.content) for upload in model.uploads),
                *(CommitOperationDelete(name) for name in doomed),
            ],
            commit_message=options.message,
            revision=options.revision,
        )
    if doomed:
        notes.append(f"removed of the model that was there: {', '.join(doomed)}")
    return Pushed(repo, url, options.revision, private, str(commit.oid), model, tuple(notes))


def _look(api: Any, repo: str, options: PushOptions) -> tuple[dict[str, Any] | None, bool, bool]:
    """(the repository's files by name, None where it is missing; whether it is private; whether the branch exists)."""
    try:
        info = api.model_info(repo, revision=options.revision, files_metadata=True)
    except errors.RevisionNotFoundError:
        info = api.model_info(repo, files_metadata=True)
        return {s.rfilename: s for s in info.siblings or ()}, bool(info.private), options.revision == "main"
    except errors.RepositoryNotFoundError:
        return None, True, options.revision == "main"
    return {s.rfilename: s for s in info.siblings or ()}, bool(info.private), True


def _check_visibility(repo: str, private: bool, options: PushOptions, notes: list[str]) -> None:
    if not private and not options.public:
        raise UsageError(f"{repo} is there and everyone can see it: say --public to upload to it, or choose another")
    if private and options.public:
        notes.append(f"{repo} was there and stays private: its settings on the Hub make it public")


def _make_room(repo: str, model: Model, there: Mapping[str, Any], may_replace: bool) -> list[str]:
    """The files of the repository to remove, so that one model is in it. UsageError if that is another's.

    The same weights may be uploaded again (an upload that broke, a better card), and GGUF files lie beside others.
    """
    ours = {upload.name: upload for upload in model.uploads}
    weights = [name for name in there if _WEIGHTS.fullmatch(name)]
    if model.kind == "gguf":
        other = [name for name in weights if name in ours and not ours[name].is_at(there[name])]
    else:
        mine = [name for name in weights if not name.endswith(".gguf")]
        other = [name for name in mine if name not in ours or not ours[name].is_at(there[name])]
    if other and not may_replace:
        raise UsageError(
            f"{repo} holds another model ({other[0]} is not this one's): choose another name, or replace it with "
            "--overwrite"
        )
    stale = [*other, *(name for name in _BELONGS_TO_WEIGHTS if other and name in there and model.kind != "gguf")]
    return [name for name in stale if name not in ours]


@contextmanager
def _one_line(repo: str) -> Iterator[None]:
    """huggingface_hub's exceptions, each as one sentence that says what to do."""
    try:
        yield
    except HalfbyteError:
        raise
    except (OSError, ValueError, RuntimeError, hub.HTTP_ERROR) as error:
        # Uploads in threads are wrapped: "Error while uploading ..." from the one that says why.
        raise _explain(repo, error.__cause__ if type(error) is RuntimeError and error.__cause__ else error) from error


def _explain(repo: str, error: BaseException) -> HalfbyteError:
    tokens = f"{hub.page('settings/tokens')}"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return UsageError(
            f"not logged in to the Hub: `hf auth login` (or set HF_TOKEN), with a write token of {tokens}"
        )
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if status == 401:
        return UsageError(
            f"the Hub does not accept the token: log in again with `hf auth login`, a new token: {tokens}"
        )
    if status == 403:
        return UsageError(
            f"the token may not write to {repo}: take one with write permission ({tokens}), or another name"
        )
    if isinstance(error, ValueError) and "README.md" in str(error):
        return UsageError(f"the Hub refuses the card: {' '.join(str(error).split())}")
    said = getattr(error, "server_message", None) or next(iter(str(error).split("\n")), "")
    first = " ".join(str(said).split()) or type(error).__name__
    return HalfbyteError(
        f"uploading to {repo} failed: {first}; run the same command again (what the Hub has is not sent twice)"
    )
