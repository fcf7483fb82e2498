"""Running generated Python apart: little time, little memory, no network, no other processes, a folder of its own.

The code runs in a process of its own, in a new session and a temporary folder that is removed afterwards. Limits of the
system hold time, memory, file sizes and processes; a network namespace without interfaces, where the system grants one,
and an audit hook keep it from the network, from other processes and from files outside its folder. This confines what a
language model writes by mistake or by imitation. It is no defence against an attacker who knows the interpreter: run
such code in a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Outcome", "run_python"]

_LIMIT = 64 * 1024  # bytes of output that are kept


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        passed: whether it ran to its last line without an error; leaving early, with any status, is no success.
        timed_out: whether it was stopped because its time was up.
        output: what it printed, errors included, cut at 64 KiB.
    """

    passed: bool
    timed_out: bool
    output: str


def run_python(code: str, *, seconds: float = 5.0, memory: int = 512 * 2**20) -> Outcome:
    """Run a program and say what became of it.

    Args:
        code: Python source.
        seconds: of wall-clock time; processor time is limited likewise.
        memory: bytes of address space.
    """
    with tempfile.TemporaryDirectory(prefix="calmlm-") as folder:
        done = secrets.token_hex(16)  # printed behind the last line of the program
        program, output = Path(folder) / "program.py", Path(folder) / ".output"
        program.write_text(code, encoding="utf-8")
        with output.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD, str(seconds), str(memory), folder, str(program), done],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"PATH": "", "HOME": folder, "LANG": "C.UTF-8"},
                start_new_session=True,
                close_fds=True,
            )
            timed_out = False
            try:
                status = process.wait(seconds)
            except subprocess.TimeoutExpired:
                timed_out, status = True, 1
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        written = output.read_bytes() if output.exists() else b""
    ended = written.endswith(done.encode())
    return Outcome(
        passed=status == 0 and ended and not timed_out,
        timed_out=timed_out or status == -signal.SIGXCPU,
        output=written.removesuffix(done.encode())[:_LIMIT].decode(errors="replace"),
    )


# Runs in the child, before the program: limits first, then what the program may not do.
_CHILD = r"""
import os, resource, sys
seconds, memory, folder, program = float(sys.argv[1]), int(sys.argv[2]), os.path.realpath(sys.argv[3]), sys.argv[4]
done, sys.argv = sys.argv[5], [program]
with open(program, encoding="utf-8") as file:
    source = file.read()
try:
    import ctypes
    # A user and a network namespace: no interface but a loopback that is down.
    ctypes.CDLL(None).unshare(0x10000000 | 0x40000000)
except Exception:
    pass
for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
    del sys.modules[name]
def limit(what, value):
    try:
        resource.setrlimit(what, (value, value))
    except (ValueError, OSError):
        pass
limit(resource.RLIMIT_CPU, int(seconds) + 1)
limit(resource.RLIMIT_AS, memory)
limit(resource.RLIMIT_FSIZE, 1 << 20)
limit(resource.RLIMIT_NOFILE, 64)
limit(resource.RLIMIT_CORE, 0)
limit(resource.RLIMIT_NPROC, 1)
import encodings.idna, encodings.ascii, encodings.latin_1, linecache, traceback, tokenize, re  # before the door closes
forbidden = (
    "socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
    "os.startfile", "os.kill", "os.killpg", "pty.", "shutil.rmtree", "os.chmod", "os.chown", "os.setxattr",
    "os.putenv", "ftplib.", "smtplib.", "urllib.", "http.", "telnetlib.", "imaplib.", "nntplib.", "poplib.",
    "webbrowser.", "resource.setrlimit", "resource.prlimit", "signal.pthread_kill", "sys.addaudithook", "mmap.",
    "code.__new__", "syslog.", "fcntl.", "msvcrt.", "winreg.", "gc.get_objects", "gc.get_referrers",
    "gc.get_referents",
)
listing = ("os.listdir", "os.scandir")
changing = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime", "os.chdir",
    "shutil.copyfile", "shutil.move",
)
libraries = tuple(os.path.realpath(path) for path in sys.path if path) + (os.path.realpath(sys.prefix),)
real, refuse = os.path.realpath, PermissionError
write = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
inside = lambda path: isinstance(path, int) or (real(os.fsdecode(path)) + "/").startswith(folder + "/")
known = lambda path: real(os.fsdecode(path)).startswith(libraries)
blocked = (
    "ctypes", "_ctypes", "socket", "_socket", "subprocess", "_posixsubprocess", "multiprocessing", "cffi",
    "_cffi_backend",
)
def guard(event, arguments):
    if event.startswith(forbidden):
        raise refuse("not allowed here: " + event)
    if event == "import" and arguments[0].partition(".")[0] in blocked:
        raise refuse("not allowed here: import " + arguments[0])
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, int):
            raise refuse("not allowed here: open a descriptor")
        if not inside(path) and ((flags or 0) & write or not known(path)):
            raise refuse("not allowed here: open " + repr(path))
    if event in listing and not inside(arguments[0] or ".") and not known(arguments[0] or "."):
        raise refuse("not allowed here: " + event)
    if event.startswith(changing) and not all(inside(path) for path in arguments[:2] if isinstance(path, (str, bytes))):
        raise refuse("not allowed here: " + event)
code = compile(source, program, "exec")
sys.addaudithook(guard)
del resource, guard, limit
leave = (sys.stdout.flush, os.write, done.encode())
exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
leave[0]()
leave[1](1, leave[2])
"""
