"""Optional dependencies: a kind word when one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from calmlm.errors import MissingExtraError


def require(package: str, extra: str, purpose: str) -> None:
    """Check that an optional package is installed; a package that is installed and broken shows its own error.

    Raises:
        MissingExtraError: it is not installed.
    """
    if find_spec(package) is None:
        raise MissingExtraError(package, extra, purpose)
