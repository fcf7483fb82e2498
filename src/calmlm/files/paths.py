"""Paths as people write them in configurations and on command lines."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from calmlm.errors import ConfigError

Written = TypeVar("Written", str, Path, None)


def expanded(path: Written) -> Written:
    """``path`` with ``~`` or ``~user`` at its start written out, as a shell and transformers' Trainer read it.

    Called once, where a path is read. Everything else stays: an id of the hub, ``$HOME``, the name of no user.

    Raises:
        ConfigError: no file can be called so: it is too long, or holds a null character or half of another.
    """
    if path is None:
        return path
    try:
        written = os.path.expanduser(path)
        os.lstat(written)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            return type(path)(written)  # nothing lies there yet, or nobody may look
        half = isinstance(error, UnicodeEncodeError)
        reason = "half of a character" if half else getattr(error, "strerror", None) or error
        shown = repr(str(path))
        raise ConfigError(
            f"A path or an id must be a name that a file can have, but got "
            f"{shown if len(shown) <= 60 else shown[:57] + '...'} ({reason}): write another."
        ) from None
    return type(path)(written)


def named(source: Any) -> str:
    """``expanded`` for what a caller has to name: a folder or an id.

    Raises:
        ConfigError: it is neither text nor a path, or as above.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(
            f"A folder or an id must be named by text or a path, but got {type(source).__name__}: write its name."
        )
    return expanded(str(source))


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file, wherever a link leads, lies in a folder, or among the blobs of the hub's cache behind it."""
    folder = folder.resolve()
    snapshots = [place for place in folder.parents if place.name == "snapshots"]
    return any(root in path.resolve().parents for root in (folder, *(place.parent / "blobs" for place in snapshots)))


Place = Annotated[str, expanded]
"""A setting that names a file or a folder, or an id in its place; ``calmlm.training.fields`` expands it."""
