"""Caches put together row under row, and columns that no row needs any more cut off: batches that are joined and left.

Rows end in the same column. A shorter cache gets padding on its left, whose keys and values are never looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from calmlm.errors import ModelError
from calmlm.state.cache import CalmCache
from calmlm.state.frontier import NOBODY, Frontier

KINDS = (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def concatenate(caches: Sequence[Cache], lengths: Sequence[int], rows: Sequence[int]) -> Cache:
    """One cache of all rows, in order; it takes the place of the first one, and the others may not be used again.

    Args:
        caches: of one composition, or of one base model.
        lengths: how many columns of text each of them has seen.
        rows: how many rows each of them has.

    Raises:
        ModelError: for layers of a kind that is not known.
    """
    first = caches[0]
    if not isinstance(first, CalmCache):
        _stack(caches, lengths, rows, 0)
        return first
    whole: list[Any] = list(caches)
    _stack([cache.anchor for cache in whole], lengths, rows, 0)
    for name, cross in first.cross.items():
        widths = [cache.frontiers[name].width for cache in whole] if name in first.frontiers else lengths
        if name in first.augmenting:
            _stack([cache.augmenting[name] for cache in whole], widths, rows, first.openings.get(name, 0))
        _stack([cross, *(cache.cross[name] for cache in whole[1:])], widths, rows, 0)
        if name in first.frontiers:
            _stack_frontiers([cache.frontiers[name] for cache in whole], rows)
    return first


def cut(cache: Cache, columns: int) -> None:
    """Forget the first ``columns`` columns of text, which are padding in every row."""
    if not isinstance(cache, CalmCache):
        _cut(cache, columns, 0)
        return
    _cut(cache.anchor, columns, 0)
    for name, cross in cache.cross.items():
        gone = _cut_frontier(cache.frontiers[name], columns) if name in cache.frontiers else columns
        if name in cache.augmenting:
            _cut(cache.augmenting[name], gone, cache.openings.get(name, 0))
        _cut(cross, gone, 0)


def _stack(caches: Sequence[Cache], lengths: Sequence[int], rows: Sequence[int], opening: int) -> None:
    """Let the first cache hold the rows of all, of which each has seen so many columns behind an opening."""
    longest = opening + max(lengths)
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        kinds = {type(layer) for layer in layers}
        if len(kinds) > 1 or not kinds <= set(KINDS):
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise ModelError(
                f"The rows of several caches must be kept in layers of one known kind to be joined, but got {names}: "
                f"decode them apart."
            )
        if isinstance(layers[0], LinearAttentionCacheLayerMixin):
            _stack_states(layers)
        if isinstance(layers[0], DynamicLayer):
            _stack_columns(layers, longest, rows, opening)


def _stack_states(layers: Sequence[Any]) -> None:
    for states, known in (
        ("conv_states", "is_conv_states_initialized"),
        ("recurrent_states", "is_recurrent_states_initialized"),
    ):
        for index, is_known in getattr(layers[0], known).items():
            if is_known:
                getattr(layers[0], states)[index] = torch.cat([getattr(layer, states)[index] for layer in layers])


def _stack_columns(layers: Sequence[Any], longest: int, rows: Sequence[int], opening: int) -> None:
    begun = [layer for layer in layers if layer.is_initialized]
    if not begun:
        return
    first, like = layers[0], begun[0]
    width = longest
    if isinstance(first, DynamicSlidingWindowLayer):
        width, first.cumulative_length = min(first.sliding_window - 1, longest), longest
    for name in ("keys", "values"):
        of_kind = getattr(like, name)
        parts = []
        for layer, count in zip(layers, rows, strict=True):
            if layer.is_initialized:
                parts.append(_padded(getattr(layer, name), width, opening))
            else:  # its model has read nothing of these rows
                parts.append(of_kind.new_zeros((count, of_kind.shape[1], width, of_kind.shape[3])))
        setattr(first, name, torch.cat(parts))
    first.dtype, first.device, first.is_initialized = like.dtype, like.device, True


def _padded(states: Tensor, width: int, opening: int) -> Tensor:
    """Keys or values (B, heads, S, D) with padding behind ``opening`` columns, (B, heads, width, D)."""
    missing = width - states.shape[-2]
    if not missing:
        return states
    if not opening:
        return nn.functional.pad(states, (0, 0, missing, 0))
    behind = nn.functional.pad(states[:, :, opening:], (0, 0, missing, 0))
    return torch.cat((states[:, :, :opening], behind), dim=2)


def _stack_frontiers(frontiers: Sequence[Frontier], rows: Sequence[int]) -> None:
    first, length = frontiers[0], max(frontier.length for frontier in frontiers)
    width = max(frontier.width for frontier in frontiers)
    missing = [length - frontier.length for frontier in frontiers]
    owners = [
        None if frontier.owner is None else frontier.owner.where(frontier.owner == NOBODY, frontier.owner + gap)
        for frontier, gap in zip(frontiers, missing, strict=True)
    ]
    first.ids = _stack_rows([frontier.ids for frontier in frontiers], length, rows, NOBODY)
    first.told = _stack_rows([frontier.told for frontier in frontiers], length, rows, False)
    first.tokens = _stack_rows([frontier.tokens for frontier in frontiers], width, rows, 0)
    first.left = _stack_rows([frontier.left for frontier in frontiers], width, rows, 0.0)
    first.owner = _stack_rows(owners, width, rows, NOBODY)


def _stack_rows(parts: Sequence[Tensor | None], width: int, rows: Sequence[int], fill: Any) -> Tensor | None:
    """Tensors (B, S) under each other, filled on the left; None where none is there."""
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    filled = []
    for part, count in zip(parts, rows, strict=True):
        lead = like.new_full((count, width - (0 if part is None else part.shape[1])), fill)
        filled.append(lead if part is None else torch.cat((lead, part), dim=1))
    return torch.cat(filled)


def _cut(cache: Cache, columns: int, opening: int) -> None:
    for layer in cache.layers if columns else ():
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            change = _cutting(layer, columns, opening)
            layer.keys, layer.values = change(layer.keys), change(layer.values)
            if not layer.keys.shape[-2]:
                layer.reset()  # it would keep its number of rows


def _cutting(layer: DynamicLayer, columns: int, opening: int) -> Callable[[Tensor], Tensor]:
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length -= columns
        width = min(layer.sliding_window - 1, layer.cumulative_length)
        return lambda states: states[:, :, states.shape[2] - width :]
    if opening:
        return lambda states: torch.cat((states[:, :, :opening], states[:, :, opening + columns :]), dim=2)
    return lambda states: states[:, :, columns:]


def _cut_frontier(frontier: Frontier, columns: int) -> int:
    """Forget columns of the anchor; returns how many of the augmenting model's are empty in all rows and go as well."""
    assert frontier.ids is not None
    frontier.ids = frontier.ids[:, columns:]
    frontier.told = None if frontier.told is None else frontier.told[:, columns:]
    if frontier.owner is None:
        return 0
    # What was encoded belongs to the first column, which may be padding.
    owner = frontier.owner.where(frontier.owner == NOBODY, (frontier.owner - columns).clamp(min=0))
    empty = int((owner == NOBODY).all(0).long().cumprod(0).sum())
    frontier.owner = owner[:, empty:]
    frontier.tokens = None if frontier.tokens is None else frontier.tokens[:, empty:]
    frontier.left = None if frontier.left is None else frontier.left[:, empty:]
    return empty
