"""An output folder appears whole, or not at all."""

import errno
import os
from pathlib import Path

import pytest

from halfbyte.errors import DoesNotFit, HalfbyteError
from halfbyte.export.folder import new_folder


def test_it_appears_at_the_end_with_its_files(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert out.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_or_an_interruption_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")

    def fill(error: BaseException) -> None:
        with new_folder(out) as folder:
            (folder / "new").write_text("2")
            raise error

    for error in (RuntimeError("no"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            fill(error)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [path.name for path in out.iterdir()] == ["old"]
    with pytest.raises(DoesNotFit, match=r"the disk became full while .*out was written"):
        fill(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(HalfbyteError, match=r"could not be written: .*: Input/output error"):
        fill(OSError(errno.EIO, os.strerror(errno.EIO)))


def test_it_takes_the_place_of_the_old_one_and_follows_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "old").write_text("1")
    link.symlink_to(real)
    with new_folder(link) as folder:
        (folder / "new").write_text("2")
    assert [path.name for path in real.iterdir()] == ["new"]
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_parent_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    with pytest.raises(HalfbyteError, match=r"could not be written: .*file"), new_folder(tmp_path / "file" / "out"):
        pass
