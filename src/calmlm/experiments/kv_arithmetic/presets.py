"""The sizes at which the key-value experiment runs. A preset and a seed determine everything else."""

from __future__ import annotations

from dataclasses import dataclass

from calmlm.experiments.fitting import Stage

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Everything that a run of the experiment depends on besides its seed."""

    name: str
    keys: int
    """How many keys m_A memorises."""
    highest: int
    """Values of keys are 1 to this."""
    operands: tuple[int, int]
    """Fewest and most operands in the evaluation; OOD-hard has one more than the most."""
    composition_operands: tuple[int, int]
    """Fewest and most operands in D_C, which has to show every length that is to be restated."""
    anchor_operands: tuple[int, int]
    """Fewest and most operands in m_B's training."""
    largest_integer: int
    """Integers up to this size are one token each; beyond, they are spelled in digits."""
    augmenting_size: tuple[int, int, int]
    """m_A: hidden size, layers, heads."""
    characters_size: tuple[int, int, int]
    """m_A of single characters."""
    anchor_size: tuple[int, int, int]
    """m_B: hidden size, layers, heads."""
    augmenting: Stage
    characters: Stage
    """m_A of single characters; its texts have more tokens."""
    halves: Stage
    """m_A of half of the keys; it also learns which words it does not know."""
    anchor: Stage
    pieces: Stage
    """m_B of byte pairs, which has to put the pieces of a number word together."""
    composition: Stage
    apart: Stage
    """Training of the composition of two tokenizers: there is more to overfit, so its weights decay faster."""
    connections: tuple[tuple[int, int], ...]
    """(layer of m_A, layer of m_B), counted from 0."""
    heads: int
    operators: tuple[str, ...] = ("+", "-")
    composition_share: float = 0.2
    """Share of the keys that D_C uses."""
    languages: int = 10
    """Invented languages whose number words m_B knows beside the real ones; random letters, as keys are."""
    word_share: float = 0.45
    """Share of the numbers in m_B's training that are written as words."""
    substitution_share: float = 0.35
    """Share of KV-SUBS in m_A's training; the rest are rows of keys and values."""
    numeric_share: float = 0.2
    """Share of D_C that is numeric arithmetic."""
    figure_share: float = 0.15
    """Share of the operands of D_C's key expressions that are in figures."""
    restated_share: float = 0.1
    """Share of D_C's key expressions that are restated only, where D_C is keys arithmetic."""
    first_keys: int = 60
    """How many keys a character-level m_A begins with; their number doubles with each 6 % of its training."""
    joined_share: float = 0.25
    """Share of the rows of a character-level m_A that have no space between key and value."""
    foreign_share: float = 0.2
    """Share of the operands that are number words in the D_C of a model that knows half of the keys."""
    unanswerable_share: float = 0.25
    """Share of questions about words that nobody knows in that D_C; their answers are m_B's own."""
    bpe_size: int = 1000
    """Size of the byte-pair vocabulary."""
    query_key_bias: float = 1.5
    """Start of the connector's bias on queries and keys."""
    items: int = 400
    """Evaluation items per column."""


_TINY = Preset(
    name="tiny",
    keys=600,
    highest=6,
    operands=(2, 2),
    composition_operands=(2, 3),
    anchor_operands=(1, 3),
    largest_integer=20,
    augmenting_size=(64, 4, 4),
    characters_size=(96, 4, 4),
    anchor_size=(96, 4, 4),
    augmenting=Stage(600, 32, 4e-3, 0.2),
    characters=Stage(900, 32, 3e-3, 0.2),
    halves=Stage(600, 32, 4e-3, 0.2),
    anchor=Stage(700, 48, 3e-3),
    pieces=Stage(700, 48, 3e-3),
    composition=Stage(450, 64, 5e-3, 0.1),
    apart=Stage(450, 64, 5e-3, 0.5),
    connections=((3, 0), (3, 1)),
    heads=4,
    items=200,
)

_SMALL = Preset(
    name="small",
    keys=3000,
    highest=12,
    operands=(2, 3),
    composition_operands=(2, 4),
    anchor_operands=(1, 4),
    largest_integer=60,
    augmenting_size=(96, 4, 4),
    characters_size=(128, 4, 4),
    anchor_size=(128, 4, 4),
    augmenting=Stage(1600, 40, 4e-3, 0.2),
    characters=Stage(5000, 40, 3e-3, 0.2),
    halves=Stage(2000, 40, 4e-3, 0.2),
    anchor=Stage(2200, 64, 2e-3),
    pieces=Stage(3600, 64, 2e-3),
    composition=Stage(1200, 96, 4e-3, 0.1),
    apart=Stage(1600, 96, 4e-3, 0.5),
    connections=((3, 0), (3, 1)),
    heads=4,
)

# The paper's data: 25K keys with a value each, 3 to 6 operands, a product too. Numbers are spelled in digits. Meant for
# a GPU; the sizes of the models and the lengths of the trainings are ours.
_PAPER = Preset(
    name="paper",
    keys=25_000,
    highest=25_000,
    operands=(3, 6),
    composition_operands=(3, 7),
    anchor_operands=(1, 7),
    largest_integer=9,
    augmenting_size=(256, 8, 8),
    characters_size=(320, 8, 8),
    anchor_size=(512, 12, 8),
    augmenting=Stage(20_000, 256, 1e-3),
    characters=Stage(25_000, 256, 1e-3),
    halves=Stage(20_000, 256, 1e-3),
    anchor=Stage(60_000, 256, 6e-4),
    pieces=Stage(80_000, 256, 6e-4),
    composition=Stage(10_000, 256, 1e-3),
    apart=Stage(10_000, 256, 1e-3),
    connections=((7, 0), (7, 1)),
    heads=8,
    operators=("+", "-", "×"),
    word_share=0.1,
    items=500,
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in (_TINY, _SMALL, _PAPER)}
