"""What can be tried at once: two small models that calculate with keys, and two real ones that translate."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODELS", "TRANSLATION"]

MODELS = Path(__file__).parent / "models"
"""The folder of the trained models that come with calmlm: ``augmenting``, ``anchor`` and ``composition``."""
TRANSLATION = Path(__file__).parent / "translation"
"""``composition``, trained for the two models that ``scripts/models`` fetches, and ``sentences.jsonl``."""
