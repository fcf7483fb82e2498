"""Means over seeds and items with their intervals."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["INTERVAL", "interval", "rows_of"]

INTERVAL = (
    "95 % confidence intervals by a two-level bootstrap with 10,000 draws: seeds are drawn with replacement, then the "
    "items of each. With few seeds they understate the variation between seeds."
)


def interval(shares: Sequence[float], items: int, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % interval of the mean of ``shares`` (per cent, one per seed, each over ``items`` items)."""
    rng = random.Random(0)
    means = []
    for _ in range(draws):
        total = 0.0
        for _ in shares:
            share = rng.choice(shares) / 100
            # The normal approximation of the binomial; exact at shares of 0 and 1.
            total += min(1.0, max(0.0, rng.gauss(share, (share * (1 - share) / items) ** 0.5)))
        means.append(100 * total / len(shares))
    means.sort()
    return means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def rows_of(
    scores: dict[int, dict[str, dict[str, float]]], items: int, methods: Iterable[str], columns: Iterable[str]
) -> list[dict[str, Any]]:
    """Turn ``scores[seed][method][column]``, in per cent over ``items`` items each, into the rows of a table."""
    rows = []
    columns = list(columns)
    for method in methods:
        for column in columns:
            by_seed = {seed: table[method][column] for seed, table in scores.items() if method in table}
            if not by_seed:
                continue
            shares = list(by_seed.values())
            low, high = interval(shares, items)
            rows.append(
                {
                    "method": method,
                    "column": column,
                    "mean": round(sum(shares) / len(shares), 2),
                    "low": round(low, 2),
                    "high": round(high, 2),
                    "seeds": len(shares),
                    "per_seed": {str(seed): round(share, 2) for seed, share in by_seed.items()},
                }
            )
    return rows
