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


Place = Annotated[str, expanded]
"""A setting that names a file or a folder, or an id in its place; ``calmlm.training.fields`` expands it."""
