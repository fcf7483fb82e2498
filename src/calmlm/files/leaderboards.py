"""Results of benchmarks beside a composition, in the form in which the hub reads them: ``.eval_results/*.yaml``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, parse_eval_result_entries

from calmlm.errors import ConfigError, DataError, WriteError, first_line, unwritten
from calmlm.files.card import CARD_NAME, with_results
from calmlm.files.storage import text_writer, write_together

RESULTS = ".eval_results"


def read_results(folder: Path) -> list[EvalResultEntry]:
    """The results that lie beside a composition, in the order of their files' names.

    Raises:
        DataError: for a file that is damaged.
    """
    found: list[EvalResultEntry] = []
    for path in sorted((folder / RESULTS).glob("*.yaml")):
        try:
            found += parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            raise DataError(
                f"Expected results of benchmarks as the hub reads them, but {path} is none ({first_line(error)}); "
                f"remove it, or write it again."
            ) from None
    return found


def write_results(folder: str | Path, results: Sequence[EvalResultEntry]) -> None:
    """Write results beside a composition, and into the table of its card; earlier ones of the same tasks go.

    Args:
        folder: of a saved composition.
        results: of benchmarks; results with other ``notes`` are others.

    Raises:
        ConfigError: the folder is none, or a result is no number or has no data set with an owner.
        DataError: an earlier file there is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(f"Results must lie beside a saved composition, but {folder} holds none: name its folder.")
    check_results(results)
    files = {file_of(entry): [entry] for entry in results}
    kept = {file_of(entry): [entry] for entry in read_results(folder)} | files
    card = folder / CARD_NAME
    try:
        write_together(folder / RESULTS, {name: text_writer(to_yaml(entries)) for name, entries in files.items()})
        if card.is_file():
            every = [entry for entries in kept.values() for entry in entries]
            write_together(folder, {CARD_NAME: text_writer(with_results(card.read_text(encoding="utf-8"), every))})
    except OSError as error:
        raise WriteError(
            f"Expected to write results in {folder}, but that failed ({unwritten(error)}): make room, then write "
            f"them again."
        ) from error


def check_results(results: Sequence[EvalResultEntry]) -> None:
    """Raise for results that the hub would not read.

    Raises:
        ConfigError: naming the first.
    """
    for entry in results:
        value: Any = entry.value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ConfigError(
                f"The result of a benchmark must be a number, but that of {entry.dataset_id!r} is {value!r}: leave it "
                f"out."
            )
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(entry.dataset_id)) or not entry.task_id:
            raise ConfigError(
                f"The result of a benchmark must name a data set of the hub, as owner/name, and a task of it, but got "
                f"{entry.dataset_id!r} and {entry.task_id!r}: name both."
            )


def to_yaml(results: Sequence[EvalResultEntry]) -> str:
    """What a file of results holds."""
    return yaml.safe_dump(eval_result_entries_to_yaml(list(results)), sort_keys=False, allow_unicode=True)


def file_of(entry: EvalResultEntry) -> str:
    """The file of a result: one for each data set, task and way of measuring it."""
    words = [entry.dataset_id, entry.task_id, *([entry.notes] if entry.notes else [])]
    return re.sub(r"[^\w.-]+", "_", "_".join(words)).strip("._") + ".yaml"
