"""The package as users get it: one wheel a platform, and an install where there is no compiler."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="no cmake or ninja here"),
]


def build(folder: Path, **environment: str) -> Path:
    """A wheel of this checkout, built in `folder` with what is installed."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    command += ["-C", f"build-dir={folder / 'build'}", str(ROOT)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def tell(wheel: Path, folder: Path) -> str:
    """What `ops.backend()` says of an unpacked wheel."""
    zipfile.ZipFile(wheel).extractall(folder)
    # -S: no site-packages of this environment's editable install, whose import hook would come first.
    code = "import sys; sys.path[:0] = sys.argv[1:]; from halfbyte import ops; print(ops.__file__, ops.backend())"
    paths = [str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return subprocess.run(
        [sys.executable, "-S", "-c", code, *paths], capture_output=True, text=True, check=True, cwd=folder
    ).stdout


@pytest.mark.skipif(shutil.which("c++") is None and "CXX" not in os.environ, reason="no C++ compiler here")
def test_a_wheel_fits_every_python_of_its_platform(tmp_path):
    wheel = build(tmp_path)
    assert wheel.name.startswith("halfbyte-")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if "halfbyte_native" in name and name.startswith("halfbyte/ops/")]
    assert not [name for name in names if name.startswith(("tests", "csrc"))]
    said = tell(wheel, tmp_path / "unpacked")
    assert str(tmp_path) in said
    assert "the best of this processor" in said


def test_without_a_compiler_it_installs_and_says_so(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        found = shutil.which(tool)
        assert found is not None
        (tools / tool).symlink_to(found)
    wheel = build(tmp_path, PATH=str(tools), CXX="", CC="")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "halfbyte_native" in name]
    assert "reference (halfbyte was installed without its native library" in tell(wheel, tmp_path / "unpacked")
