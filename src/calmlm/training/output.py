"""The folder of a run. What stands in it is whole: the result appears by a rename, checkpoints count when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from calmlm.errors import ConfigError
from calmlm.storage import write_text


class RunFolder:
    """The files of one training run.

    config.yaml      the configuration, overrides included
    checkpoints/     one folder for each checkpoint
    logs/            TensorBoard's
    composition/     the result
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.composition = self.path / "composition"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse to write where something stands already, unless that was asked for. Changes nothing.

        Raises:
            ConfigError: the folder is a file, is not empty, or is no run although it is to be resumed or overwritten.
        """
        if resume and overwrite:
            raise ConfigError("Expected --resume or --overwrite, but got both; choose one.")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"Expected a folder for the output, but {self.path} is a file; name another output.")
        if not any(path.is_file() for path in self.path.rglob("*")):
            return
        if not resume and not overwrite:
            raise ConfigError(
                f"Expected an empty folder for the output, but {self.path} holds files; name another output, go on "
                f"with --resume, or replace the run with --overwrite."
            )
        if not self.config.is_file():
            raise ConfigError(
                f"Expected a run of calmlm in {self.path}, but it holds other files and no config.yaml; name another "
                f"output."
            )

    def start(self, config_text: str, *, resume: bool) -> None:
        """Make the folder. Unless resumed, the checkpoints and logs of an earlier run go; its result stays for now."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            for folder in (self.checkpoints, self.logs):
                shutil.rmtree(folder, ignore_errors=True)
        write_text(self.config, config_text)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end: Trainer writes `trainer_state.json` last."""
        found = [
            (int(folder.name.removeprefix("checkpoint-")), folder)
            for folder in self.checkpoints.glob("checkpoint-*")
            if folder.name.removeprefix("checkpoint-").isdigit() and (folder / "trainer_state.json").is_file()
        ]
        return max(found)[1] if found else None


def steps_of(checkpoint: Path) -> int:
    """After how many steps a complete checkpoint was written."""
    return int(_state(checkpoint).get("global_step", 0))


def best_of(checkpoint: Path) -> Path:
    """The best checkpoint so far, as a checkpoint knows it; itself where that one is gone."""
    best = checkpoint.parent / Path(_state(checkpoint).get("best_model_checkpoint") or checkpoint).name
    return best if (best / "trainer_state.json").is_file() else checkpoint


def _state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `target` when the block ends well and vanishes otherwise.

    Until then `target` stays as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
