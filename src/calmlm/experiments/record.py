"""What every experiment writes beside its figures, and the stages that it does not repeat."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME

import calmlm
from calmlm.errors import first_line
from calmlm.files.results import to_json
from calmlm.files.storage import write_text

__all__ = ["Stages", "commit", "device", "machine", "made_by", "origin"]

_DONE = "stage.json"

Work = Callable[[], tuple[PreTrainedModel | None, dict[str, Any]]]
"""Does a stage: a model to store, or None, and what to record."""


class Stages:
    """The finished stages of one seed, each in a folder of its own.

    Args:
        folder: where they lie.
        name: what to call the seed in lines of progress.
        report: takes lines of progress.
    """

    def __init__(self, folder: Path, name: str, report: Callable[[str], None]) -> None:
        self.folder, self.name, self.report = folder, name, report

    def has(self, stage: str) -> bool:
        """Whether a stage is stored."""
        return (self.folder / stage / _DONE).is_file()

    def digests(self) -> dict[str, str]:
        """Eight digits that stand for the weights of each stored stage that has any, by name."""
        found = {}
        for weights in sorted(self.folder.glob(f"*/{SAFE_WEIGHTS_NAME}")):
            if self.has(weights.parent.name):
                with weights.open("rb") as file:
                    found[weights.parent.name] = hashlib.file_digest(file, "sha256").hexdigest()[:8]
        return found

    def do(self, stage: str, work: Work, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
        """Do a stage unless it is stored; return its record.

        It is stored in one step, so that what is stored is whole. Another process that does it is waited for.
        """
        folder = self.folder / stage
        if not self.has(stage):
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f".{stage}.lock"):
                if not self.has(stage):
                    return self._do(stage, work, tokenizer)
        self.report(f"{self.name}: {stage} is stored in {folder}")
        return json.loads((folder / _DONE).read_text(encoding="utf-8"))

    def _do(self, stage: str, work: Work, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        self.report(f"{self.name}: {stage} ...")
        start = time.perf_counter()
        model, record = work()
        record |= {"seconds": round(time.perf_counter() - start, 1), "commit": commit()}
        folder = self.folder / stage
        with tempfile.TemporaryDirectory(prefix=f".{stage}.", dir=self.folder) as temporary:
            made = Path(temporary) / stage
            made.mkdir()
            if model is not None:
                model.save_pretrained(made)
            if tokenizer is not None:
                self._add(tokenizer, made, stage)
            write_text(made / _DONE, to_json(record, indent=2))
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
            made.rename(folder)
        self.report(f"{self.name}: {stage} took {record['seconds']:.0f} s")
        return record

    def _add(self, tokenizer: PreTrainedTokenizerBase, folder: Path, stage: str) -> None:
        """Save a tokenizer beside a model, which is not lost where that fails."""
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # some kinds have files and code of their own
            self.report(f"{self.name}: {stage} is stored without its tokenizer ({first_line(error)})")


def origin(command: str | None) -> dict[str, Any]:
    """Versions, commit, command and machine."""
    return {
        "versions": {
            "calmlm": calmlm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit(),
        "command": command or shlex.join([_program(Path(sys.argv[0])), *sys.argv[1:]]),
        "machine": machine(),
    }


def _program(path: Path) -> str:
    """What a program is called; `python -m` starts the file __main__.py of a package."""
    return path.parent.name if path.name == "__main__.py" else path.name


def made_by(result: dict[str, Any]) -> str:
    """One sentence about a result's command, commits, machine and versions."""
    machine = result["machine"]
    return (
        f"Made by `{result['command']}` at commit {result['commit']} (stages trained at "
        f"{', '.join(commit[:7] for commit in result['commits'])}) on {machine['processor']} ({machine['cores']} "
        f"cores, {machine['threads']} threads, {machine['device']}) with "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + "."
    )


def device() -> str:
    """Where an experiment's models run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def commit() -> str:
    """The commit of the code that runs, or "unknown" outside a checkout."""
    try:
        here = Path(__file__).parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def machine() -> dict[str, Any]:
    """Processor, cores, threads in use and accelerator."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": accelerator}
