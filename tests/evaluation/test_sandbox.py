"""Generated code runs apart: right programs pass, and hostile ones reach nothing."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from calmlm.evaluation.sandbox import run_python


@pytest.mark.parametrize(
    "code",
    [
        "assert 1 + 1 == 2",
        "import math, re, collections, itertools, json, string, functools, random, heapq\nassert math.gcd(12, 18) == 6",
        "from typing import List\ndef f(xs: List[int]) -> int:\n    return max(xs)\nassert f([1, 3, 2]) == 3",
        "open('notes.txt', 'w').write('x')\nassert open('notes.txt').read() == 'x'",
        "import dataclasses, datetime, decimal, fractions, statistics\nassert statistics.mean([1, 2, 3]) == 2",
    ],
)
def test_right_programs_pass(code: str) -> None:
    outcome = run_python(code)
    assert outcome.passed, outcome.output
    assert not outcome.timed_out


@pytest.mark.parametrize(
    "code", ["assert 1 == 2", "1 / 0", "def f(:", "import sys; sys.exit(3)", "raise SystemExit(1)"]
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
    ],
)
def test_files_outside_are_out_of_reach(attack: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    outcome = run_python(attack.format(path=str(secret), folder=str(tmp_path)))
    assert not outcome.passed
    assert "secret" not in outcome.output.replace(str(secret), "").replace(str(tmp_path), "")
    assert secret.read_text() == "secret"


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
    ],
)
def test_other_processes_and_the_system_are_out_of_reach(attack: str) -> None:
    outcome = run_python(attack)
    assert not outcome.passed
    lines = outcome.output.splitlines()
    assert "reached" not in lines


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


def test_secrets_of_the_environment_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret")
    outcome = run_python("import os\nprint(dict(os.environ))")
    assert "secret" not in outcome.output
    assert os.environ["MY_TOKEN"] == "secret"
