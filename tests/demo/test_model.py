"""Joining the demo's model from installed packages: a wheel's layout, small pieces, and each way it can fail."""

import base64
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from halfbyte.demo import model
from halfbyte.demo.model import GEMMA, Pieces, cache_folder, demo_model, find_pieces
from halfbyte.errors import DoesNotFit, HalfbyteError, UsageError

CONTENT = (b"first piece|", b"second|", b"third and last")
WHOLE = b"".join(CONTENT)
SMALL = Pieces(
    name="small.gguf",
    packages=tuple(f"small-gguf-part{i}" for i in (1, 2, 3)),
    version="1.0.0",
    nbytes=len(WHOLE),
    sha256=hashlib.sha256(WHOLE).hexdigest(),
)


def install(site: Path, package: str, version: str, data: dict[str, bytes]) -> None:
    """Lay a package into `site` as pip lays a wheel: the files, and a .dist-info folder with METADATA and RECORD."""
    module = package.replace("-", "_")
    info = site / f"{module}-{version}.dist-info"
    files = {f"{module}/__init__.py": b"raise RuntimeError('nobody imports the package')\n"}
    files |= {f"{module}/data/{name}": content for name, content in data.items()}
    files[f"{info.name}/METADATA"] = f"Metadata-Version: 2.4\nName: {package}\nVersion: {version}\n".encode()
    record = []
    for name, content in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(content)}")
    (info / "RECORD").write_text("\n".join([*record, f"{info.name}/RECORD,,", ""]))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages with the three small pieces, and a cache of its own."""
    folder = tmp_path / "site"
    for number, (package, content) in enumerate(zip(SMALL.packages, CONTENT, strict=True)):
        install(folder, package, SMALL.version, {f"small.gguf.part{number:02}": content})
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_pieces_are_joined_in_order(site: Path, tmp_path: Path) -> None:
    path = demo_model(SMALL)
    assert path == tmp_path / "cache" / "models" / "small.gguf"
    assert path.read_bytes() == WHOLE
    assert [piece.read_bytes() for piece in find_pieces(SMALL)] == list(CONTENT)
    assert not list(path.parent.glob("*.partial"))


def test_no_package_is_imported(site: Path) -> None:
    demo_model(SMALL)
    assert not [name for name in sys.modules if name.startswith("small_gguf")]


def test_a_second_call_neither_joins_nor_hashes(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = demo_model(SMALL)
    shutil.rmtree(site)
    monkeypatch.setattr(model, "sha256_file", lambda _: pytest.fail("hashed again"))
    assert demo_model(SMALL) == path


def test_a_lost_stamp_costs_one_hash_and_no_join(site: Path) -> None:
    path = demo_model(SMALL)
    stamp = path.with_name(path.name + ".checked.json")
    before = path.stat().st_mtime_ns
    for content in (None, "", "{half", "[]"):
        stamp.unlink()
        if content is not None:
            stamp.write_text(content)
        assert demo_model(SMALL).stat().st_mtime_ns == before
        assert json.loads(stamp.read_text())["sha256"] == SMALL.sha256


@pytest.mark.parametrize("damage", [b"", WHOLE[:-1], b"X" + WHOLE[1:]], ids=["empty", "short", "same size"])
def test_a_damaged_file_is_made_again(site: Path, damage: bytes) -> None:
    path = demo_model(SMALL)
    path.write_bytes(damage)
    os.utime(path, ns=(1, 1))  # a coarse clock must not hide the write from the stamp's time
    assert demo_model(SMALL).read_bytes() == WHOLE


def test_what_a_killed_run_left_is_overwritten(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "models"
    folder.mkdir(parents=True)
    (folder / "small.gguf.partial").write_bytes(b"half a fi")
    (folder / "small.gguf.lock").touch()
    assert demo_model(SMALL).read_bytes() == WHOLE


def test_two_at_once_both_get_the_whole_file(site: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(demo_model(SMALL).read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [WHOLE] * 8


def test_a_missing_package_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"small-gguf-part1 is missing\): run python -m pip install") as raised:
        demo_model(SMALL)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_another_version_is_refused(site: Path) -> None:
    shutil.rmtree(site / "small_gguf_part2-1.0.0.dist-info")
    install(site, "small-gguf-part2", "2.0.0", {"small.gguf.part01": CONTENT[1]})
    with pytest.raises(UsageError, match=r"small-gguf-part2 2\.0\.0 is installed, but the demo needs 1\.0\.0"):
        demo_model(SMALL)


@pytest.mark.parametrize("skips_missing", [False, True])
def test_a_deleted_piece_is_named(site: Path, monkeypatch: pytest.MonkeyPatch, skips_missing: bool) -> None:
    """Also where a package's files are only those that are there, as from Python 3.12 on."""
    if skips_missing:
        monkeypatch.setattr(importlib.metadata.PathDistribution, "files", [])
    (site / "small_gguf_part3" / "data" / "small.gguf.part02").unlink()
    with pytest.raises(UsageError, match=r"small_gguf_part3/data/small\.gguf\.part02 is gone: run .*gguf-part3=="):
        demo_model(SMALL)


def test_a_package_without_a_piece_is_named(site: Path) -> None:
    shutil.rmtree(site / "small_gguf_part1-1.0.0.dist-info")
    install(site, "small-gguf-part1", "1.0.0", {"README.txt": b""})
    with pytest.raises(HalfbyteError, match=r"small-gguf-part1 1\.0\.0 should carry one piece of a GGUF"):
        demo_model(SMALL)


def test_wrong_content_is_not_kept(site: Path, tmp_path: Path) -> None:
    (site / "small_gguf_part2" / "data" / "small.gguf.part01").write_bytes(b"SECOND|")
    with pytest.raises(HalfbyteError, match=r"join to a file with SHA-256 .*, expected .*force-reinstall"):
        demo_model(SMALL)
    assert {path.name for path in (tmp_path / "cache" / "models").iterdir()} == {"small.gguf.lock"}


def test_a_full_disk_is_said_before_writing(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3))
    with pytest.raises(DoesNotFit, match="the demo's model needs"):
        demo_model(SMALL)


def test_a_cache_that_cannot_be_written_names_the_way_out(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="set HALFBYTE_CACHE"):
        demo_model(SMALL)


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALFBYTE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "halfbyte"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_folder() == tmp_path / ".cache" / "halfbyte"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "halfbyte"
    monkeypatch.setenv("HALFBYTE_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_the_demo_extra_installs_what_the_code_looks_for() -> None:
    """pyproject.toml and this module name the same packages at the same version."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["demo"] == [f"{package}=={GEMMA.version}" for package in GEMMA.packages]
