"""Files of results that say what is still to come, so that a run that was stopped can go on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from calmlm.errors import CheckpointError, ConfigError, DataError, first_line
from calmlm.files.fetching import fetch
from calmlm.files.loading import read_config
from calmlm.files.results import to_json
from calmlm.files.storage import WEIGHTS_NAME, alignment_name

__all__ = ["read_stored", "settings_of", "written"]

Results = dict[str, dict[str, Any]]
SAME = ("settings", "versions", "commit")
"""What has to be the same for results to stand in one file."""


def settings_of(source: str, tasks: Sequence[str], **options: Any) -> dict[str, Any]:
    """All that decides about the figures of a run: what is measured, on what, and how, as plain data.

    Args:
        source: folder or id of a composition.
        tasks: names.
        options: of ``harness.evaluate``, but for those that say where and how fast it runs.
    """
    try:
        with fetch(source, WEIGHTS_NAME, {}).open("rb") as file:
            weights = hashlib.file_digest(file, "sha256")
        augmenting = read_config(source, {}).augmenting
        texts = [alignment_name(name) for name, entry in augmenting.items() if entry.get("reads") == "text"]
        for beside in ("config.json", *sorted(texts)):
            weights.update(fetch(source, beside, {}).read_bytes())
        digest = weights.hexdigest()
    except (CheckpointError, OSError):  # measuring says what is wrong with it
        digest = None
    try:
        harness = version("lm_eval")
    except PackageNotFoundError:
        harness = None
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in options.items()}
    return {"composition": source, "weights": digest, "tasks": list(tasks), **plain, "lm_eval": harness}


def written(results: Mapping[str, Any], to_come: Sequence[str], made: Mapping[str, Any]) -> str:
    """What stands in a file of results.

    Args:
        results: by task.
        to_come: tasks that were not measured yet; none where the file is whole.
        made: the settings, and what it was measured with.
    """
    return to_json({"results": results, "to_come": list(to_come), **made}, indent=1) + "\n"


def read_stored(path: Path, made: Mapping[str, Any]) -> tuple[Results, list[str]] | None:
    """The results that lie in a file, and the tasks that are still to be measured; None where there is no file.

    A task that failed is one of those.

    Args:
        path: of the file.
        made: as for ``written``, of the run that is to go on.

    Raises:
        DataError: the file is none of these, or damaged.
        ConfigError: it is of other settings or versions.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        results, to_come = dict(found["results"]), list(found["to_come"])
        if not isinstance(found["to_come"], list) or not all(isinstance(task, str) for task in to_come):
            raise ValueError("tasks that are no names")
        failed = [task for task, metrics in results.items() if "failed" in metrics]
        others = [key for key in SAME if found[key] != made[key]]
        others += [key for key in made["settings"] if found["settings"].get(key) != made["settings"][key]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"Results that --resume goes on with must say what is still to come, but {path} does not "
            f"({first_line(error)}): leave --resume out, or name another file."
        ) from None
    if others:
        raise ConfigError(
            f"Results that --resume goes on with must be of the same composition, settings and versions, but {path} is "
            f"of another {others[-1]}: leave --resume out, or name another file."
        )
    return {task: results[task] for task in results if task not in failed}, [*failed, *to_come]
