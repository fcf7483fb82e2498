"""Generated code runs apart: right programs pass, and hostile ones reach nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from ctypes.util import find_library
from pathlib import Path

import pytest

from calmlm.evaluation import sandbox
from calmlm.evaluation.sandbox import run_python


@pytest.mark.parametrize(
    "code",
    [
        "assert 1 + 1 == 2",
        "import math, re, collections, itertools, json, string, functools, random, heapq\nassert math.gcd(12, 18) == 6",
        "from typing import List\ndef f(xs: List[int]) -> int:\n    return max(xs)\nassert f([1, 3, 2]) == 3",
        "open('notes.txt', 'w').write('x')\nassert open('notes.txt').read() == 'x'",
        "import dataclasses, datetime, decimal, fractions, statistics\nassert statistics.mean([1, 2, 3]) == 2",
        "def f(xs: list): pass\nassert f.__annotations__['xs'] is list",
    ],
)
def test_right_programs_pass(code: str) -> None:
    outcome = run_python(code)
    assert outcome.passed, outcome.output
    assert not outcome.timed_out


@pytest.mark.parametrize(
    "code",
    [
        "assert 1 == 2",
        "1 / 0",
        "def f(:",
        "import sys; sys.exit(3)",
        "raise SystemExit(1)",
        "def f(xs: List[int]): pass",
        "x = '\ud800'",
    ],
)
def test_wrong_programs_fail(code: str) -> None:
    outcome = run_python(code)
    assert not outcome.passed
    assert not outcome.timed_out


def test_errors_are_told() -> None:
    assert "ZeroDivisionError" in run_python("print('before')\n1 / 0").output


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "from signal import *\nfor s in (SIGTERM, SIGXCPU, SIGINT): signal(s, SIG_IGN)\nwhile True: pass",
    ],
)
def test_time_is_limited(code: str) -> None:
    start = time.monotonic()
    outcome = run_python(code, seconds=1.0)
    assert not outcome.passed
    assert outcome.timed_out
    assert time.monotonic() - start < 10


def test_memory_is_limited() -> None:
    outcome = run_python("x = bytearray(2 * 1024**3)\nprint('took it')", memory=256 * 2**20)
    assert not outcome.passed
    assert "took it" not in outcome.output


def test_output_is_limited() -> None:
    assert len(run_python("while True: print('x' * 1000)", seconds=2.0).output) <= 64 * 1024


@pytest.mark.parametrize(
    "attack",
    [
        "open({path!r}, 'w').write('changed')",
        "open({path!r}).read()",
        "import os\nos.remove({path!r})",
        "import os\nos.rename({path!r}, 'mine')",
        "import os\nos.open({path!r}, os.O_WRONLY | os.O_TRUNC)",
        "import os\nos.symlink({path!r}, 'link')\nopen('link', 'w').write('changed')",
        "import shutil\nshutil.copyfile({path!r}, 'mine')",
        "import pathlib\npathlib.Path({path!r}).unlink()",
        "import os\nos.listdir({folder!r})",
        "import os\nos.truncate({path!r}, 0)",
        # Through descriptors, and paths from elsewhere.
        "import os\nhere = os.open('.', os.O_RDONLY)\nos.read(os.open('..' + {path!r}, os.O_RDONLY, dir_fd=here), 9)",
        "import os\nos.makedirs('a/b/c/d/e/f/g/h')\nhere = os.open('.', os.O_PATH)\nos.chdir('a/b/c/d/e/f/g/h')\n"
        "os.remove('../../../../../..' + {path!r}, dir_fd=here)",
        "import os\nos.mkfifo({folder!r} + '/pipe')",
        "import os\nos.mknod({folder!r} + '/node')",
        "import posix\nposix.mkfifo({folder!r} + '/pipe')",
    ],
)
def test_files_outside_are_out_of_reach(attack: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    outcome = run_python(attack.format(path=str(secret), folder=str(tmp_path)))
    assert not outcome.passed
    assert "secret" not in outcome.output.replace(str(secret), "").replace(str(tmp_path), "")
    assert secret.read_text() == "secret"
    assert list(tmp_path.iterdir()) == [secret]


@pytest.mark.parametrize(
    "attack",
    [
        "import os\nos.system('echo reached')",
        "import subprocess\nsubprocess.run(['/bin/echo', 'reached'])",
        "import os\nos.execv('/bin/echo', ['echo', 'reached'])",
        "import os\nif os.fork() == 0: print('reached')",
        "import os\nos.posix_spawn('/bin/echo', ['echo', 'reached'], {})",
        "import multiprocessing\nmultiprocessing.Process(target=print, args=('reached',)).start()",
        "import ctypes\nctypes.CDLL(None).system(b'echo reached')",
        "import sys\nsys.modules.pop('ctypes', None)\nimport _ctypes\nprint('reached')",
        "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)\nprint('reached')",
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (100, 100))\nprint('reached')",
        "import importlib\nimportlib.import_module('socket')\nprint('reached')",
        "import builtins\nbuiltins.__import__('socket')\nprint('reached')",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGCONT)\nprint('reached')",
        "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)\nprint('reached')",
        "import os\nos.sched_setaffinity(os.getppid(), {0})\nprint('reached')",
        "import _posixsubprocess\nprint('reached')",
        "import importlib.util as u, sys, glob\n"
        "file = glob.glob(sys.base_prefix + '/lib/python*/lib-dynload/_ctypes*')[0]\n"
        "module = u.module_from_spec(u.spec_from_file_location('zz._ctypes', file))\nprint('reached')",
    ],
)
def test_other_processes_and_the_system_are_out_of_reach(attack: str) -> None:
    outcome = run_python(attack)
    assert not outcome.passed
    lines = outcome.output.splitlines()
    assert "reached" not in lines


# What the kernel refuses, behind an interpreter that refuses nothing.
UNGUARDED = """
import contextlib, ctypes, os, sys
sys.path.insert(0, {home!r})
import confined
confined.confine(os.path.realpath({folder!r}))
import ctypes
system = ctypes.CDLL(None, use_errno=True)
{attack}
"""


@pytest.mark.skipif(sys.platform != "linux" or find_library("seccomp") is None, reason="the system has no such layer")
@pytest.mark.parametrize(
    "attack",
    [
        "open({path!r}).read()",
        "open({path!r}, 'a')",
        "os.read(os.open('..' + {path!r}, os.O_RDONLY, dir_fd=os.open('/', os.O_PATH)), 9)",
        "os.remove({path!r})",
        "os.chmod({path!r}, 0)",
        "os.mkfifo('pipe')",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0)",
        "os.pidfd_open(os.getppid())",
        "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
        "__import__('_thread').start_new_thread(print, ())",
        "__import__('socket').socket()",
        "__import__('resource').setrlimit(0, (9, 9))",
        "assert system.syscall(39) > 0\nif system.syscall(ctypes.c_long(57)) < 0: raise OSError",
    ],
)
def test_the_kernel_refuses_it_too(attack: str, tmp_path: Path) -> None:
    secret, folder = tmp_path / "secret.txt", tmp_path / "folder"
    secret.write_text("secret")
    folder.mkdir()
    home = str(Path(sandbox.__file__).parent)
    code = UNGUARDED.format(home=home, folder=str(folder), attack=attack.format(path=str(secret)))
    code += "\nopen('mine', 'w').write('x')"
    plain = code.replace("confined.confine(", "print(")
    if "syscall(39)" not in attack:  # or another number elsewhere
        allowed = subprocess.run([sys.executable, "-c", plain], cwd=folder, capture_output=True, text=True, check=False)
        assert "Permission" not in allowed.stderr
        secret.write_text("secret")
        secret.chmod(0o600)
    refused = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert any(
        word in refused.stderr for word in ("PermissionError", "OSError", "not allowed", "can't start new thread")
    )
    assert secret.read_text() == "secret"


def test_the_network_is_out_of_reach() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(3)
    reached: list[bool] = []

    def wait() -> None:
        try:
            server.accept()
            reached.append(True)
        except TimeoutError:
            pass

    thread = threading.Thread(target=wait)
    thread.start()
    port = server.getsockname()[1]
    for code in (
        f"import socket\nsocket.create_connection(('127.0.0.1', {port}))",
        f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}')",
        f"import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', {port}))",
    ):
        assert not run_python(code).passed
    thread.join()
    server.close()
    assert not reached


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run_python("open('a', 'w').write('x')")
    run_python("while True: pass", seconds=0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos._exit(0)",
        "import sys, os\nos.write(1, sys.orig_argv[-1].encode())\nos._exit(0)",
        "import __main__, os\nos.write(1, __main__.done)\nos._exit(0)",
        "import os\nfor each in range(3, 64):\n  try: os.write(each, b'done')\n  except OSError: pass\nos._exit(0)",
        "import os\nos.close(1)\nos._exit(0)",
    ],
)
def test_leaving_early_is_no_success(code: str) -> None:
    assert not run_python(code).passed


@pytest.mark.parametrize(
    "code",
    [
        "import os\nos.mkfifo('.output')",
        "import os\nfor _ in range(1500):\n  os.mkdir('d')\n  os.chdir('d')",
        "for i in range(1000): open(str(i), 'w').write('x' * 2**20)",
        "open('large', 'w').write('x' * 2**24)",
    ],
)
def test_files_are_few_and_small(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert not run_python(code, seconds=3.0).passed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["_xxsubinterpreters", "_interpreters", "_testcapi", "sqlite3", "_sqlite3", "dbm.gnu"])
def test_what_knows_no_audit_hook_cannot_be_imported(name: str) -> None:
    """Interpreters of their own, and libraries that open files in C."""
    outcome = run_python(f"import {name}")
    assert not outcome.passed
    assert "not allowed here" in outcome.output


def test_a_folder_that_fills_up_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_DISK", 3 * 2**20)
    code = "import os, time\nfor n in range(8):\n    open(str(n), 'wb').write(os.urandom(1 << 20))\ntime.sleep(20)"
    start = time.monotonic()
    outcome = run_python(code, seconds=30)
    assert not outcome.passed
    assert time.monotonic() - start < 20


@pytest.mark.skipif(not Path("/usr/share/zoneinfo/Europe/Berlin").exists(), reason="the system has no time zones")
def test_time_zones_can_be_read() -> None:
    outcome = run_python("import zoneinfo\nassert zoneinfo.ZoneInfo('Europe/Berlin').key == 'Europe/Berlin'")
    assert outcome.passed, outcome.output


def test_an_end_that_holds_its_output_open_is_an_end() -> None:
    start = time.monotonic()
    assert run_python("print('x' * 10**6)", seconds=60.0).passed  # more than a pipe holds
    assert time.monotonic() - start < 30


def test_programs_are_modules_of_their_own() -> None:
    code = "from __future__ import annotations\nimport dataclasses, collections\n@dataclasses.dataclass\nclass A:\n"
    code += "    x: int = 1\nassert A().x == 1\nassert collections.namedtuple('B', 'x')(2).x == 2\n"
    code += "import __main__\nassert __main__.A is A"
    outcome = run_python(code)
    assert outcome.passed, outcome.output


def test_secrets_of_the_environment_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    outcome = run_python("import os\nprint(dict(os.environ))")
    assert "secret" not in outcome.output
    assert os.environ["MY_TOKEN"] == "secret"


def test_names_of_the_hook_are_not_those_that_a_program_sees() -> None:
    code = (
        "import sys\n"
        "seen = sys._getframe(1).f_globals\n"
        "seen.update(_FORBIDDEN=('-',), _BLOCKED=(), _LISTING=(), _CHANGING=('-',), isinstance=lambda *a: True)\n"
        "import os\n"
        "os.system('true')\n"
    )
    outcome = run_python(code)
    assert not outcome.passed
    assert "not allowed here: os.system" in outcome.output


def test_what_writes_anywhere_in_memory_is_gone() -> None:
    """The layers of the system are set up through ctypes, whose functions no audit hook sees."""
    code = (
        "found = [c for c in object.__subclasses__() if c.__module__ in ('ctypes', '_ctypes')]\n"
        "for each in found:\n"
        "    names = getattr(getattr(each, '__init__', None), '__globals__', {})\n"
        "    assert not {'memmove', 'memset', 'CFUNCTYPE', 'PYFUNCTYPE', 'cast'} & set(names), each\n"
    )
    outcome = run_python(code)
    assert outcome.passed, outcome.output
