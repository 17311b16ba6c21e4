"""OpenMP's threads sleep while they wait, in a real process, before torch is loaded."""

import os
import subprocess
import sys

import pytest

from halfbyte.cli import wait_without_spinning


@pytest.mark.parametrize("own", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_chose_stays(own: str) -> None:
    environment = {own: "ACTIVE"}
    wait_without_spinning(environment)
    assert environment == {own: "ACTIVE"}


def test_the_policy_is_set_before_torch_reads_it() -> None:
    code = (
        "import sys, os\n"
        "from halfbyte.cli import main\n"
        "assert 'torch' not in sys.modules\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "import torch\n"
        "print(os.environ['OMP_WAIT_POLICY'])\n"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "PASSIVE"
