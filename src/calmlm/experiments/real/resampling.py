"""Bits per byte over seeds and sentences, with intervals; differences are paired by sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["DRAWS", "Estimate", "Figures", "bits_of", "difference", "estimate", "shares", "shown"]

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """What a method needs for each sentence, over some varieties.

    Attributes:
        nats: (seeds, sentences) float64.
        sizes: bytes, (sentences,) float64.
    """

    nats: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, cells: Sequence[Mapping[str, Any]], varieties: Sequence[str], measure: str = "nats") -> Figures:
        """Those of a method's cells.

        Args:
            cells: one for each seed, as ``calmlm.experiments.real.run`` stores them.
            varieties: over which to add up: the same sentences stand in each.
            measure: ``nats`` or ``swapped_nats``.
        """
        chosen = [[i for i, found in enumerate(cells[0]["varieties"]) if found == variety] for variety in varieties]
        nats = torch.tensor([cell[measure] for cell in cells], dtype=torch.float64)
        sizes = torch.tensor(cells[0]["sizes"]["tested"], dtype=torch.float64)
        return cls(torch.stack([nats[:, i] for i in chosen]).sum(0), torch.stack([sizes[i] for i in chosen]).sum(0))

    @property
    def bits(self) -> float:
        """Bits per byte, the mean over seeds."""
        return float(self.nats.sum(1).mean() / self.sizes.sum()) / math.log(2)

    def drawn(self, seeds: Tensor, sentences: Tensor) -> Tensor:
        """Bits per byte of each draw, (DRAWS,).

        Args:
            seeds: how much each seed counts, (DRAWS, seeds), each row adding up to 1.
            sentences: how often each sentence is drawn, (DRAWS, sentences).
        """
        nats = torch.einsum("ds,sn,dn->d", seeds, self.nats, sentences)
        return nats / (sentences @ self.sizes) / math.log(2)


def shown(found: Estimate | None, form: str = ".3f") -> str:
    """A mean and its interval as text, or a dash."""
    return "-" if found is None else f"{found.mean:{form}} ({found.low:{form}} to {found.high:{form}})"


def bits_of(figures: Figures) -> Estimate:
    """Bits per byte: seeds and sentences are drawn with replacement."""
    generator = torch.Generator().manual_seed(0)
    draws = figures.drawn(shares(len(figures.nats), generator), _draws(len(figures.sizes), generator))
    return estimate(figures.bits, draws)


def difference(one: Figures, other: Figures) -> Estimate:
    """Bits per byte of one minus another: the same sentences are drawn for both, and the same seeds where both have as
    many.
    """
    generator = torch.Generator().manual_seed(0)
    sentences = _draws(len(one.sizes), generator)
    seeds = shares(len(one.nats), generator)
    paired = len(one.nats) == len(other.nats)
    others = seeds if paired else shares(len(other.nats), generator)
    return estimate(one.bits - other.bits, one.drawn(seeds, sentences) - other.drawn(others, sentences))


def _draws(count: int, generator: torch.Generator, draws: int = DRAWS) -> Tensor:
    """How often each of so many is drawn in as many draws with replacement, (draws, count) float64."""
    chosen = torch.randint(count, (draws, count), generator=generator)
    found = torch.zeros(draws, count, dtype=torch.float64)
    return found.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.float64))


def shares(count: int, generator: torch.Generator, draws: int = DRAWS) -> Tensor:
    """The same as shares of a whole: each row adds up to 1."""
    return _draws(count, generator, draws) / count


def estimate(mean: float, draws: Tensor) -> Estimate:
    """A mean with the interval of its draws."""
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(mean, low, high)
