"""Files that are either whole or not there: temporary name, fsync, rename, fsync of the folder.

    write_atomic(path, data)        a small file
    with new_file(path) as part     one that is written piece by piece; it takes its name at the end
    with new_files(folder) as part  several, into a folder that is there already (a run's)

`halfbyte.export.folder.new_folder` does the same for a whole folder. Where the disk is full or may not be written, the
user gets one line (`DoesNotFit`, `HalfbyteError`) and nothing is left. A process that is killed leaves at most hidden
files and folders with `.partial` in their names. `tests/kill.py` kills all writers at each of their file operations.
"""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.errors import DoesNotFit, HalfbyteError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust say errno: safetensors, tokenizers


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    fsync(folder)


def fsync(path: Path) -> None:
    """A file's content, or a folder's names, onto the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """What the disk refuses while `path` is written is told to the user, who can do something about it."""
    try:
        yield
    except OSError as error:
        raise _explain(path, error) from error
    except HalfbyteError:
        raise
    except Exception as error:
        said = _OS_ERROR.search(str(error))
        if said is None:
            raise
        raise _explain(path, OSError(int(said[1]), os.strerror(int(said[1])))) from error


def _explain(path: Path, error: OSError) -> HalfbyteError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFit(f"the disk became full while {path} was written: free some space and try again")
    where = error.filename2 or error.filename or path
    return HalfbyteError(f"{path} could not be written: {where}: {error.strerror or error}")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    with new_file(path) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """An empty temporary file beside `path` to write to; once it is on the disk it takes `path`'s place.

    Where the block raises, nothing is left and what was at `path` is as it was.
    """
    with one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
        os.close(fd)
        part = Path(name)
        try:
            yield part
            part.chmod(0o644)
            fsync(part)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder` to fill with files; each takes its place in `folder` when all are on the disk.

    Where the block raises, nothing is left and `folder` is as it was.
    """
    with one_line(folder):
        folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=folder, prefix=".files.", suffix=".partial"))
        try:
            yield part
            files = sorted(part.iterdir())
            for file in files:
                file.chmod(0o644)
                fsync(file)
            for file in files:
                file.replace(folder / file.name)
            fsync_folder(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def take_place(new: Path, out: Path, old: Path) -> None:
    """Rename the folder `new` to `out`; what is there steps aside to `old` and is removed when `new` is safe.

    Where that fails, both are as they were. Killed in between there is nothing at `out`, and `old` is whole.
    """
    if not out.exists():
        new.rename(out)
        fsync_folder(out.parent)
        return
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        new.rename(out)
        fsync_folder(out.parent)
    except BaseException:
        if not new.exists():
            out.rename(new)
        old.rename(out)
        raise
    shutil.rmtree(old)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_free_space(folder: Path, nbytes: int, what: str) -> None:
    """Raise DoesNotFit if the disk below `folder` cannot take `nbytes` more (plus 1 % of slack)."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < nbytes * 1.01:
        raise DoesNotFit(
            f"{what} needs {nbytes / 1e9:.2f} GB on the disk of {probe}, which has {free / 1e9:.2f} GB free: "
            "free some space or choose another folder"
        )
