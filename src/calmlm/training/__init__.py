"""Training a composition from a configuration file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calmlm.training.schema import TrainingConfig, load_config

__all__ = ["TrainingConfig", "load_config"]


def __getattr__(name: str) -> Any:
    """Public names on first use: the page of help needs this room, and no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from calmlm.training import schema

    return getattr(schema, name)
