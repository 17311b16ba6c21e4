"""Feeds the parsers of other people's files with damaged ones: GGUF, safetensors folders, adapters, tokenizers, Ollama.

    python tests/fuzz.py --seconds 600 --seed 1            (`make fuzz`)
    python tests/fuzz.py --seed 1 --reproduce 12345        one case again, its traceback, its files in ./fuzz-1-12345

Each case starts from a valid tiny file, damages it (`fuzz_mutate.py`) and does with it what halfbyte does
(`fuzz_targets.py`). Allowed is success, or a HalfbyteError of one printable line. Everything else is a finding: another
exception, a crash, more than 5 seconds of computing, more memory than a limit. Cases run in a worker process with that
limit, which is started again after a crash or a hang. A case is a function of the seed and its number.
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
HANG_SECONDS = 5.0  # of computing, whoever else uses the machine
START_SECONDS = 300.0
MEMORY = 400_000_000  # bytes above what the worker needs to begin with
CASES_OF_A_WORKER = 4000  # what caches keep and the heap loses must not become a finding


@dataclass
class Result:
    """What a session came to: cases and those that were accepted by target, findings by where they are."""

    cases: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    findings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, finding: dict[str, Any]) -> None:
        known = self.findings.setdefault(finding["where"], finding | {"count": 0})
        known["count"] += 1

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count:,} ({self.accepted[name]:,} accepted)" for name, count in self.cases.items())
        lines = [f"{self.cases.total():,} cases: {counts}; {len(self.findings)} findings"]
        for where, found in self.findings.items():
            lines.append(f"  {found['count']:>5} x {where}: {found['what'][:200]}  (--reproduce {found['case']})")
        return "\n".join(lines)


# -- the worker -------------------------------------------------------------------------------------------------------


def case_of(seed: int, number: int, corpus: dict[str, list[Any]]) -> tuple[str, dict[str, bytes]]:
    """The target's name and the damaged files of a case."""
    from tests.fuzz_mutate import mutate

    chance = random.Random(f"{seed} {number}")
    name = sorted(corpus)[number % len(corpus)]
    return name, mutate(chance.choice(corpus[name]), chance)


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def work(seed: int, start: int, stop: int, names: list[str], folder: Path) -> None:
    """Cases from `start` on, until killed. `folder/now` is the case at hand, `folder/log` has a line for each done."""
    import torch

    from tests.fuzz_targets import TARGETS, run

    torch.set_num_threads(1)
    targets = {target.name: target for target in TARGETS if not names or target.name in names}
    corpus = {name: target.seeds() for name, target in targets.items()}
    for name, target in targets.items():  # imports and caches what they need, and shows that the seeds are valid
        for files in corpus[name]:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                write_files(Path(place), files)
                run(target, Path(place))
    limit = psutil.Process().memory_info().data + MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    now = os.open(folder / "now", os.O_WRONLY | os.O_CREAT)
    with (folder / "log").open("a", buffering=1) as log:
        for number in range(start, min(stop, start + CASES_OF_A_WORKER)):
            os.pwrite(now, b"%20d" % number, 0)  # in place: whoever reads it never finds half a number
            name, files = case_of(seed, number, corpus)
            place = folder / "case"
            shutil.rmtree(place, ignore_errors=True)
            write_files(place, files)
            try:
                accepted = not run(targets[name], place)
                line: dict[str, Any] = {"case": number, "target": name, "accepted": accepted}
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # a panic of a Rust library is one too
                line = {"case": number, "target": name, "what": f"{type(error).__name__}: {error}"[:500]}
                line["where"] = f"{name}: {type(error).__name__} in {_where(error)}"
            log.write(json.dumps(line) + "\n")
    os._exit(0)  # with so little memory left, an interpreter cannot even end


