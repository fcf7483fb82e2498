"""The sizes at which visual arithmetic runs. A preset and a seed determine everything else."""

from __future__ import annotations

from dataclasses import dataclass

from calmlm.experiments.fitting import Stage

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Everything that a run of the experiment depends on besides its seed."""

    name: str
    encoder: Stage
    """Training of the vision encoder."""
    anchor: Stage
    """Training of the language model."""
    composition: Stage
    encoder_size: tuple[int, int, int] = (64, 4, 4)
    """m_A: hidden size, layers, heads."""
    anchor_size: tuple[int, int, int] = (96, 4, 4)
    """m_B: hidden size, layers, heads."""
    connections: tuple[tuple[int, int], ...] = ((3, 0), (3, 1))
    """(layer of m_A, layer of m_B), counted from 0."""
    heads: int = 4
    patch: int = 2
    """Pixels on a side of the encoder's patches."""
    training_share: float = 0.6
    """Share of the pictures that the encoder is trained on."""
    composition_share: float = 0.2
    """Share of those that D_C uses."""
    unseen_pairs: int = 20
    """Ordered pairs of digits, of 100, that D_C does not show."""
    numeric_share: float = 0.2
    """Share of D_C that is numeric arithmetic."""
    naming_share: float = 0.15
    """Share of D_C that asks for one picture's digit alone."""
    figure_share: float = 0.3
    """Share of the operands of D_C's expressions that are in figures."""
    third_share: float = 0.3
    """Share of D_C's expressions that have a third operand."""
    query_key_bias: float = 1.5
    items: int = 400
    """Evaluation items per column."""


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny",
            encoder=Stage(300, 64, 2e-3),
            anchor=Stage(300, 64, 3e-3),
            composition=Stage(200, 64, 4e-3),
            items=200,
        ),
        Preset(
            "small",
            encoder=Stage(1200, 64, 2e-3),
            anchor=Stage(900, 64, 3e-3),
            composition=Stage(500, 64, 4e-3, 0.2),
        ),
    )
}
