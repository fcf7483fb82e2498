"""``CalmModel``: the anchor's last hidden state, with the composition in it."""

from __future__ import annotations

from calmlm.modeling.calm_model import CalmModel
from calmlm.modeling.parent import CalmPreTrainedModel

__all__ = ["CalmModel", "CalmPreTrainedModel"]
