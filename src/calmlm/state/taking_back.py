"""Tokens that are read behind a text and taken back, from the cache of a composition or of a base model alone."""

from __future__ import annotations

from transformers.cache_utils import Cache

from calmlm.state.cache import CalmCache, croppable
from calmlm.state.past import crop_cache


def takes_back(cache: Cache) -> bool:
    """Whether tokens can be taken back."""
    return cache.is_croppable if isinstance(cache, CalmCache) else croppable(cache)


def keep_what_leaves(cache: Cache) -> None:
    """From now on, layers with a window keep what leaves it, until ``take_back``."""
    cache.activate_past_recording()


def take_back(cache: Cache, count: int) -> None:
    """Forget the last ``count`` tokens, 0 or more, which were read since ``keep_what_leaves``."""
    if isinstance(cache, CalmCache):
        cache.crop(-count)
    else:
        crop_cache(cache, -count)
    for part in cache.parts() if isinstance(cache, CalmCache) else (cache,):
        for layer in part.layers:
            if getattr(layer, "record_past", False):
                layer.record_past = False
