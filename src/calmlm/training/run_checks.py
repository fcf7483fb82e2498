"""What is checked of a run before anything is written: that it can go on, read its data and save what it ends with."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from calmlm.data.jsonl import read_jsonl
from calmlm.data.sources import read_lines
from calmlm.errors import CalmError, ConfigError, first_line
from calmlm.files.storage import portable_config
from calmlm.training.backends import Rows
from calmlm.training.schema import TrainingConfig

__all__ = [
    "check_continues",
    "check_ids",
    "check_inputs",
    "check_same",
    "check_saving",
    "check_views",
    "in_one_go",
    "texts_read",
]

LOOKED_AT = 32  # rows of which a view has to show something


def in_one_go(*steps: Callable[[], Any]) -> list[Any]:
    """What each of these gives, or the faults of all that fail.

    Raises:
        CalmError: the one fault, or a ConfigError that names all of them.
    """
    found, faults = [], []
    for step in steps:
        try:
            found.append(step())
        except CalmError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ConfigError(f"The run has {len(faults)} faults: " + " ".join(map(str, faults)))
    return found


def texts_read(config: TrainingConfig, *, begun: bool) -> list[Callable[[], int]]:
    """Functions that read a file beside the data each, so that one that is missing is found before models are loaded.

    Args:
        config: of the run.
        begun: whether the run goes on behind its stage on plain text.
    """
    model, align = config.model, None if begun else config.align
    named = [model.plain_text, align and align.text, config.retain and config.retain.text]
    found: list[Callable[[], int]] = [
        partial(_count, read_lines, path) for path in dict.fromkeys(path for path in named if path)
    ]
    return found if model.development is None else [*found, partial(_count, read_jsonl, model.development)]


def _count(read: Callable[[str], list[Any]], path: str) -> int:
    return len(read(path))


def check_same(model: Any, saved: Path) -> None:
    """Raise unless what was saved by an earlier part of a run belongs to this composition.

    Args:
        model: the composition.
        saved: folder of a checkpoint or a composition.

    Raises:
        ConfigError: naming what differs.
    """
    from calmlm.files.loading import read_config

    before, now = read_config(saved), model.config
    pairs: dict[str, tuple[Any, Any]] = {"the anchor": (before.anchor, now.anchor)}
    for name in (*before.augmenting, *now.augmenting):
        pairs[name] = (before.augmenting.get(name), now.augmenting.get(name))
    reading = ("fingerprint", "reads", "alignment", "view", "beginning", "prefix")
    parts = (*reading, "connections", "connector", "words", "adapters")
    for name, (one, other) in pairs.items():
        differing = [key for key in parts if _part(one, key) != _part(other, key)]
        if differing:
            raise ConfigError(
                f"--resume: expected the composition that {saved} belongs to, but the configuration asks for "
                f"another {differing[0]} of {name}; take that back, or start anew with --overwrite."
            )


def check_continues(model: Any, checkpoint: Path, *, other_files: bool = False) -> None:
    """Raise unless a checkpoint was written while this composition was trained.

    Args:
        model: the composition.
        checkpoint: a complete one.
        other_files: whether the trainer saves its optimizer in files of other names, as DeepSpeed and FSDP1 do.

    Raises:
        ConfigError: naming what differs, or that its optimizer is missing.
    """
    check_same(model, checkpoint)
    for file in () if other_files else ("optimizer.pt", "scheduler.pt"):
        if not (checkpoint / file).is_file():
            raise ConfigError(
                f"--resume: expected {file} in {checkpoint}, but there is none, as save_only_model saves none; start "
                f"anew with --overwrite, or from that checkpoint as model.composition."
            )


def check_ids(model: Any, rows: Rows, key: str = "tokenizer", have: str = "the data have") -> None:
    """Raise where a model that reads the anchor's tokens has no embedding for one.

    Args:
        model: the composition.
        rows: of ``input_ids``.
        key: what is named in the file.
        have: what the rows are, with its verb.

    Raises:
        ConfigError: naming the token.
    """
    most, size = max((max(row["input_ids"], default=0) for row in rows), default=0), model.model.abilities.shared_ids
    if most >= size:
        raise ConfigError(
            f"{key}: expected ids below {size}, the vocabulary of the models that read them, but {have} {most}; name "
            f"the anchor's own tokenizer."
        )


def check_inputs(model: Any) -> None:
    """Raise where an augmenting model reads what no text has.

    Raises:
        ConfigError: naming the model.
    """
    for name, entry in model.config.augmenting.items():
        if entry["reads"] == "inputs":
            raise reads_no_text(name)


def reads_no_text(name: str) -> ConfigError:
    """What is raised for an augmenting model that reads what no text has."""
    return ConfigError(
        f"model.augmenting: expected models that read the data's text, but {name!r} is an encoder with inputs of its "
        f"own; train it in Python, with transformers' Trainer and augmenting_inputs in each batch."
    )


def check_saving(model: Any, tokenizer: Any, *, checkpoints: bool) -> None:
    """Raise where what the run ends with could not be written, for its form.

    Args:
        model: the composition.
        tokenizer: is saved beside it.
        checkpoints: whether the trainer will save both on the way, and stop where that fails.

    Raises:
        ConfigError: naming what cannot be written.
    """
    try:
        portable_config(model.config, Path()).to_json_string()
        model.generation_config.to_json_string()
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"model: expected models whose configuration can be saved, but it cannot ({first_line(error)}); mend their "
            f"config.json and generation_config.json."
        ) from error
    if not checkpoints:
        return
    with tempfile.TemporaryDirectory() as place:
        try:
            tokenizer.save_pretrained(place)
        except Exception as error:  # some kinds have files and code of their own
            raise ConfigError(
                f"tokenizer: expected one that can be saved with each checkpoint, but it cannot ({first_line(error)}); "
                f"name another, or set trainer.save_strategy to no."
            ) from error


def check_views(model: Any, rows: Rows) -> None:
    """Raise where an augmenting model reads the content of messages alone, and the data hold none.

    Raises:
        ConfigError: naming the model.
    """
    for name in model.model.active:
        if not any(model.model.shows(name, row["input_ids"]) for row in rows[:LOOKED_AT]):
            raise ConfigError(
                f"model.augmenting_view: expected conversations in the anchor's chat template, but the augmenting "
                f"model {name!r} would see nothing of the data; give 'messages', or leave the view out."
            )


def _part(entry: dict[str, Any] | None, key: str) -> Any:
    """A part of a composition's configuration; of a fingerprint, what does not hang on how the model was loaded."""
    found = (entry or {}).get(key)
    return {k: v for k, v in found.items() if k != "dtype"} if key == "fingerprint" and found else found
