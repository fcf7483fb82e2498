"""Running generated Python apart: little time, little memory, no network, no other processes, a folder of its own.

The code runs in a process of its own, in a new session and a temporary folder that is removed afterwards, in the layers
of ``calmlm.evaluation.confined``. Limits of the system hold time, memory and sizes of files. On Linux, Landlock keeps
the process to its folder and the interpreter's own files, seccomp (through libseccomp) refuses what starts, signals and
changes other processes or opens a socket, and a network namespace has no interface; each where the system has it. An
audit hook refuses the same within the interpreter, on every system, to programs that do not set out to get around it:
only the kernel keeps those in. Whatever way a program finds to fill its folder, it is stopped there. Threads cannot be
started, so right programs that need them fail.

A program may still lie about its success, since it is judged in its own process: it may find there what says that it
came to its end. This is made for what a language model writes by mistake or by imitation; what an attacker has written
belongs into a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "run_python"]

_LIMIT = 64 * 1024  # bytes of output that are kept
_DISK = 80 * 2**20  # bytes that the folder may take
_LOOK = 0.1  # seconds between looks at the folder
_CHILD = Path(__file__).with_name("confined.py")


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
    with tempfile.TemporaryDirectory(prefix="calmlm-", ignore_cleanup_errors=True) as folder:
        done = secrets.token_hex(16).encode() + b"\n"  # told to the child, which writes it back behind the last line
        program = Path(folder) / "program.py"
        program.write_text(code, encoding="utf-8", errors="surrogatepass")  # which Python then does not read
        reading, writing = os.pipe()
        try:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", str(_CHILD)),
                    *(str(seconds), str(memory), folder, str(program), str(writing)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={"PATH": "", "HOME": folder, "LANG": "C.UTF-8"},
                start_new_session=True,
                pass_fds=(writing,),
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        try:
            with process, open(reading, "rb", buffering=0) as said:
                timed_out, printed, ended = _watch(process, said, done, time.monotonic() + seconds, folder)
        finally:
            _kill(process)
    return Outcome(
        passed=process.returncode == 0 and ended and not timed_out,
        timed_out=timed_out or process.returncode == -signal.SIGXCPU,
        output=printed.decode(errors="replace"),
    )


def _watch(
    process: subprocess.Popen[bytes], said: Any, done: bytes, until: float, folder: str
) -> tuple[bool, bytes, bool]:
    """Wait for the end of a process: whether its time was up, what it printed, and whether it said ``done``.

    A process whose folder takes more than 80 MiB is stopped.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError), process.stdin:
        process.stdin.write(done)
    printed, answer, look = bytearray(), bytearray(), 0.0
    with selectors.DefaultSelector() as selector:
        for stream, buffer, limit in ((process.stdout, printed, _LIMIT), (said, answer, len(done) + 1)):
            os.set_blocking(stream.fileno(), False)
            selector.register(stream.fileno(), selectors.EVENT_READ, (buffer, limit))
        while True:
            over = process.poll() is not None
            now = time.monotonic()
            timed_out = not over and now >= until
            if not over and now >= look:
                over, look = _taken(folder) > _DISK, now + _LOOK
            if over or timed_out:
                _kill(process)
            # After the end, once more what is left in the pipes; whoever else had them is gone by now.
            for key, _ in selector.select(0 if over or timed_out else 0.01):
                buffer, limit = key.data
                chunk = os.read(key.fd, 1 << 20)
                buffer += chunk[: limit - len(buffer)]
                if not chunk:
                    selector.unregister(key.fd)
            if over or timed_out:
                return timed_out, bytes(printed), bytes(answer) == done


def _taken(folder: str) -> int:
    """Bytes of a folder on the disk."""
    found = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found += os.lstat(os.path.join(here, name)).st_blocks * 512
    return found


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Stop a process and all of its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
