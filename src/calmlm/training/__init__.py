"""Training a composition from a configuration file."""

from __future__ import annotations

from calmlm.training.schema import TrainingConfig, load_config

__all__ = ["TrainingConfig", "load_config"]
