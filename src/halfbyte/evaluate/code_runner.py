"""The child process that runs a model's program: `python -I -S code_runner.py PAYLOAD RESULT_FD`.

It imports nothing of halfbyte. It reads the payload (JSON: pieces, nonce, limits), deletes it, gives up what it can
give up, and runs the pieces one after the other in one namespace, each compiled by itself, so that an answer cannot
swallow the tests behind it. Only after the last has ended, and not by an exception, does it say the nonce to the pipe:
`sys.exit(0)`, `os._exit(0)` or a crash on the way is no success.

What is given up, in the order in which it is done; nothing of it is a wall against a program that means harm:

limits      CPU seconds, address space, file size, open files, no core dump; everywhere
landlock    files are written in the working folder and nowhere else; Linux 5.13 and later
seccomp     no further process, no signal to others, no socket; Linux on x86-64 and ARM64
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import sys
import types
from pathlib import Path

EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
CLONE_THREAD = 0x00010000
# Audit's name of the architecture, clone, and the numbers of what is refused outright.
ARCHITECTURES = {
    # fork, vfork, kill, ptrace, socket
    "x86_64": (0xC000003E, 56, (57, 58, 62, 101, 41)),
    # kill, ptrace, socket
    "aarch64": (0xC00000B7, 220, (129, 117, 198)),
}
# The same number everywhere: pidfd_send_signal, io_uring_setup, io_uring_enter, io_uring_register.
REFUSED_EVERYWHERE = (424, 425, 426, 427)
CLONE3 = 435
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
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
    """Seccomp: no process but threads of this one, no signals to others, no sockets."""
    if platform.machine() not in ARCHITECTURES:
        return False
    architecture, clone, refused = ARCHITECTURES[platform.machine()]

    def load(offset: int) -> bytes:
        return struct.pack("HBBI", 0x20, 0, 0, offset)

    def equal(value: int, then: int, otherwise: int) -> bytes:
        return struct.pack("HBBI", 0x15, then, otherwise, value)

    def give(value: int) -> bytes:
        return struct.pack("HBBI", 0x06, 0, 0, value)

    program = [load(4), equal(architecture, 1, 0), give(KILL), load(0)]
    for number in (*refused, *REFUSED_EVERYWHERE):
        program += [equal(number, 0, 1), give(ERRNO | EPERM)]
    # clone3 hides its flags from a filter; the C library takes clone where it does not exist.
    program += [equal(CLONE3, 0, 1), give(ERRNO | ENOSYS)]
    # clone: the low half of its first argument, tested for CLONE_THREAD.
    program += [equal(clone, 0, 4), load(16), struct.pack("HBBI", 0x45, 1, 0, CLONE_THREAD), give(ERRNO | EPERM)]
    program += [give(ALLOW), give(ALLOW)]
    if platform.machine() == "x86_64":  # calls of the x32 ABI have other numbers
        program[4:4] = [struct.pack("HBBI", 0x35, 0, 1, 0x40000000), give(ERRNO | EPERM)]
    code = ctypes.create_string_buffer(b"".join(program))
    # struct sock_fprog: a short, padding, a pointer.
    filters = struct.pack("HP", len(program), ctypes.addressof(code))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filters, 0, 0) == 0)


def confine(folder: str) -> list[str]:
    """Do what this system allows; returns its names."""
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return []
    names = ["landlock"] if write_only_in(folder, libc) else []
    return names + (["seccomp"] if refuse_calls(libc) else [])


def run(pieces: list[str]) -> tuple[str, str]:
    """(passed, failed or memory; the exception in words)."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
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
    confined = confine(str(Path.cwd()))
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
