"""What was found out about a composition's communication: figures, warnings, lines for a terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Communication", "Listening"]

LOSS = 1.05  # a model that reads worse than this inside the composition is warned of


@dataclass(frozen=True)
class Listening:
    """What one augmenting model understands.

    Attributes:
        alone: bits per byte of the completions by the model alone, in its own tokens; None where its tokenizer is not
            known.
        inside: the same with what it reads inside the composition.
        gain: bits per byte that the right prompt saves the model, against another row's.
        tokens_per_byte: of its own tokens in prompts and completions.
    """

    alone: float | None
    inside: float | None
    gain: float | None
    tokens_per_byte: float | None

    @property
    def spoiled(self) -> bool:
        """Whether the model predicts worse inside the composition than alone, by more than 5 %."""
        return self.alone is not None and self.inside is not None and self.inside > LOSS * self.alone


@dataclass(frozen=True)
class Communication:
    """What there is to communicate, and what of it can arrive.

    Attributes:
        rows: how many were looked at.
        anchor: bits per byte of the completions by the anchor.
        composition: the same by the composition.
        anchor_gain: bits per byte that the right prompt saves the anchor, against another row's.
        anchor_tokens_per_byte: of the anchor's tokens in prompts and completions.
        augmenting: by name of the augmenting model.
        swapped: bits per byte by the composition where its augmenting models read another row's prompt, on the rows of
            the gains; None where no model reads the text, one cannot read it so, or the composition is as untrained.
        pairing_gain: bits per byte that the right prompt saves then, with the ends of its 95 % interval.
    """

    rows: int
    anchor: float
    composition: float
    anchor_gain: float | None
    anchor_tokens_per_byte: float
    augmenting: dict[str, Listening] = field(default_factory=dict)
    swapped: float | None = None
    pairing_gain: tuple[float, float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def warnings(self) -> list[str]:
        """One sentence for each thing that should be looked at."""
        found = []
        for name, heard in self.augmenting.items():
            if heard.spoiled:
                found.append(
                    f"The augmenting model {name!r} predicts these texts with {heard.inside:.3f} bits per byte inside "
                    f"the composition, but with {heard.alone:.3f} alone: it reads something else than its own tokens. "
                    f"Use alignment='own', and check its tokenizer and its beginning."
                )
            if heard.gain is not None and self.anchor_gain is not None and heard.gain <= self.anchor_gain:
                found.append(
                    f"There is nothing to communicate here: the augmenting model {name!r} gets {heard.gain:.3f} bits "
                    f"per byte out of these prompts, and the anchor {self.anchor_gain:.3f} by itself."
                )
        if self.pairing_gain is not None and self.pairing_gain[1] <= 0:
            found.append(
                f"Nothing is shown to be communicated: the right prompt saves the composition "
                f"{_interval(self.pairing_gain)} bits per byte against another row's in its augmenting models alone. "
                f"Look at more rows, or train on texts of which they know more than the anchor."
            )
        return found

    def lines(self) -> list[tuple[str, str]]:
        """Titles and values, for a terminal."""
        shown = [
            ("rows", str(self.rows)),
            ("anchor", _figures(self.anchor, self.anchor_gain, self.anchor_tokens_per_byte)),
            ("composition", f"{self.composition:.3f} bits per byte"),
        ]
        if self.swapped is not None and self.pairing_gain is not None:
            swapped = f"{self.swapped:.3f} bits per byte, {_interval(self.pairing_gain)} more"
            shown.append(("composition, another prompt read", swapped))
        for name, heard in self.augmenting.items():
            shown += [
                (f"{name}, alone", _figures(heard.alone, heard.gain, heard.tokens_per_byte)),
                (f"{name}, inside", _figures(heard.inside, None, None)),
            ]
        return shown


def _interval(figure: tuple[float, float, float]) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*figure)


def _figures(bits: float | None, gain: float | None, tokens: float | None) -> str:
    parts = ["not measured" if bits is None else f"{bits:.3f} bits per byte"]
    parts += [] if gain is None else [f"{gain:.3f} of them gained from the prompts"]
    parts += [] if tokens is None else [f"{tokens:.2f} tokens per byte"]
    return ", ".join(parts)
