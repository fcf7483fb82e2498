"""From cells to figures: means and intervals, differences between methods, what was kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Scores", "by_method", "columns_of", "difference", "interval", "kept", "known", "share"]

DRAWS = 2000
Scores = dict[int, list[float]]
"""The items' scores in one column, by seed."""


def interval(*columns: Scores, same_items: bool = False, draws: int = DRAWS) -> tuple[float, float, float]:
    """The mean over columns of their means over seeds and items, and its 95 % interval.

    A two-level bootstrap: seeds are drawn with replacement, then the items of each column; where all seeds are asked
    the same items, items are drawn once for all of them.
    """
    rng = np.random.default_rng(0)
    arrays = [[np.asarray(column[seed], dtype=float) for column in columns] for seed in columns[0]]
    means = np.array([_resampled(arrays, rng, same_items) for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([array.mean() for seed in arrays for array in seed])), float(low), float(high)


def share(*columns: Scores, same_items: bool = False) -> tuple[float, float, float]:
    """As ``interval``, for scores from 0 to 1: where all are 0 or all 1, the exact limit of the binomial."""
    mean, low, high = interval(*columns, same_items=same_items)
    values = {value for column in columns for items in column.values() for value in items}
    if values in ({0.0}, {1.0}):
        limit = _limit(columns, same_items)
        low, high = (limit, 1.0) if values == {1.0} else (0.0, 1.0 - limit)
    return mean, low, high


def difference(
    first: Sequence[Scores], second: Sequence[Scores], same_items: bool = False
) -> tuple[float, float, float]:
    """By how much the first is above the second, item by item on the seeds that both have, and its 95 % interval.

    Args:
        first, second: the same columns of two methods, scores from 0 to 1.
        same_items: whether all seeds are asked the same.
    """
    pairs = list(zip(first, second, strict=True))
    seeds = sorted(set.intersection(*(set(one) & set(other) for one, other in pairs)))
    columns = [{seed: list(np.subtract(one[seed], other[seed])) for seed in seeds} for one, other in pairs]
    mean, low, high = interval(*columns, same_items=same_items)
    values = {value for column in columns for items in column.values() for value in items}
    if len(values) == 1 and values <= {-1.0, 0.0, 1.0}:
        # So many equal ones come at times where a share of 1 - limit is otherwise, by the whole range at most.
        missed = 1.0 - _limit(columns, same_items)
        width = missed if values == {0.0} else 2 * missed
        low, high = max(-1.0, mean - width), min(1.0, mean + width)
    return mean, low, high


def kept(
    by_task: dict[str, Scores], before: dict[str, Scores], tasks: Sequence[str], same_items: bool = False
) -> tuple[float, float, float]:
    """What became of the tasks that m_B could do: the mean of after minus before, and its 95 % interval."""
    return difference(columns_of(by_task, tasks), columns_of(before, tasks), same_items)


def columns_of(by_task: dict[str, Scores], tasks: Sequence[str]) -> list[Scores]:
    """Several tasks, each with the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(by_task[task]) for task in tasks)))
    return [{seed: by_task[task][seed] for seed in seeds} for task in tasks]


def _limit(columns: Sequence[Scores], same_items: bool) -> float:
    """The share of right items that at times still gives right ones alone; a bootstrap of these has no width."""
    counts = [sum(lengths) for lengths in zip(*([len(i) for i in c.values()] for c in columns), strict=True)]
    return float(0.025 ** (1 / (counts[0] if same_items else sum(counts))))


def _resampled(arrays: Sequence[Sequence[np.ndarray]], rng: np.random.Generator, same_items: bool) -> float:
    chosen = rng.integers(len(arrays), size=len(arrays))
    if same_items:
        drawn = [rng.integers(len(array), size=len(array)) for array in arrays[0]]
        means = [array[items].mean() for i in chosen for array, items in zip(arrays[i], drawn, strict=True)]
    else:
        means = [array[rng.integers(len(array), size=len(array))].mean() for i in chosen for array in arrays[i]]
    return float(np.mean(means))


def known(figure: float | None) -> bool:
    """Whether there is a figure: a loss that is not a number has none."""
    return figure is not None and not math.isnan(figure)


def by_method(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, Scores]]:
    """``[method][task][seed]`` from the cells of one experiment; a null stands for what is not a number."""
    found: dict[str, dict[str, Scores]] = {}
    for cell in cells:
        for task, values in cell["scores"].items():
            numbers = np.asarray(values, dtype=float).tolist()
            found.setdefault(cell["method"], {}).setdefault(task, {})[cell["seed"]] = numbers
    return found
