"""A token of the hub that no file holds: trainers pickle their arguments beside each checkpoint, and upload them."""

from __future__ import annotations

from typing import Any

__all__ = ["KEY", "UnwrittenToken"]

KEY = "hub_token"
"""What the trainers call it among their arguments."""


class UnwrittenToken(str):
    """A token that is pickled as None; in all else it is its text."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __copy__(self) -> UnwrittenToken:
        return self

    def __deepcopy__(self, memo: Any) -> UnwrittenToken:
        return self
