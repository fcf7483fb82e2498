"""The sizes at which the experiment with languages runs."""

from __future__ import annotations

from dataclasses import dataclass

from calmlm.experiments.fitting import Stage

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Everything that a run depends on besides its seed."""

    name: str
    low: tuple[str, ...]
    """Languages that m_A knows and m_B has never seen."""
    high: tuple[str, ...]
    """Languages that m_B knows; the first is the one that all terms are translated into."""
    highest: int
    """Numbers are 1 to this."""
    terms: int
    """How many terms are translated."""
    augmenting_size: tuple[int, int, int]
    anchor_size: tuple[int, int, int]
    augmenting: Stage
    anchor: Stage
    composition: Stage
    connections: tuple[tuple[int, int], ...]
    heads: int = 4
    word_share: float = 0.5
    """Share of each low-resource language's number words that D_C uses."""
    term_share: float = 0.3
    """Share of the terms that D_C uses."""
    invented: int = 12
    """Invented languages whose number words m_B knows: letters as of all languages."""
    items: int = 100
    """Evaluation items per task."""


_TINY = Preset(
    name="tiny",
    low=("is", "cy"),
    high=("en", "de"),
    highest=6,
    terms=8,
    augmenting_size=(48, 2, 2),
    anchor_size=(64, 3, 2),
    augmenting=Stage(60, 16, 4e-3, 0.2),
    anchor=Stage(60, 16, 3e-3),
    composition=Stage(20, 16, 5e-3),
    connections=((1, 0),),
    items=16,
)

_SMALL = Preset(
    name="small",
    low=("az", "be", "cy", "eo", "fi", "hu", "is", "lt", "lv", "sk", "sl", "tg"),
    high=("en", "de", "es"),
    highest=30,
    terms=80,
    augmenting_size=(96, 4, 4),
    anchor_size=(128, 4, 4),
    augmenting=Stage(2000, 40, 4e-3, 0.2),
    anchor=Stage(3600, 64, 2e-3),
    composition=Stage(1200, 64, 4e-3, 0.5),
    # Early ones for the value of a number word, a late one for terms that m_A spells out.
    connections=((3, 0), (3, 1), (3, 3)),
    heads=8,
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (_TINY, _SMALL)}
