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
class Announced:
    """Text that comes in several calls and is known as a whole before the first of them.

    Attributes:
        ids: (B, n) int64, the anchor's tokens.
        real: (B, n) bool, False at padding.
        start: how many columns stand before them.
    """

    ids: torch.Tensor
    real: torch.Tensor
    start: int

    def behind(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and padding of what follows the first ``column`` columns."""
        place = max(0, column - self.start)
        return self.ids[:, place:], self.real[:, place:]


@dataclass(frozen=True)
class Past:
    """One augmenting model's part of the cache: its own, the cross-attentions', and the record of both streams.

    A call without a cache has ``Past()``: nothing but a record that ends with the call. A model that advances token by
    token with the anchor never looks at the record; only such a model can be ahead. ``opening`` is how many tokens the
    model has read before the text: they stand at the beginning of its own cache, and nowhere else. ``announced`` is
    text of this call and later ones.
    """

    own: Cache | None = None
    cross: Cache | None = None
    frontier: Frontier = field(default_factory=Frontier)
    ahead: Ahead = field(default_factory=Ahead)
    opening: int = 0
    announced: Announced | None = None

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
        for cache, opening in ((self.own, self.opening), (self.cross, 0)):
            for layer in cache.layers if cache is not None else ():
                if layer.is_initialized:
                    layer.keys = shift.move_states(layer.keys, opening)
                    layer.values = shift.move_states(layer.values, opening)

    def take_back(self, gone: torch.Tensor) -> None:
        """Forget the last ``gone`` (B,) augmenting tokens of each row."""
        if not bool(gone.any()):
            return
        count, shift = self.frontier.drop(gone)
        for cache in (self.own, self.cross):
            if cache is not None and count:
                crop_cache(cache, -count)
        self.move(shift)


def crop_cache(cache: Cache, tokens_to_remove: int) -> None:
    """As in transformers, but a layer with a window that has not been called yet has nothing to crop."""
    for layer in cache.layers:
        if getattr(layer, "is_initialized", True):
            layer.crop(tokens_to_remove)
