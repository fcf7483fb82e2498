"""A confidence cascade: the small model answers where it is sure, the anchor where it is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calmlm.baselines.choosing import Routed
from calmlm.baselines.given import Bases, Budget, Data, losses_of
from calmlm.baselines.router import prompts_of
from calmlm.experiments.prompt_choice import positions

__all__ = ["Confidence", "best_threshold", "fit"]

ANCHOR, SMALL = 0, 1


class Confidence:
    """Chooses the small model where the probability of its first answer token reaches a threshold.

    Args:
        model: the small model.
        threshold: from 0 to 1; above 1 the anchor answers everything.
    """

    def __init__(self, model: Any, threshold: float) -> None:
        self.model, self.threshold = model, threshold

    @torch.no_grad()
    def of(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The largest probability of the next token, (B,) float32; prompts are padded on the left."""
        given = positions(self.model, attention_mask)
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **given).logits[:, -1]
        return logits.float().softmax(-1).amax(-1)

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Indices of the chosen models: 1 for the small one."""
        return (self.of(input_ids, attention_mask) >= self.threshold).long()


def best_threshold(confidence: Tensor, small: Tensor, anchor: Tensor) -> float:
    """The threshold with the lowest total loss.

    Args:
        confidence: (rows,).
        small, anchor: the losses of both models on the rows.
    """
    order = confidence.argsort(descending=True)
    gain = (small - anchor)[order].cumsum(0)  # the total change when the surest rows go to the small model
    sure = confidence[order]
    # A threshold takes all rows that are equally sure, or none.
    gain[:-1][sure[:-1] == sure[1:]] = torch.inf
    best = int(gain.argmin())
    return float(sure[best]) if gain[best] < 0 else 2.0


def fit(bases: Bases, data: Data, budget: Budget) -> Routed:
    """Set the threshold on the validation rows; nothing is trained."""
    rows, pad = data.validation, bases.tokenizer.pad_token_id
    with budget.meter.counting():
        small, anchor = (losses_of(model, rows, pad) for model in (bases.augmenting, bases.anchor))
        choose = Confidence(bases.augmenting, 0.0)
        sure = torch.cat(
            [
                choose.of(*prompts_of(rows[start : start + 128], pad, bases.augmenting.device)).cpu()
                for start in range(0, len(rows), 128)
            ]
        )
    choose.threshold = best_threshold(sure, small, anchor)
    return Routed([bases.anchor, bases.augmenting], choose)
