"""The errors that calmlm raises on purpose.

    CalmError
    ├── ConfigError        a setting is wrong: a connection, a preset, a key of a YAML file
    ├── ModelError         a model cannot be found, loaded or composed
    │   └── CheckpointError    a saved composition is damaged, foreign or belongs to another base
    ├── DataError          a data file or a prompt cannot be used
    └── MissingExtraError  an optional dependency is not installed

Every message is one sentence that says what was expected, what arrived and what to do. The command line prints
the message alone and exits with status 2.
"""

from __future__ import annotations

import errno
import re
import sys
import warnings
from types import FrameType
from typing import cast

__all__ = [
    "CalmError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "MissingExtraError",
    "ModelError",
    "WriteError",
    "first_line",
    "is_full",
    "unwritten",
    "warn",
]


class CalmError(Exception):
    """Base of every error that calmlm raises on purpose."""


class ConfigError(CalmError, ValueError):
    """A setting is wrong: a connection, a preset, a key of a configuration file."""


class ModelError(CalmError, ValueError):
    """A model cannot be found, loaded or composed."""


class CheckpointError(ModelError):
    """A saved composition is damaged, foreign, or was made on other base models."""


class DataError(CalmError, ValueError):
    """A data file, a line of it, or a prompt cannot be used."""


class WriteError(CalmError, OSError):
    """A file cannot be written: the disk is full, say."""


class MissingExtraError(CalmError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.said = (package, extra, purpose)
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; "
            f"install it with: pip install 'calmlm[{extra}]'."
        )

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        """Pickled by what it was made of, so that it comes out of a worker as itself."""
        return type(self), self.said


def first_line(error: BaseException) -> str:
    """The first sentence of an error's message, at most one line of it, without its final full stop."""
    lines = str(error).strip().splitlines()
    return re.split(r"\.\s+(?=[A-Z])", lines[0])[0].rstrip(". ") if lines else type(error).__name__


def is_full(error: BaseException) -> bool:
    """Whether a disk without room is behind an error; safetensors and torch say so in their messages alone."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    full = full or (error.__cause__ is not None and is_full(error.__cause__))
    return full or any(sign in str(error) for sign in (f"os error {errno.ENOSPC}", "inline_container"))


def unwritten(error: BaseException) -> str:
    """Why something could not be written, in a few words."""
    return "the disk is full" if is_full(error) else first_line(error)


def warn(message: str) -> None:
    """Warn, at the line outside of calmlm that led here."""
    level, at = 1, cast("FrameType | None", sys._getframe())
    while at is not None and str(at.f_globals.get("__name__")).split(".")[0] in ("calmlm", "contextlib"):
        level, at = level + 1, at.f_back
    warnings.warn(message, stacklevel=level)
