"""One writer: living, dead, recycled, foreign and torn locks."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.train.lock import Lock, Owner, alive, read_owner


def put(path: Path, **changes: Any) -> None:
    me = Owner.me()
    fields = {"pid": me.pid, "started": me.started, "host": me.host} | changes
    path.write_text(json.dumps({"schema_version": 1, **fields}))


def test_held_and_released(tmp_path: Path) -> None:
    path = tmp_path / "run" / "run.lock"
    with Lock(path):
        assert alive(path) == Owner.me()
        with pytest.raises(UsageError, match=rf"being written by process {os.getpid()} on"):
            Lock(path).acquire()
    assert not path.exists()
    assert alive(path) is None


def test_a_living_process_keeps_it_and_a_killed_one_loses_it(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        put(path, pid=child.pid, started=psutil.Process(child.pid).create_time())
        with pytest.raises(UsageError, match=f"process {child.pid}"):
            Lock(path).acquire()
    finally:
        child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert alive(path) is None  # dead, though nobody has asked for its exit status yet
    child.wait()
    with Lock(path) as lock:
        assert alive(path) == lock.owner == Owner.me()


def test_a_recycled_process_id_is_nobody(tmp_path: Path) -> None:
    put(tmp_path / "lock", started=Owner.me().started - 1000)
    assert alive(tmp_path / "lock") is None


def test_another_machine_lives_while_it_touches(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    put(path, host="elsewhere", pid=1)
    assert alive(path) is not None
    with pytest.raises(UsageError, match="on elsewhere"):
        Lock(path).acquire()
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    assert alive(path) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1}'])
def test_a_torn_lock_is_nobodys(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    assert alive(tmp_path / "lock") is None
    with Lock(tmp_path / "lock"):
        assert alive(tmp_path / "lock") == Owner.me()


def test_a_stolen_lock_is_noticed_and_left_alone(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "lock")
    lock.acquire()
    lock.touch()
    put(tmp_path / "lock", host=socket.gethostname(), pid=os.getppid())
    with pytest.raises(HalfbyteError, match="taken over"):
        lock.touch()
    lock.release()
    assert read_owner(tmp_path / "lock") is not None


def _grab(path: Path, barrier: Any, won: Any) -> None:
    barrier.wait()
    try:
        Lock(path).acquire()
    except UsageError:
        return
    with won.get_lock():
        won.value += 1
    time.sleep(1.0)


def test_of_many_that_find_a_dead_lock_one_wins(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.train.tiny"])
    put(tmp_path / "lock", started=1.0)
    barrier, won = processes.Barrier(4), processes.Value("i", 0)
    children = [processes.Process(target=_grab, args=(tmp_path / "lock", barrier, won)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert won.value == 1
