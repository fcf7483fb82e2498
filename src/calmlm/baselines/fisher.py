"""Fisher-weighted averaging (Matena and Raffel, 2022): each weight counts as much as its model is sure of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calmlm.baselines.given import Bases, Budget, Data, check_same_shapes, least_loss, padded
from calmlm.experiments.fitting import IGNORED, Row

__all__ = ["diagonal_fisher", "fit", "merge"]

EXAMPLES = 256  # rows from which a Fisher information is estimated
FLOOR = 1e-6  # added to each, so that weights of which no model is sure are averaged
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of m_B, the best of which is taken


def diagonal_fisher(model: PreTrainedModel, rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information: the mean over rows of the squared gradient of the row's loss.

    ``F = (1/N) sum_n (d/dtheta log p(y_n | x_n))^2``, where the log likelihood sums over a row's labelled tokens.

    Returns:
        by name, in the shape of each weight, float32.
    """
    model = copy.deepcopy(model).requires_grad_(True).eval()
    total = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in model.named_parameters()}
    for row in rows:
        batch = padded([row], pad, model.device)
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1].float()
        labels = batch["labels"][0, 1:]
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        model.zero_grad()
        loss.backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                total[name] += weight.grad.float() ** 2
    return {name: value / max(1, len(rows)) for name, value in total.items()}


def spread(rows: Sequence[Row]) -> list[Row]:
    """As many rows as are looked at, from beginning to end: a corpus may begin with its simplest ones."""
    count = min(EXAMPLES, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def scaled(fisher: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """A Fisher information with the mean ``share`` over all weights.

    Its own scale says how far a model is from having learned its data, and would decide alone.
    """
    count = sum(value.numel() for value in fisher.values())
    mean = float(sum(value.double().sum() for value in fisher.values())) / count
    return {name: value * (share / mean) if mean > 0 else value for name, value in fisher.items()}


def merge(models: Sequence[PreTrainedModel], fishers: Sequence[dict[str, Tensor]]) -> PreTrainedModel:
    """``theta = sum_i F_i theta_i / sum_i F_i``, weight by weight.

    Raises:
        ModelError: when the models differ in shape.
    """
    check_same_shapes(list(models), "Fisher-weighted averaging")
    made = copy.deepcopy(models[0])
    states = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name, weight in made.named_parameters():
            certain = [fisher[name] + FLOOR for fisher in fishers]
            parts = zip(certain, states, strict=True)
            weighted = torch.stack([fisher * state[name].float() for fisher, state in parts]).sum(0)
            weight.copy_((weighted / torch.stack(certain).sum(0)).to(weight.dtype))
    return made.eval()


def fit(bases: Bases, data: Data, budget: Budget) -> PreTrainedModel:
    """Merge m_B, sure of what D_C asks, and its twin, sure of m_A's corpus; nothing is trained.

    How much each counts is chosen by the loss on the validation rows (section 3.3 of the paper tunes it likewise).
    """
    anchor, twin = bases.merging_pair("Fisher-weighted averaging")
    pad = bases.tokenizer.pad_token_id
    with budget.meter.counting():
        fishers = [
            diagonal_fisher(anchor, spread(data.composition), pad),
            diagonal_fisher(twin, spread(data.corpus), pad),
        ]
    tried = [merge([anchor, twin], [scaled(fishers[0], share), scaled(fishers[1], 1.0 - share)]) for share in SHARES]
    return least_loss(tried, bases, data, budget)
