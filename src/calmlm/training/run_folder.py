"""The folder of a run. What stands in it is whole: the result appears by a rename, checkpoints count when complete."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from calmlm.errors import ConfigError
from calmlm.files.paths import expanded
from calmlm.files.storage import WEIGHTS_NAME, probe_place, temporaries_in, write_text

PREFIX = "checkpoint-"
SPREAD = ("*_fsdp*", "global_step*")
"""Where the weights of a model that is spread over processes lie: FSDP's files, and DeepSpeed's."""


class RunFolder:
    """The files of one training run.

    config.yaml      the configuration, overrides included
    checkpoints/     one folder for each checkpoint
    logs/            TensorBoard's
    composition/     the result
    loss.png         the losses, and gates.png the gates of a composition that has some
    stopped/         the batch that a run was stopped at
    align/           of a run with a stage on plain text: the folder of that stage
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(Path(path))  # in Python too, for Trainer does it there
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.composition = self.path / "composition"
        self.align = self.path / "align"
        self.stopped = self.path / "stopped"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse to write where something stands already, unless that was asked for. Changes nothing.

        Raises:
            ConfigError: the folder is a file, is not empty, or is no run although it is to be resumed or overwritten.
        """
        if resume and overwrite:
            raise ConfigError("Expected --resume or --overwrite, but got both; choose one.")
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"Expected a folder for the output, but {self.path} is a file; name another output.")
        try:
            probe_place(self.path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"Expected a folder for the output that can be written to, but {self.path} is none ({error}); name "
                f"another output."
            ) from None
        passing = set(self._left())  # no results: nor is the batch that a run has stopped at
        found = (path for path in self.path.rglob("*") if path.is_file() and path not in passing)
        if all(self.stopped in path.parents for path in found):
            return
        if not resume and not overwrite:
            raise ConfigError(
                f"Expected an empty folder for the output, but {self.path} holds files; name another output, go on "
                f"with --resume, or replace the run with --overwrite."
            )
        if not self._is_run():
            raise ConfigError(
                f"Expected a run of calmlm in {self.path}, but it holds other files and no config.yaml of such a run; "
                f"name another output."
            )

    def _left(self) -> list[Path]:
        """The files that a killed process was writing where a run writes; a cache may be that of others as well."""
        folders = []
        for run in (self.path, self.align):
            folders += [run, run / self.checkpoints.name, *(run / self.checkpoints.name).glob(f"{PREFIX}*")]
        return [path for folder in folders for path in temporaries_in(folder)]

    def _is_run(self) -> bool:
        """Whether `calmlm train` has written the configuration that lies here."""
        try:
            found = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return False
        return isinstance(found, dict) and {"output", "model", "data", "trainer"} <= found.keys()

    def start(self, config_text: str, *, resume: bool) -> None:
        """Make the folder, without the files that a killed process was writing.

        Unless resumed, what an earlier run left on its way goes; its result stays for now. Where a run is resumed,
        checkpoints behind the last whole one go: Trainer would count them among those that it keeps.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self._left():
            left.unlink(missing_ok=True)
        for earlier in self.path.glob(".earlier.*"):
            if earlier.is_dir():
                shutil.rmtree(earlier)
        if resume:
            last = self.last_checkpoint()
            for number, folder in self._numbered():
                if last is None or number > int(last.name.removeprefix(PREFIX)):
                    shutil.rmtree(folder)
        else:
            for folder in (self.checkpoints, self.logs, self.align, self.stopped):
                if folder.exists():  # in one step, so that no part of an earlier run is ever gone on from
                    folder.rename(self.path / f".earlier.{folder.name}")
                    shutil.rmtree(self.path / f".earlier.{folder.name}")
        write_text(self.config, config_text)

    def start_in_one(self, arguments: Any, config_text: str, *, resume: bool) -> None:
        """Let the first of a trainer's processes make the folder; the others wait for it.

        Args:
            arguments: the trainer's.
            config_text, resume: see ``start``.
        """
        with arguments.main_process_first(local=False, desc="making the output folder"):
            if arguments.process_index == 0:
                self.start(config_text, resume=resume)

    def changes(self, config: dict[str, Any]) -> list[str]:
        """Which settings differ from those that the run was started with, as dotted keys."""
        try:
            before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return []
        one, other = _flat(before), _flat(config)
        return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end: Trainer writes `trainer_state.json` last.

        One that was damaged since is passed over.
        """
        found = [(number, folder) for number, folder in self._numbered() if _is_whole(folder)]
        return max(found)[1] if found else None

    def way_on(self) -> str:
        """What to do after a run has ended too early, as the end of a sentence."""
        last = self.last_checkpoint()
        return f"go on from {last.name} with --resume" if last is not None else "start again"

    def _numbered(self) -> list[tuple[int, Path]]:
        """All folders of checkpoints, whole or not, with their steps."""
        named = [(folder.name.removeprefix(PREFIX), folder) for folder in self.checkpoints.glob(f"{PREFIX}*")]
        return [(int(number), folder) for number, folder in named if number.isdigit()]


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        key: value
        for name, part in settings.items()
        for key, value in _flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _is_whole(checkpoint: Path) -> bool:
    """Whether everything in a checkpoint can be opened."""
    try:
        for name in ("trainer_state.json", "config.json"):
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        if not any(any(checkpoint.glob(kind)) for kind in SPREAD):
            with safe_open(checkpoint / WEIGHTS_NAME, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    # torch.save writes archives, whose table of contents comes last.
    return all(zipfile.is_zipfile(path) for kind in ("*.pt", "*.pth") for path in checkpoint.glob(kind))


def steps_of(checkpoint: Path) -> int:
    """After how many steps a complete checkpoint was written."""
    return int(state_of(checkpoint).global_step)


def state_of(checkpoint: Path) -> TrainerState:
    """What the trainer knew when it wrote a complete checkpoint: steps, logs, the best one so far."""
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def best_of(checkpoint: Path) -> Path:
    """The best checkpoint so far, as a checkpoint knows it; itself where that one is gone."""
    best = checkpoint.parent / Path(state_of(checkpoint).best_model_checkpoint or checkpoint).name
    return best if (best / "trainer_state.json").is_file() else checkpoint
