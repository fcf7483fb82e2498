"""What goes wrong on the way to a hub."""

from __future__ import annotations

from huggingface_hub.errors import HfHubHTTPError

__all__ = ["UNREACHED"]

UNREACHED: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    *(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"),
)
"""No network, a connection that is cut, no right to a repository, no such name. Where the answer does not come at all,
huggingface_hub lets the error of its HTTP library through, which is no ``OSError``."""
