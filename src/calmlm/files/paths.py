"""Paths as people write them in configurations and on command lines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeVar

Written = TypeVar("Written", str, Path, None)


def expanded(path: Written) -> Written:
    """``path`` with ``~`` or ``~user`` at its start written out, as a shell and transformers' Trainer read it.

    Called once, where a path is read. Everything else stays: an id of the hub, ``$HOME``, the name of no user.
    """
    return path if path is None else type(path)(os.path.expanduser(path))


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file, wherever a link leads, lies in a folder, or among the blobs of the hub's cache behind it."""
    folder = folder.resolve()
    snapshots = [place for place in folder.parents if place.name == "snapshots"]
    return any(root in path.resolve().parents for root in (folder, *(place.parent / "blobs" for place in snapshots)))


Place = Annotated[str, expanded]
"""A setting that names a file or a folder, or an id in its place; ``calmlm.training.fields`` expands it."""
