"""Full fine-tuning of m_B: on D_C, or on all of m_A's corpus (the paper's skyline, continued pre-training)."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from calmlm.baselines.given import Bases, Budget, Data
from calmlm.experiments.fitting import Row
from calmlm.experiments.fitting import fit as train

__all__ = ["fit", "fit_on_corpus"]


def fit(bases: Bases, data: Data, budget: Budget) -> PreTrainedModel:
    """Train every weight of a copy of m_B on D_C."""
    return _fit(bases, data.composition, budget)


def fit_on_corpus(bases: Bases, data: Data, budget: Budget) -> PreTrainedModel:
    """Train every weight of a copy of m_B on what m_A was trained on."""
    return _fit(bases, data.corpus, budget)


def _fit(bases: Bases, rows: list[Row], budget: Budget) -> PreTrainedModel:
    # In lower precision most steps of a training of all weights would be rounded away.
    model = copy.deepcopy(bases.anchor).float().requires_grad_(True)
    train(model, rows, bases.tokenizer.pad_token_id, budget.full, budget.seed, meter=budget.meter)
    return model.to(bases.anchor.dtype).eval()
