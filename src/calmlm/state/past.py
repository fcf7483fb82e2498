"""One augmenting model's part of the past: its caches, the record of both streams, and what it has read ahead."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache

from calmlm.state.frontier import Frontier, Shift


@dataclass
class Ahead:
    """What an augmenting model has read before the anchor: tokens that it drafted, and its states over them.

    Attributes:
        ids: (B, n) int64, or None.
        hidden: outputs of its connected layers over them, by layer, each (B, n, D_A).
    """

    ids: torch.Tensor | None = None
    hidden: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Tokens ahead."""
        return 0 if self.ids is None else self.ids.shape[1]

    def extend(self, ids: torch.Tensor, hidden: dict[int, torch.Tensor]) -> None:
        """Add tokens (B, n) and the states over them."""
        self.ids = ids if self.ids is None else torch.cat((self.ids, ids), dim=1)
        for layer, new in hidden.items():
            known = self.hidden.get(layer)
            self.hidden[layer] = new if known is None else torch.cat((known, new), dim=1)

    def clear(self) -> None:
        """Nothing is ahead any more."""
        self.ids, self.hidden = None, {}


@dataclass(frozen=True)
class Past:
    """One augmenting model's part of the cache: its own, the cross-attentions', and the record of both streams.

    A call without a cache has ``Past()``: nothing but a record that ends with the call. A model that advances token by
    token with the anchor never looks at the record; only such a model can be ahead.
    """

    own: Cache | None = None
    cross: Cache | None = None
    frontier: Frontier = field(default_factory=Frontier)
    ahead: Ahead = field(default_factory=Ahead)

    def take_ahead(self, ids: torch.Tensor) -> dict[int, torch.Tensor]:
        """The states over those of ``ids`` (B, T) that the model has read already, by layer; none is ahead after it.

        Where other tokens came than those that it read ahead, it forgets them.
        """
        count, states = self.ahead.count, self.ahead.hidden
        if not count:
            return {}
        assert self.ahead.ids is not None
        if not torch.equal(ids[:, :count], self.ahead.ids):
            self.forget_ahead()
            return {}
        self.ahead.clear()
        return states

    def forget_ahead(self) -> None:
        """Take back what the model has read before the anchor."""
        if self.ahead.count and self.own is not None:
            self.own.crop(-self.ahead.count)
        self.ahead.clear()

    def move(self, shift: Shift) -> None:
        """Let the caches follow the rows of the record."""
        if shift.source is None:
            return
        for cache in (self.own, self.cross):
            for layer in cache.layers if cache is not None else ():
                if layer.is_initialized:
                    layer.keys, layer.values = shift.move_states(layer.keys), shift.move_states(layer.values)
