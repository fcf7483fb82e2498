"""The cache of a composition: the anchor's, each augmenting model's, and the cross-attentions' keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    BaseQuantizedLayer,
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    QuantizedCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from calmlm.errors import ModelError
from calmlm.state.frontier import Frontier
from calmlm.state.past import Ahead, Announced, Past, crop_cache


def like(cache: Cache, config: PreTrainedConfig, length: int | None) -> Cache:
    """An empty cache for the model of ``config``: static with room for ``length`` tokens, else like ``cache``."""
    if length is not None:
        return StaticCache(config=config, max_cache_len=length, offloading=cache.offloading)
    offloading = not isinstance(cache, QuantizedCache) and cache.offloading
    return DynamicCache(config=config, offloading=offloading)


def text_cache(cache: Cache, config: PreTrainedConfig) -> Cache:
    """An empty cache for a model that reads the text in tokens of its own, offloading like ``cache``.

    Its rows move when they get different numbers of new tokens, so that no layer may drop what left its window.
    """
    own = like(cache, config, None)
    own.layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in own.layers]
    return own


def opened_cache(cache: Cache, config: PreTrainedConfig, length: int | None) -> Cache:
    """An empty cache for a model that reads something before the text; else as ``like``.

    Padding may stand behind it, so that no layer may drop what left its window of columns.
    """
    if length is None:
        return text_cache(cache, config)
    own = like(cache, config, length)
    own.layers = [
        StaticLayer(max_cache_len=length) if type(layer) is StaticSlidingWindowLayer else layer for layer in own.layers
    ]
    return own


def moves(config: PreTrainedConfig) -> bool:
    """Whether all layers of a model keep their past as keys and values alone, column by column."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(type(layer) in kinds for layer in DynamicCache(config=config).layers)


def cross_cache(connections: int, length: int | None) -> Cache:
    """An empty cache for ``connections`` cross-attentions, static where there is a ``length``."""
    if length is not None:
        return Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(connections)])
    return Cache(layers=[DynamicLayer() for _ in range(connections)])


def static_length(cache: Cache) -> int | None:
    """For how many tokens a static cache has room; None for other caches, and where only its sliding windows show."""
    if not isinstance(cache, StaticCache):
        return None
    lengths = [int(layer.get_max_length()) for layer in cache.layers if not isinstance(layer, StaticSlidingWindowLayer)]
    longest = max(lengths, default=0)
    return longest if longest > 0 else None  # layers of linear attention have no length


class Bearer(NamedTuple):
    """An augmenting model, as a cache remembers it.

    Attributes:
        number: of those that have borne its name.
        opening: the tokens that it reads before each text.
    """

    number: int
    opening: tuple[int, ...]


