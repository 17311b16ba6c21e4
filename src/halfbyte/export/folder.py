"""An output folder that is either whole or not there, and never takes another's place without being asked."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from halfbyte.errors import UsageError
from halfbyte.files import fsync, fsync_folder, one_line, take_place


def check_output(out: Path, overwrite: bool, keep: tuple[Path, ...] = (), marker: str = "config.json") -> None:
    """UsageError unless a model folder may be written at `out`.

    An empty folder is fine. A full one is replaced only with `overwrite`, only if it is what it should be (it has the
    file `marker`: a model's config.json), and never if it is, or holds, one of `keep` (the inputs).
    """
    target = out.resolve()
    for path in (p.resolve() for p in keep):
        if path == target or target in path.parents:
            raise UsageError(f"{out} holds what is read ({path}): choose another output folder")
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file: choose another output folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{out} exists and is not empty: choose another folder, or replace it with --overwrite")
    if not (out / marker).is_file():
        what = "a model folder" if marker == "config.json" else "an export"
        raise UsageError(f"{out} is not {what} (it has no {marker}), so it is not overwritten: remove it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` to fill; it takes `out`'s place once everything in it is on the disk.

    Where the block raises, nothing is left and what was at `out` is as it was.
    """
    out = out.resolve()
    with one_line(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.", suffix=".partial"))
    with one_line(out), _removed_unless_done(temporary):
        yield temporary
        temporary.chmod(0o755)
        for path in sorted(temporary.rglob("*")):
            fsync(path)
        fsync_folder(temporary)
        take_place(temporary, out, temporary.with_suffix(".old"))


@contextmanager
def _removed_unless_done(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
