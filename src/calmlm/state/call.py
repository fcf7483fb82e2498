"""What a call of a composition shares with the hooks in its base models: streams, rows, and where they find them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from calmlm.connectors.cross_attention import Attention, Rotation
from calmlm.connectors.pointer import Pointer
from calmlm.state.beside import Beside


@dataclass
class Stream:
    """One augmenting model's part of a call.

    Attributes:
        mask: cross-attention mask in the form that ``attention`` takes, or None.
        rotation: rotary angles of the new anchor positions, or None.
        key_rotation: rotary angles of the new augmenting positions, or None.
        cache: keys and values of earlier positions, one layer per connection, or None.
        attention: the attention function.
        seeing: (B, T) bool, which anchor positions see anything at all; None where all do.
        visible: (B, 1, T, S) bool, which augmenting positions each anchor position sees; None where each sees the one
            that stands beside it, and those before.
        owner: the anchor positions that own the augmenting ones, (B, S) int64, and how many anchor positions there
            are; None where each has its own.
        hidden: outputs of the model's connected layers, by layer, each (B, S_new, D_A); empty when it read nothing new.
    """

    mask: Tensor | None
    rotation: Rotation | None
    key_rotation: Rotation | None
    cache: Cache | None
    attention: Attention
    seeing: Tensor | None = None
    visible: Tensor | None = None
    owner: tuple[Tensor, int] | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def cut(self, count: int) -> None:
        """Forget the first ``count`` columns of what the model's layers gave."""
        if count:
            self.hidden = {layer: states[:, count:] for layer, states in self.hidden.items()}


@dataclass
class Pointed:
    """What pointers need of a call once the anchor's logits are there.

    Attributes:
        anchor: the anchor's last states, (B, T, D_B).
        parts: for each augmenting model that speaks in probabilities its pointer, and its last states beside the
            anchor's.
        spoken: (B, 1, 1) bool, the rows in which any of them speaks; None for all.
        scale: by which their gates are multiplied.
    """

    anchor: Tensor
    parts: dict[str, tuple[Pointer, Beside]]
    spoken: Tensor | None = None
    scale: float = 1.0


@dataclass
class Call:
    """Everything that one forward call of a composition shares with its hooks.

    Attributes:
        streams: of the augmenting models, by name.
        rows: (B, 1, 1) bool by name, the rows in which each of them speaks; empty where all do.
        pointed: what pointers have found; None where there are none, or none has read anything.
        scale: by which all that the composition adds is multiplied.
        merged: the models whose adapters lie in merged weights in this call.
        adapted: the map of the anchor that has just computed with such weights.
    """

    streams: dict[str, Stream] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    pointed: Pointed | None = None
    scale: float = 1.0
    merged: frozenset[str] = frozenset()
    adapted: Any = None

    def scaled(self, old: Tensor, new: Tensor) -> Tensor:
        """The way from one state to another, as far as the scale goes."""
        return new if self.scale == 1 else old + self.scale * (new - old)

    def spoken(self, names: Iterable[str], device: torch.device) -> Tensor | None:
        """The rows in which any of these models speaks, (B, 1, 1) bool; None for all."""
        found = [self.rows[name].to(device) for name in names if name in self.rows]
        return torch.stack(found).any(0) if found else None

    def beside(self, name: str, found: Beside) -> Beside:
        """What stands beside the positions where this model speaks: it has no share of a row in which others do."""
        if name not in self.rows:
            return found
        rows = self.rows[name][..., 0].to(found.states.device).expand(found.states.shape[:2])
        return found._replace(seen=rows if found.seen is None else rows & found.seen)

    def kept(self, names: Iterable[str], old: Tensor, new: Tensor) -> Tensor:
        """The new state in the rows in which any of these models speaks, the old one in the others."""
        spoken = self.spoken(names, new.device)
        return new if spoken is None else torch.where(spoken, new, old)


class Slot(threading.local):
    """Where hooks find the call that their thread is in, if it is in one; a copy is empty.

    ``recorder`` keeps what augmenting models make of texts, see ``calmlm.readers.kept_states``.
    """

    def __init__(self) -> None:
        self.call: Call | None = None
        self.recorder: Any = None

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()
