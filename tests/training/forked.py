"""Runs of `calmlm` that can be killed: a process imports everything once and forks for each of them.

As a program: prints that it is ready; then reads a line of JSON for each run, with its ``arguments``, ``log``,
``folders`` and ``kill_at``, and prints the process id of the fork, and its status. A fork that has opened, moved or
removed ``kill_at`` files in ``folders`` kills itself; one that ends by itself writes their number beside its log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


@dataclass
class Ended:
    """How a run ended.

    Attributes:
        status: of the process; negative for a signal.
        seconds: how long it took.
        events: how many files it opened, moved or removed in its folders; -1 where it was killed.
        said: all that it printed.
    """

    status: int
    seconds: float
    events: int
    said: str


class Runs:
    """A process that forks runs."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.log = process, folder / "log.txt"

    def go(
        self,
        arguments: Sequence[str],
        folders: Sequence[Path],
        *,
        kill_at: int | None = None,
        after: float | None = None,
    ) -> Ended:
        """Start a run and wait for its end; it is killed at an event, or after some seconds."""
        assert self.process.stdin and self.process.stdout
        order = {
            "arguments": list(arguments),
            "log": str(self.log),
            "folders": list(map(str, folders)),
            "kill_at": kill_at,
        }
        count = self.log.with_suffix(".events")
        count.unlink(missing_ok=True)
        begun = time.perf_counter()
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        identity = int(self.process.stdout.readline())
        if after is not None:
            time.sleep(after)
            os.kill(identity, signal.SIGKILL)  # its parent waits for it only when asked, so that the id stays its own
        self.process.stdin.write("wait\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        events = int(count.read_text()) if count.is_file() else -1
        return Ended(status, time.perf_counter() - begun, events, self.log.read_text(encoding="utf-8"))


@contextmanager
def forking(folder: Path) -> Iterator[Runs]:
    """A process that forks runs, for as long as the context lasts."""
    import calmlm

    paths = os.pathsep.join([str(Path(calmlm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == "ready\n"
        yield Runs(process, folder)
    finally:
        assert process.stdin and process.stdout
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def _watch(folders: Sequence[str], kill_at: int | None) -> list[int]:
    """Count what happens to files in these folders, and kill this process when it has happened often enough."""
    count = [0]

    def hook(event: str, arguments: Any) -> None:
        if event not in EVENTS or not isinstance(arguments[0], (str, Path)):
            return
        writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if writes and str(arguments[0]).startswith(tuple(folders)):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def _run(order: dict[str, Any]) -> None:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    count = _watch(order["folders"], order["kill_at"])
    from calmlm.cli import main

    status = 1
    try:
        status = main(order["arguments"])
        Path(order["log"]).with_suffix(".events").write_text(str(count[0]))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    """Fork a run for each line of standard input."""
    import datasets  # noqa: F401
    import pyarrow.feather  # noqa: F401
    import tensorboard  # noqa: F401
    import torch
    import trl

    import calmlm.composing
    import calmlm.training.pipeline

    torch.set_num_threads(1)
    _ = trl.SFTTrainer, calmlm.compose
    print("ready", flush=True)
    for line in sys.stdin:
        identity = os.fork()
        if not identity:
            _run(json.loads(line))
        print(identity, flush=True)
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(identity, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
