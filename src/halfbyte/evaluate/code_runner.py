"""The child process that runs a model's program: `python -I -S code_runner.py PAYLOAD RESULT_FD`.

It imports nothing of halfbyte. It reads the payload (JSON: pieces, nonce, limits), deletes it, gives up what it can
give up, and runs the pieces one after the other in one namespace, each compiled by itself, so that an answer cannot
swallow the tests behind it. Only after the last has ended, and not by an exception, does it say the nonce to the pipe:
`sys.exit(0)`, `os._exit(0)` or a crash on the way is no success. The namespace is a module called `answer`, so that a
block under `if __name__ == "__main__"`, which would read input or run tests of its own, is left out as it is on import.

What is given up, in the order in which it is done; nothing of it is a wall against a program that means harm:

limits      CPU seconds, an alarm, address space, size of a file, open files, no core dump; everywhere
life        it ends with the process that started it; Linux
landlock    files are written in the working folder and nowhere else; Linux 5.13 and later
seccomp     no further process, no socket; no signal to others, nor a change of their limits, priority or memory; and
            changes of files' modes, owners, times and attributes, which Landlock does not know, are not carried out
            but said to be (shutil.copy makes some); Linux on x86-64 and ARM64
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from pathlib import Path
from typing import NamedTuple

EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
CLONE_THREAD = 0x00010000


class Calls(NamedTuple):
    """The numbers of system calls on one architecture, in the order of the comments below."""

    audit: int
    clone: int
    refused: tuple[int, ...]
    of_itself: tuple[int, ...]
    silent: tuple[int, ...]
    fcntl: int
    ioctl: int


ARCHITECTURES = {
    "x86_64": Calls(
        audit=0xC000003E,
        clone=56,
        # fork, vfork, ptrace, socket, tkill, setpriority, sched_setparam, sched_setscheduler, sched_setaffinity,
        # sched_setattr, ioprio_set, migrate_pages, move_pages, process_vm_readv, process_vm_writev
        refused=(57, 58, 101, 41, 200, 141, 142, 144, 203, 314, 251, 256, 279, 310, 311),
        # Their first argument is a process: kill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, prlimit64
        of_itself=(62, 234, 129, 297, 302),
        # chmod, fchmod, fchmodat, chown, fchown, lchown, fchownat, utime, utimes, futimesat, utimensat, setxattr,
        # lsetxattr, fsetxattr, removexattr, lremovexattr, fremovexattr
        silent=(90, 91, 268, 92, 93, 94, 260, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199),
        fcntl=72,
        ioctl=16,
    ),
    "aarch64": Calls(
        audit=0xC00000B7,
        clone=220,
        # As above, without fork, vfork, and the older of the silent: chmod, chown, lchown, utime, utimes, futimesat
        refused=(117, 198, 130, 140, 118, 119, 122, 274, 30, 238, 239, 270, 271),
        of_itself=(129, 131, 138, 240, 261),
        silent=(52, 53, 55, 54, 88, 5, 6, 7, 14, 15, 16),
        fcntl=25,
        ioctl=29,
    ),
}
# The same number everywhere: pidfd_send_signal, io_uring_setup, io_uring_enter, io_uring_register, pidfd_getfd,
# process_madvise, process_mrelease.
REFUSED_EVERYWHERE = (424, 425, 426, 427, 438, 440, 448)
# fchmodat2, setxattrat, removexattrat, file_setattr
SILENT_EVERYWHERE = (452, 463, 466, 469)
# What makes the kernel send signals to a process when a file is ready, by fcntl (F_SETOWN, F_SETSIG, F_SETOWN_EX) and
# by ioctl (FIOSETOWN, SIOCSPGRP).
FCNTL_SIGNALS, IOCTL_SIGNALS = (8, 10, 15), (0x8901, 0x8902)
CLONE3 = 435
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
# WRITE_FILE, REMOVE_DIR … MAKE_SYM: the first version's rights that change something; 1 << 13 came with the second.
LANDLOCK_WRITES = (1 << 1) | sum(1 << bit for bit in range(4, 13))
LANDLOCK_REFER, LANDLOCK_TRUNCATE = 1 << 13, 1 << 14


def set_limits(cpu_seconds: int, memory: int, file_size: int) -> None:
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + 1),
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_FSIZE, file_size, file_size),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # lower already, or unknown to the system (macOS: AS)
            resource.setrlimit(kind, (soft, hard))


def write_only_in(folder: str, libc: ctypes.CDLL) -> bool:
    """Landlock: forbid to write, make or remove files outside of `folder` (and /dev/null)."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    rights = LANDLOCK_WRITES | (LANDLOCK_REFER if version >= 2 else 0) | (LANDLOCK_TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("Q", rights)
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    of_a_file = rights & ((1 << 1) | LANDLOCK_TRUNCATE)
    for path, allowed in ((folder, rights), ("/dev/null", of_a_file)):
        opened = os.open(path, getattr(os, "O_PATH", 0) | os.O_CLOEXEC)
        # struct landlock_path_beneath_attr is packed: 8 bytes and 4.
        libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, opened), 0)
        os.close(opened)
    done = libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return bool(done)


