"""What happened inside a composition while it wrote an answer, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Attended", "Heard", "Trace"]


@dataclass(frozen=True)
class Heard:
    """What an augmenting model had read, in tokens of its own.

    Attributes:
        tokens: as text, one for each column of the attention.
        stays: whether each is part of what the model has read in the end; others were read for a while, since the text
            could have ended there.
    """

    tokens: list[str]
    stays: list[bool]


@dataclass(frozen=True)
class Attended:
    """Where one connection looked.

    Attributes:
        model: name of the augmenting model.
        layers: of it and of the anchor, counted from 0.
        weights: (heads, tokens of the answer, tokens heard) float32; a row sums to 1, less ``nothing``, or is 0 where
            there is nothing to see.
        nothing: (heads, tokens of the answer) float32, the weight of the null key; None where there is none.
    """

    model: str
    layers: tuple[int, int]
    weights: Tensor
    nothing: Tensor | None

    @property
    def label(self) -> str:
        """The name of the model and the two layers."""
        return connection_label(self.model, self.layers)


@dataclass(frozen=True)
class Trace:
    """What happened while an answer was written.

    Lists hold one number for each token of the answer: of the position in which it was predicted.

    Attributes:
        prompt: the text before the answer.
        answer: its text.
        tokens: its tokens, as text.
        scale: of the composition, from 0 to 1.
        composition: log-probabilities of the tokens by the composition, in nats.
        anchor: the same by the anchor alone.
        heard: what each augmenting model had read, by name.
        attention: of each connection that attends.
        gates: of grafts, word maps and pointers, from 0 to 1, by connection.
        contributions: the norm of what is added to a state, over the norm of that state, by connection; of adapters
            over the outputs of all maps that they stand beside.
        silenced: by how much an augmenting model raises the log-probability, against the composition without it.
        swapped: the same against the composition in which it reads another prompt.
    """

    prompt: str
    answer: str
    tokens: list[str]
    scale: float
    composition: list[float]
    anchor: list[float]
    heard: dict[str, Heard] = field(default_factory=dict)
    attention: list[Attended] = field(default_factory=list)
    gates: dict[str, list[float]] = field(default_factory=dict)
    contributions: dict[str, list[float]] = field(default_factory=dict)
    silenced: dict[str, list[float]] = field(default_factory=dict)
    swapped: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data; weights and numbers are rounded to six digits."""
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "tokens": self.tokens,
            "scale": self.scale,
            "log_probability": {"composition": _rounded(self.composition), "anchor": _rounded(self.anchor)},
            "heard": {name: {"tokens": one.tokens, "stays": one.stays} for name, one in self.heard.items()},
            "attention": [
                {
                    "augmenting": one.model,
                    "layers": list(one.layers),
                    "weights": _rounded(one.weights.tolist()),
                    "nothing": None if one.nothing is None else _rounded(one.nothing.tolist()),
                }
                for one in self.attention
            ],
            "gates": _rounded(self.gates),
            "contributions": _rounded(self.contributions),
            "silenced": _rounded(self.silenced),
            "swapped": _rounded(self.swapped),
        }


def connection_label(model: str, layers: tuple[int, int]) -> str:
    """How a connection is called: ``augmenting 3 → 1``."""
    return f"{model} {layers[0]} → {layers[1]}"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}")
