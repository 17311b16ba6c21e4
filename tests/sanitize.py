"""Run the native tests against a library built with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [pytest arguments]         (`make sanitize`)

Builds into build/sanitize, by cmake alone, and leaves the installed library as it is: HALFBYTE_LIBRARY names this one.
Python itself is not built with the sanitizer, so that its runtime is preloaded; leaks are not looked for, because the
interpreter keeps memory to its end. The first finding ends the process, with the place in `csrc/`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
ENGINE = ["tests/models/test_attention.py", "tests/models/test_blocks.py", "tests/models/test_rope.py"]
ENGINE += ["tests/models/test_decoder.py", "tests/adapters/test_lora.py"]
TESTS = ["tests/ops", "tests/quant", "tests/linear", "tests/optim", *ENGINE, "-m", "not slow"]


def build(folder: Path = BUILD) -> Path:
    """The library, built where a source is newer than it."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-DHB_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    for command in ([*configure, *generator], ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return folder / "libhalfbyte_native.so"


def runtime(library: Path) -> list[str]:
    """The sanitizers' own libraries that this build wants, by path, for LD_PRELOAD."""
    cache = (library.parent / "CMakeCache.txt").read_text()
    lines = [line for line in cache.splitlines() if line.startswith("CMAKE_CXX_COMPILER:")]
    compiler = lines[0].partition("=")[2]
    found = []
    for name in ("libasan.so", "libubsan.so", "libclang_rt.asan-x86_64.so"):
        said = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        path = Path(said.stdout.strip())
        if path.is_absolute():
            found.append(str(path.resolve()))
    if not found:
        sys.exit(f"{compiler} has no AddressSanitizer")
    return found


def environment(library: Path) -> dict[str, str]:
    return os.environ | {
        "HALFBYTE_LIBRARY": str(library),
        "LD_PRELOAD": ":".join(runtime(library)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def main(words: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *(words or TESTS)]
    return subprocess.run(command, cwd=ROOT, env=environment(build()), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
