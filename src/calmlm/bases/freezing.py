"""Base models that do not learn, and are as fast as those that do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

__all__ = ["apart", "freeze"]

GAP = 8  # numbers between two states: enough for all dtypes to begin where a processor likes it


def freeze(model: nn.Module) -> None:
    """No gradients, no dropout."""
    model.requires_grad_(False)
    model.eval()


def apart(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments of a frozen head, with states (B, T, D) that are cut out of longer texts as tensors of their own.

    ``logits_to_keep`` cuts them out; None for others. torch multiplies such states row by row, with a copy of all
    weights for each row, where the weights have no gradient: bfloat16 on a CPU takes 20 times as long for one row, and
    150 times for eight. What comes back has gaps where they have some, so that torch rounds as it does for a model that
    learns.
    """
    states = args[0] if args else None
    if not isinstance(states, Tensor) or states.ndim != 3 or states.stride(0) == states.stride(1) * states.shape[1]:
        return None
    if states.is_contiguous():
        return states.clone(memory_format=torch.contiguous_format), *args[1:]
    return pad(states, (0, GAP))[..., :-GAP], *args[1:]