class CalmCache(Cache):
    """Several caches that move together.

    Everything that generation does to a cache (reorder, crop, repeat, select, reset, ...) reaches each of them; what it
    asks of a cache (its layers, its length) is answered by the anchor's.

    Args:
        anchor: the anchor's cache.
        augmenting: the augmenting models' caches, by name.
        cross: the cross-attention caches, by name; layer ``c`` belongs to connection ``c``.
        frontiers: the records of both streams, for the models that do not advance token by token with the anchor.
        openings: how many tokens each augmenting model reads before the text; they stand in its own cache alone.
    """

    def __init__(
        self,
        anchor: Cache,
        augmenting: dict[str, Cache],
        cross: dict[str, Cache],
        frontiers: dict[str, Frontier] | None = None,
        openings: dict[str, int] | None = None,
    ) -> None:
        self.anchor = anchor
        self.augmenting = augmenting
        self.cross = cross
        self.frontiers = frontiers or {}
        self.openings = openings or {}
        self.ahead = {name: Ahead() for name in augmenting if name not in self.frontiers}
        self.held: int | None = None
        self.bearers: dict[str, Bearer] = {}  # which model of each name the cache was begun with
        self.alone = 0
        self.composed: torch.Tensor | None = None
        self.begun = False
        self.announced: Announced | None = None

    @classmethod
    def around(
        cls,
        anchor: Cache,
        configs: dict[str, PreTrainedConfig],
        connections: dict[str, int],
        length: int | None = None,
        unaligned: Iterable[str] = (),
        openings: dict[str, int] | None = None,
    ) -> CalmCache:
        """A cache for a composition around the anchor's own empty one.

        Args:
            anchor: an empty cache made for the anchor.
            configs: the augmenting models' configurations, by name.
            connections: how many connections each has.
            length: for how many tokens a static ``anchor`` was made; by default what its layers tell. Where all of them
                are sliding windows they do not tell, and the other caches are dynamic.
            unaligned: those that do not advance token by token with the anchor.
            openings: how many tokens each model reads before the text.

        Raises:
            ModelError: when ``anchor`` already holds tokens, which the augmenting model has not seen.
        """
        if int(length_in(anchor) or 0) > 0:
            raise ModelError(
                "past_key_values must come from this composition or be empty, but it holds tokens that the augmenting "
                "model has not seen: pass the past_key_values that the composition returned."
            )
        length = static_length(anchor) if length is None else length
        apart, before = set(unaligned), openings or {}

        def own(name: str, config: PreTrainedConfig) -> Cache:
            if name in apart:
                return text_cache(anchor, config)
            if before.get(name):
                return opened_cache(anchor, config, None if length is None else length + before[name])
            return like(anchor, config, length)

        return cls(
            anchor,
            {name: own(name, config) for name, config in configs.items()},
            {name: cross_cache(count, None if name in apart else length) for name, count in connections.items()},
            {name: Frontier() for name in apart},
            openings,
        )

    def part(self, name: str) -> Past:
        """What belongs to one augmenting model."""
        frontier, ahead = self.frontiers.get(name) or Frontier(), self.ahead.get(name) or Ahead()
        opening = self.openings.get(name, 0)
        return Past(self.augmenting.get(name), self.cross[name], frontier, ahead, opening, self.announced)

    def forget_ahead(self) -> None:
        """Take back what augmenting models have read before the anchor."""
        for name in self.ahead:
            self.part(name).forget_ahead()

    def advance(self, tokens: int) -> None:
        """Take note of what the anchor has read, where no augmenting model speaks."""
        if not self.cross:
            self.alone += tokens

    def check(self, active: dict[str, Bearer]) -> None:
        """Raise unless all parts have seen the same tokens, as far as they tell without waiting for the device.

        Args:
            active: the augmenting models that speak in this call.

        Raises:
            ModelError: when the anchor went on alone, or other augmenting models spoke before, or read something else
                before the text.
        """
        if set(active) != set(self.cross):
            raise ModelError(
                f"past_key_values must come from calls with the same augmenting models ({', '.join(sorted(active))}), "
                f"but it comes from {', '.join(sorted(self.cross))}: begin a new one."
            )
        for name, bearer in self.bearers.items():
            if bearer == active[name]:
                continue
            if bearer.number == active[name].number:
                raise ModelError(
                    f"past_key_values must come from calls in which augmenting models read the same before the text, "
                    f"but the prefix of {name!r} was changed since: begin a new one."
                )
            raise ModelError(
                "past_key_values must come from calls with the same augmenting models, but one of them was taken out "
                "and another joined under its name: begin a new one."
            )
        if torch.compiler.is_compiling():
            return  # static layers with windows count on the host: a compiled step would be compiled for each length
        parts = [(self.anchor, 0)]
        for name in self.ahead:
            before = self.openings.get(name, 0) if length_in(self.augmenting[name]) else 0
            parts += [(self.augmenting[name], self.ahead[name].count + before), (self.cross[name], 0)]
        found = [(length_in(part), ahead) for part, ahead in parts]
        lengths = {length - ahead for length, ahead in found if type(length) is int}
        lengths |= {frontier.length for frontier in self.frontiers.values()} if lengths else set()
        if len(lengths) > 1:
            raise ModelError(
                f"past_key_values must have grown by this composition alone, but its parts hold from {min(lengths)} to "
                f"{max(lengths)} tokens: begin a new one after disable_composition()."
            )

    def check_rows(self, composed: torch.Tensor | None) -> None:
        """Raise unless the same models speak in the same rows as in earlier calls: (B,) or (B, models) bool, or None.

        Raises:
            ModelError: otherwise, because states of the anchor with it and without it would mix in a row.
        """
        if torch.compiler.is_compiling() or (self.begun and composed is self.composed):
            return
        length = self.get_seq_length()
        if self.begun and not (type(length) is int and length == 0):
            given = [rows.bool().cpu() for rows in (self.composed, composed) if rows is not None]
            given = [rows if rows.ndim == 2 else rows[:, None] for rows in given]
            one, other = given if len(given) > 1 else (given[0], torch.ones_like(given[0]))
            if len(one) != len(other) or not torch.equal(*torch.broadcast_tensors(one, other)):
                raise ModelError(
                    "composition_mask must name the same rows as in the calls that filled past_key_values, but got "
                    "others: begin a new cache for a row in which the composition is switched on or off."
                )
        self.begun, self.composed = True, composed

    def _each_row(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.composed = None if self.composed is None else change(self.composed)

    def parts(self) -> Iterator[Cache]:
        """Every cache in it: the anchor's, the augmenting models', the cross-attentions'."""
        yield self.anchor
        yield from self.augmenting.values()
        yield from self.cross.values()

    # What generation asks of a cache: the anchor answers.

    @property
    def layers(self) -> list:  # type: ignore[override]
        return self.anchor.layers

    @property
    def offloading(self) -> bool:  # type: ignore[override]
        return self.anchor.offloading

    @property
    def layer_class_to_replicate(self) -> Any:  # type: ignore[override]
        return self.anchor.layer_class_to_replicate

    @property
    def is_compileable(self) -> bool:
        return all(part.is_compileable for part in self.parts())

    @property
    def is_croppable(self) -> bool:
        return all(map(croppable, self.parts()))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        length = length_in(self.anchor, layer_idx)
        if length is not None:
            return length
        # An anchor without attention layers does not count its tokens: a record of them does, or a stream that advances
        # token by token, or, where no augmenting model speaks, whoever calls the anchor.
        for frontier in self.frontiers.values():
            return frontier.length
        for cross in self.cross.values():
            return cross.get_seq_length()
        return self.alone

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.anchor.update(*args, **kwargs)

    def __repr__(self) -> str:
        return f"CalmCache(anchor={self.anchor!r}, augmenting={self.augmenting!r}, cross={self.cross!r})"

    # What generation does to a cache: all parts follow.

    def reset(self) -> None:
        self.alone, self.begun, self.composed = 0, False, None
        for ahead in self.ahead.values():
            ahead.clear()
        for part in (*self.parts(), *self.frontiers.values()):
            part.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.forget_ahead()
        for part in self.parts():
            part.reorder_cache(beam_idx)
        for frontier in self.frontiers.values():
            frontier.select(beam_idx)
        self._each_row(lambda rows: rows[beam_idx.to(rows.device)])

    def hold(self) -> None:
        """From now on, ``crop`` only takes note, until ``release``.

        A layer with a window drops what left it when it is cropped, so that a round of drafts may crop once, not twice.
        """
        self.held = 0

    def release(self, further: int = 0) -> None:
        """Do what ``crop`` was asked for since ``hold``, and ``further`` (0 or negative)."""
        held, self.held = self.held or 0, None
        self.crop(held + further)

    def crop(self, tokens_to_remove: int) -> None:
        if self.held is not None:
            self.held += tokens_to_remove
            return
        self.alone = max(0, self.alone + tokens_to_remove)
        crop_cache(self.anchor, tokens_to_remove)
        for name, cross in self.cross.items():
            gone, shift = tokens_to_remove, None
            if name in self.frontiers:
                columns, shift = self.frontiers[name].crop(-tokens_to_remove)
                gone = -columns
            crop_cache(cross, gone)
            if name in self.augmenting:
                ahead = self.ahead.get(name, Ahead())
                crop_cache(self.augmenting[name], gone - ahead.count)
                ahead.clear()
            if shift is not None:
                self.part(name).move(shift)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.forget_ahead()
        for part in self.parts():
            part.batch_repeat_interleave(repeats)
        for frontier in self.frontiers.values():
            frontier.repeat(repeats)
        self._each_row(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.forget_ahead()
        for part in self.parts():
            part.batch_select_indices(indices)
        for frontier in self.frontiers.values():
            frontier.select(indices)
        self._each_row(lambda rows: rows[indices.to(rows.device)])

    def activate_past_recording(self) -> None:
        for part in self.parts():
            part.activate_past_recording()

    def recording(self) -> list[Any]:
        """The layers that keep what leaves their window until they are cropped."""
        return [layer for part in self.parts() for layer in part.layers if getattr(layer, "record_past", False)]


def croppable(cache: Cache) -> bool:
    """Whether tokens can be taken back from the cache of one model."""
    # A layer that quantises says that it can, but keeps what it has quantised; and one of linear attention only knows
    # after its first call.
    fixed = (BaseQuantizedLayer, LinearAttentionCacheLayerMixin)
    return cache.is_croppable and not any(isinstance(layer, fixed) for layer in cache.layers)


def without_attention(cache: Cache) -> bool:
    """Whether a model keeps nothing but states of linear attention."""
    kinds = [isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers]
    return bool(kinds) and length_in(cache) is None and all(kinds)


def length_in(cache: Cache, layer_idx: int = 0) -> Any:
    """The tokens that a cache holds, a tensor where only the device knows; None where no layer counts them."""
    try:
        return cache.get_seq_length(layer_idx)
    except ValueError:
        return None  # only linear-attention layers
