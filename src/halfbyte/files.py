"""Files that are either whole or not there: temporary name, fsync, rename, fsync of the folder."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from halfbyte.errors import DoesNotFit


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


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
