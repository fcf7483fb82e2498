"""What a model card says of a training: its data, by id or file name, and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calmlm.data.sources import HubDataset
from calmlm.files.card import Learned


def learned(train: list[str | HubDataset], evaluation: list[str | HubDataset], examples: int, state: Any) -> Learned:
    """What to say of a run.

    Args:
        train: sources of its examples.
        evaluation: sources of those that it was evaluated on.
        examples: how many it was trained on.
        state: the trainer's.
    """
    sources = [*train, *evaluation]
    # The folder of a file is of this machine, and a data set may be a folder as well.
    ids = [source.dataset for source in sources if isinstance(source, HubDataset) and not Path(source.dataset).exists()]
    lines = [f"trained on {_words(source)}" for source in train]
    lines += [f"evaluated on {_words(source)}" for source in evaluation]
    figures = {"examples": f"{examples:,}", "steps": f"{state.global_step:,}"}
    # The last ones that were logged: a run's mean counts the steps since it was last gone on with.
    for name, key in (("training loss", "loss"), ("evaluation loss", "eval_loss")):
        found = [entry[key] for entry in state.log_history if key in entry]
        if found:
            figures[name] = f"{found[-1]:.4g}"
    return Learned(tuple(dict.fromkeys(ids)), tuple(lines), figures)


def _words(source: str | HubDataset) -> str:
    if not isinstance(source, HubDataset):
        return f"`{Path(source).name}`"
    name = Path(source.dataset).name if Path(source.dataset).exists() else source.dataset
    parts = [f"configuration {source.name}"] if source.name else []
    parts += [f"split {source.split}"]
    parts += [f"revision {source.revision}"] if source.revision else []
    return f"`{name}` ({', '.join(parts)})"
