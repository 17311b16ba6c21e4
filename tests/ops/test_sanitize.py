"""`make sanitize`: the native tests run clean under the sanitizers, which do find what is there to be found."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import sanitize

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="preloads the sanitizers' Linux libraries"),
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="no cmake or C++ compiler"),
]

WRONG = {
    "ERROR: AddressSanitizer": """
        out = torch.empty(63)
        library.hb_dequantize(codes.data_ptr(), absmax.data_ptr(), levels("nf4").data_ptr(), 64, 0, 64, out.data_ptr(),
                              2, None, None, None, 256)
    """,
    "runtime error: division by zero": """
        out = torch.empty(64)
        library.hb_dequantize(codes.data_ptr(), absmax.data_ptr(), levels("nf4").data_ptr(), 0, 0, 64, out.data_ptr(),
                              2, None, None, None, 256)
    """,
}


@pytest.fixture(scope="module")
def library() -> Path:
    return sanitize.build()


@pytest.mark.parametrize("finding", WRONG)
def test_the_sanitizers_find_mistakes(library: Path, finding: str) -> None:
    start = "import torch; from halfbyte.ops import native; from halfbyte.ops.levels import levels\n"
    start += "library = native.library(); codes, absmax = torch.zeros(32, dtype=torch.uint8), torch.ones(1)\n"
    lines = [line.strip() for line in WRONG[finding].strip().splitlines()]
    program = start + lines[0] + "\n" + " ".join(lines[1:])
    done = subprocess.run(
        [sys.executable, "-c", program], env=sanitize.environment(library), capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert finding in done.stderr
    assert "csrc/" in done.stderr


def test_the_native_tests_run_clean(library: Path) -> None:
    command = [sys.executable, str(Path(sanitize.__file__))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout
