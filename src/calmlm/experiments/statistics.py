"""Means over seeds and items with their intervals."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["INTERVAL", "cells_of", "interval", "rows_of", "table_of"]

INTERVAL = (
    "95 % confidence intervals by a two-level bootstrap with 10,000 draws: seeds are drawn with replacement, then the "
    "items of each. With few seeds they understate the variation between seeds."
)


def interval(shares: Sequence[float], items: int, draws: int = 10_000) -> tuple[float, float]:
    """Return the 95 % interval of the mean of ``shares`` (per cent, one per seed, each over ``items`` items).

    Where all are 0 or all 100 a bootstrap has no width: there it is the exact limit of the binomial.
    """
    if set(shares) in ({0.0}, {100.0}):
        limit = 100 * 0.025 ** (1 / (items * len(shares)))
        return (limit, 100.0) if 100.0 in shares else (0.0, 100.0 - limit)
    rng = random.Random(0)
    means = []
    for _ in range(draws):
        total = 0.0
        for _ in shares:
            share = rng.choice(shares) / 100
            # The normal approximation of the binomial, which has no width at shares of 0 and 1.
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
            by_seed = {seed: table[method][column] for seed, table in scores.items() if column in table.get(method, {})}
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


def cells_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows by method and column."""
    return {(row["method"], row["column"]): row for row in rows}


def table_of(
    cells: dict[tuple[str, str], dict[str, Any]],
    methods: dict[str, str],
    columns: dict[str, str],
    published: Mapping[str, Mapping[str, float | None]] | None = None,
) -> list[str]:
    """The lines of a markdown table: a line per method that has a row, a column each; published figures in brackets."""
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for method, title in methods.items():
        if not any((method, column) in cells for column in columns):
            continue
        texts = []
        for column in columns:
            row = cells.get((method, column))
            text = "-" if row is None else f"{row['mean']:.1f} ({row['low']:.1f} to {row['high']:.1f})"
            known = (published or {}).get(method, {}).get(column)
            texts.append(text if known is None else f"{text} [{known:.2f}]")
        lines.append(f"| {title} | " + " | ".join(texts) + " |")
    return lines
