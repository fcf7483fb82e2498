"""From cells to figures: means and intervals, differences between methods, what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["Scores", "by_method", "difference", "interval", "joined", "kept", "share"]

DRAWS = 2000
Scores = dict[int, list[float]]
"""The items' scores, by seed."""


def interval(scores: Scores, same_items: bool = False, draws: int = DRAWS) -> tuple[float, float, float]:
    """The mean over seeds and items, and its 95 % interval.

    A two-level bootstrap: seeds are drawn with replacement, then the items of each; where all seeds are asked the same
    items, items are drawn once for all of them.
    """
    rng = np.random.default_rng(0)
    arrays = [np.asarray(values, dtype=float) for values in scores.values()]
    means = np.array([_resampled(arrays, rng, same_items) for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([array.mean() for array in arrays])), float(low), float(high)


def share(scores: Scores, same_items: bool = False) -> tuple[float, float, float]:
    """As ``interval``, for scores from 0 to 1: where all are 0 or all 1, the exact limit of the binomial.

    A bootstrap of n equal items has no width; a share of ``0.025 ** (1 / n)`` still gives n right ones at times.
    """
    values = {value for items in scores.values() for value in items}
    mean, low, high = interval(scores, same_items)
    if values in ({0.0}, {1.0}):
        counts = [len(items) for items in scores.values()]
        limit = 0.025 ** (1 / (counts[0] if same_items else sum(counts)))
        low, high = (limit, 1.0) if values == {1.0} else (0.0, 1.0 - limit)
    return mean, low, high


def _resampled(arrays: Sequence[np.ndarray], rng: np.random.Generator, same_items: bool) -> float:
    chosen = rng.integers(len(arrays), size=len(arrays))
    if same_items:
        items = rng.integers(len(arrays[0]), size=len(arrays[0]))
        return float(np.mean([arrays[i][items].mean() for i in chosen]))
    return float(np.mean([arrays[i][rng.integers(len(arrays[i]), size=len(arrays[i]))].mean() for i in chosen]))


def difference(first: Scores, second: Scores, same_items: bool = False) -> tuple[float, float, float]:
    """By how much the first is above the second, item by item on the seeds that both have, and its 95 % interval."""
    shared = sorted(set(first) & set(second))
    return interval({seed: list(np.subtract(first[seed], second[seed])) for seed in shared}, same_items)


def kept(
    by_task: dict[str, Scores], before: dict[str, Scores], tasks: Sequence[str], same_items: bool = False
) -> tuple[float, float, float]:
    """What became of the tasks that m_B could do: the mean of after minus before, and its 95 % interval."""
    return difference(joined(by_task, tasks), joined(before, tasks), same_items)


def joined(by_task: dict[str, Scores], tasks: Sequence[str]) -> Scores:
    """The items of several tasks as those of one."""
    seeds = set.intersection(*(set(by_task[task]) for task in tasks))
    return {seed: [value for task in tasks for value in by_task[task][seed]] for seed in sorted(seeds)}


def by_method(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, Scores]]:
    """``[method][task][seed]`` from the cells of one experiment."""
    found: dict[str, dict[str, Scores]] = {}
    for cell in cells:
        for task, values in cell["scores"].items():
            found.setdefault(cell["method"], {}).setdefault(task, {})[cell["seed"]] = values
    return found