def refuse_calls(libc: ctypes.CDLL) -> bool:
    """Seccomp: no process but threads of this one, no signals to others, no sockets; see the head of this file."""
    if platform.machine() not in ARCHITECTURES:
        return False
    calls = ARCHITECTURES[platform.machine()]

    def load(offset: int) -> bytes:
        return struct.pack("HBBI", 0x20, 0, 0, offset)

    def equal(value: int, then: int, otherwise: int) -> bytes:
        return struct.pack("HBBI", 0x15, then, otherwise, value)

    def give(value: int) -> bytes:
        return struct.pack("HBBI", 0x06, 0, 0, value)

    def unless(number: int, offset: int, values: tuple[int, ...], found: int, other: int) -> list[bytes]:
        """Of this call: `found` where the low half of the argument at `offset` is one of the values, else `other`."""
        tests = [equal(value, len(values) - at, 0) for at, value in enumerate(values)]
        return [equal(number, 0, len(values) + 3), load(offset), *tests, give(other), give(found)]

    refused = ERRNO | EPERM
    first, second = 16, 24
    program = [load(4), equal(calls.audit, 1, 0), give(KILL), load(0)]
    for number in (*calls.refused, *REFUSED_EVERYWHERE):
        program += [equal(number, 0, 1), give(refused)]
    for number in (*calls.silent, *SILENT_EVERYWHERE):
        program += [equal(number, 0, 1), give(ERRNO)]  # error 0: it worked
    for number in calls.of_itself:
        program += unless(number, first, (0, os.getpid()), ALLOW, refused)
    program += unless(calls.fcntl, second, FCNTL_SIGNALS, refused, ALLOW)
    program += unless(calls.ioctl, second, IOCTL_SIGNALS, refused, ALLOW)
    # clone3 hides its flags from a filter; the C library takes clone where it does not exist.
    program += [equal(CLONE3, 0, 1), give(ERRNO | ENOSYS)]
    # clone: the low half of its first argument, tested for CLONE_THREAD.
    program += [equal(calls.clone, 0, 3), load(first), struct.pack("HBBI", 0x45, 1, 0, CLONE_THREAD), give(refused)]
    program += [give(ALLOW)]
    if platform.machine() == "x86_64":  # calls of the x32 ABI have other numbers
        program[4:4] = [struct.pack("HBBI", 0x35, 0, 1, 0x40000000), give(refused)]
    code = ctypes.create_string_buffer(b"".join(program))
    # struct sock_fprog: a short, padding, a pointer.
    filters = struct.pack("HP", len(program), ctypes.addressof(code))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0) == 0)


def confine(folder: str, parent: int) -> list[str]:
    """Do what this system allows; returns its names."""
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before it could be followed
        os._exit(1)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return []
    names = ["landlock"] if write_only_in(folder, libc) else []
    return names + (["seccomp"] if refuse_calls(libc) else [])


def run(pieces: list[str]) -> tuple[str, str]:
    """(passed, failed or memory; the exception in words)."""
    module = types.ModuleType("answer")
    sys.modules["answer"] = sys.modules["__main__"] = module
    try:
        for number, piece in enumerate(pieces):
            name = "answer.py" if number == 0 else "tests.py"
            exec(compile(piece, name, "exec"), module.__dict__)  # what this process is for
    except MemoryError:
        return "memory", ""
    except BaseException as error:
        text = str(error).partition("\n")[0]
        return "failed", f"{type(error).__name__}: {text}" if text else type(error).__name__
    return "passed", ""


def main() -> None:
    path, result = Path(sys.argv[1]), int(sys.argv[2])
    payload = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    set_limits(payload["cpu_seconds"], payload["memory"], payload["file_size"])
    signal.alarm(payload["cpu_seconds"] + 1)  # should nobody be there to stop it: behind the parent's clock
    confined = confine(str(Path.cwd()), payload["parent"])
    if "seccomp" not in confined:  # counts all processes of the user, so this forbids any further one; but not to root
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    sys.argv = ["answer.py"]
    status, detail = run(payload["pieces"])
    told = {"status": status, "detail": detail[:500], "confined": confined, "nonce": payload["nonce"]}
    os.write(result, json.dumps(told).encode())
    os._exit(0)  # threads that the program left, and its exit handlers, are of no interest


if __name__ == "__main__":
    main()
