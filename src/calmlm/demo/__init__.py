"""The demonstration: two small models that cannot calculate with keys, and their composition that can."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODELS"]

MODELS = Path(__file__).parent / "models"
"""The folder of the trained models that come with calmlm: ``augmenting``, ``anchor`` and ``composition``."""
