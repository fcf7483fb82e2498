"""Where a text ends whose augmenting models read another one in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from calmlm.data.context import EndOfContext, OwnContext

__all__ = ["EndOfOther"]


class EndOfOther(StoppingCriteria):
    """Ends a text where an augmenting model has no room for what it reads in its place.

    Args:
        limits: the contexts of the models.
        other: what is read in place of the prompt.
        width: columns of the prompt.
    """

    def __init__(self, limits: Sequence[OwnContext], other: list[int], width: int) -> None:
        self.end, self.other, self.width = EndOfContext(limits, len(other)), other, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows of (B, T) ids end, (B,) bool."""
        other = input_ids.new_tensor(self.other).expand(len(input_ids), -1)
        return self.end(torch.cat((other, input_ids[:, self.width :]), dim=1), scores)
