"""The sizes at which the experiment with code runs."""

from __future__ import annotations

from dataclasses import dataclass

from calmlm.experiments.fitting import Stage

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Everything that a run depends on besides its seed."""

    name: str
    vocabulary: int
    augmenting_size: tuple[int, int, int]
    anchor_size: tuple[int, int, int]
    augmenting: Stage
    anchor: Stage
    composition: Stage
    connections: tuple[tuple[int, int], ...]
    heads: int = 4
    composition_share: float = 0.3
    """Share of the functions that D_C may show."""
    items: int = 200
    """Evaluation items per task, before those are left out that D_C shows otherwise or that come twice."""
    passages: int = 60
    """Passages of the standard library on which bits per byte are measured."""


_TINY = Preset(
    name="tiny",
    vocabulary=400,
    augmenting_size=(48, 2, 2),
    anchor_size=(64, 3, 2),
    augmenting=Stage(60, 16, 4e-3),
    anchor=Stage(60, 16, 3e-3),
    composition=Stage(20, 16, 5e-3),
    connections=((1, 0), (1, 2)),
    items=12,
    passages=6,
)

_SMALL = Preset(
    name="small",
    vocabulary=1000,
    augmenting_size=(96, 4, 4),
    anchor_size=(128, 4, 4),
    augmenting=Stage(2000, 40, 3e-3),
    anchor=Stage(2000, 48, 2e-3),
    composition=Stage(2400, 48, 4e-3),
    # Where m_B writes what m_A would write next; an earlier one as well disturbs that (see the log).
    connections=((3, 3),),
    heads=8,
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (_TINY, _SMALL)}
