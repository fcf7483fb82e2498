"""The mean of what items gain by the right prompt, with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["paired"]

DRAWS = 2000


def paired(gains: Sequence[float], sizes: Sequence[float] | None = None) -> tuple[float, float, float]:
    """The mean gain and its 95 % interval, by a bootstrap over items.

    Args:
        gains: of each item, with the right prompt and another one.
        sizes: what they are gains over; the mean is the sum of the gains by the sum of these. 1 each by default.
    """
    top = np.asarray(gains, dtype=float)
    below = np.ones_like(top) if sizes is None else np.asarray(sizes, dtype=float)
    drawn = np.random.default_rng(0).integers(len(top), size=(DRAWS, len(top)))
    low, high = np.quantile(top[drawn].sum(1) / below[drawn].sum(1), [0.025, 0.975])
    return float(top.sum() / below.sum()), float(low), float(high)
