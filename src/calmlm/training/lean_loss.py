"""Logits where there is a label, and nowhere else: the head over a large vocabulary is a good part of a step.

It is done with two arguments that models of transformers and TRL's head take: ``logits_to_keep``, the positions, and
``shift_labels``, what is to be predicted in them. (Without Triton TRL's head goes over all positions it is given.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calmlm.data.labels import IGNORE

__all__ = ["lean"]


def lean(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with which a model computes logits at those positions alone that predict a label.

    Args:
        batch: with ``labels`` (B, T) int64. One that says by itself which logits it wants, has no label at all, or one
            everywhere, comes back as it is.

    Returns:
        the batch with ``logits_to_keep`` (B, T) bool, N of which are true, and ``shift_labels`` (N,) int64.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or "logits_to_keep" in batch or "shift_labels" in batch:
        return batch
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    kept = shifted != IGNORE
    if not kept.any() or kept[:, :-1].all():
        return batch
    return {**batch, "logits_to_keep": kept, "shift_labels": shifted[kept]}
