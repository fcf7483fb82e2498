"""Losses of single tokens."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["token_nats"]

AT_ONCE = 16  # logits that become float32 at a time, which fit into a cache


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-probabilities (n,) in float32 of targets (n,) by logits (n, V), a few at a time."""
    parts = zip(logits.split(AT_ONCE), targets.split(AT_ONCE), strict=True)
    found = [torch.nn.functional.cross_entropy(each.float(), wanted, reduction="none") for each, wanted in parts]
    return torch.cat(found) if found else logits.new_zeros(0, dtype=torch.float32)
