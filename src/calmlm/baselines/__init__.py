"""The systems that a composition is compared with, one file each, under one signature.

``fit(bases, data, budget)`` returns a model with ``generate``. Merging and the mixture of experts need two models of
one architecture: they take ``bases.twin``, a model of the anchor's architecture that knows what m_A knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calmlm.baselines import confidence_cascade, fine_tuning, fisher, lora, merging, mixture, router, soup, text_tool
from calmlm.baselines.given import Bases, Budget, Data

__all__ = ["BASELINES", "Bases", "Budget", "Data"]

BASELINES: dict[str, Callable[[Bases, Data, Budget], Any]] = {
    "fine_tuning": fine_tuning.fit,
    "continued_pretraining": fine_tuning.fit_on_corpus,
    "lora": lora.fit,
    "lora_full_data": lora.fit_on_corpus,
    "soup": soup.fit,
    "soup_greedy": soup.fit_greedily,
    "fisher": fisher.fit,
    **merging.fit,
    "moe": mixture.fit,
    "router": router.fit,
    "confidence_cascade": confidence_cascade.fit,
    "text_tool": text_tool.fit,
}