def _where(error: BaseException) -> str:
    """The innermost line of halfbyte's own, and the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/halfbyte/" in frame.filename] or frames[-1:]
    place = f"{own[-1].filename.rpartition('/halfbyte/')[2]}:{own[-1].lineno} {own[-1].name}"
    return place if own[-1] is frames[-1] else f"{place} ({Path(frames[-1].filename).name} {frames[-1].name})"


# -- the parent -------------------------------------------------------------------------------------------------------


def session(seed: int, seconds: float, cases: int | None = None, names: list[str] | None = None) -> Result:
    """Run cases 0, 1, 2, … for so long, or so many."""
    result, number, end = Result(), 0, time.monotonic() + seconds
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as name:
        folder = Path(name)
        while time.monotonic() < end and (cases is None or number < cases):
            words = ["--worker", str(folder), "--start", str(number), "--cases", str(cases or 1 << 60)]
            command = [sys.executable, __file__, "--seed", str(seed), *words, *(names or [])]
            (folder / "now").unlink(missing_ok=True)
            quiet: Any = {"cwd": ROOT, "stdout": subprocess.DEVNULL}  # tokenizers prints what it does not know
            with (folder / "stderr").open("wb") as stderr, subprocess.Popen(command, stderr=stderr, **quiet) as worker:
                ended = _watch(worker, folder, end)
            done = _collect(folder, result)
            number = max(number, done + 1)
            if ended is not None:
                if not (folder / "now").exists():
                    raise RuntimeError(f"the worker did not start: {(folder / 'stderr').read_text()[-3000:]}")
                number = int((folder / "now").read_text())
                if number <= done:  # between two cases: this one is in the log
                    number += 1
                    continue
                kind = sorted(names or _names())[number % len(names or _names())]
                last = (folder / "stderr").read_text(errors="replace").strip().splitlines()[-1:] or [""]
                result.cases[kind] += 1
                result.add({"case": number, "where": f"{kind}: {ended}", "what": last[0]})
                number += 1
    return result


def _names() -> list[str]:
    from tests.fuzz_targets import TARGETS

    return [target.name for target in TARGETS]


def _watch(worker: "subprocess.Popen[bytes]", folder: Path, end: float) -> str | None:
    """Wait for the worker; why it ended before its time, or None. It is stopped at the end of the session."""
    process, since, at, began = psutil.Process(worker.pid), 0.0, "", time.monotonic()
    while worker.poll() is None:
        time.sleep(0.1)
        now = (folder / "now").read_text() if (folder / "now").exists() else ""
        try:
            used = sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            break
        if now != at:
            at, since = now, used
        hangs = used - since > HANG_SECONDS if at else time.monotonic() - began > START_SECONDS
        if hangs or (at and time.monotonic() > end):
            worker.kill()
            worker.wait()
            return "a hang" if hangs else None
    code = worker.wait()
    return None if code == 0 else f"a crash (exit code {code})"


def _collect(folder: Path, result: Result) -> int:
    """Add what the worker logged; the last case's number."""
    last = -1
    log = folder / "log"
    for text in log.read_text().splitlines() if log.exists() else []:
        line = json.loads(text)
        last = line["case"]
        result.cases[line["target"]] += 1
        result.accepted[line["target"]] += bool(line.get("accepted"))
        if "what" in line:
            result.add(line)
    log.unlink(missing_ok=True)
    return last


def reproduce(seed: int, number: int, names: list[str]) -> None:
    """Write the case's files beside the caller and run it without a net."""
    from tests.fuzz_targets import TARGETS, run

    targets = {target.name: target for target in TARGETS if not names or target.name in names}
    name, files = case_of(seed, number, {key: target.seeds() for key, target in targets.items()})
    folder = Path(f"fuzz-{seed}-{number}")
    write_files(folder, files)
    print(f"{name}: {folder}")
    for error in run(targets[name], folder):
        print(f"  {type(error).__name__}: {error}")


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all by default")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reproduce", type=int, metavar="CASE")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    sys.path[:0] = [str(ROOT)]
    if given.worker:
        work(given.seed, given.start, given.cases, given.targets, Path(given.worker))
        return 0
    if given.reproduce is not None:
        reproduce(given.seed, given.reproduce, given.targets)
        return 0
    result = session(given.seed, given.seconds, given.cases, given.targets)
    print(result)
    return 1 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
