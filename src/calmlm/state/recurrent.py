"""Models that keep their past as a state: which of them can continue from it with several tokens at once."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionCacheLayerMixin

from calmlm.bases.families import Backbone, text_config
from calmlm.bases.placement import execution_device
from calmlm.errors import DataError
from calmlm.state.cache import CalmCache

TOLERANCE = 3e-2  # relative; a model that forgets its state differs by far more


def check_continues(backbones: dict[str, Backbone], cache: CalmCache) -> None:
    """Raise unless every model goes on from what a cache holds with several tokens as it reads the whole text.

    Args:
        backbones: of the anchor, under the name "", and of the augmenting models.
        cache: of the composition.

    Raises:
        DataError: otherwise.
    """
    own = {"": cache.anchor} | {name: cache.augmenting[name] for name in cache.ahead}
    keeping = [name for name, part in own.items() if keeps_state(part)]
    # A length may lie on the device, so it is asked for only where it matters.
    for name in keeping if keeping and cache.get_seq_length() > 0 else ():
        if not continues(backbones[name]):
            role = f"augmenting model {name!r}" if name else "anchor"
            raise DataError(
                f"The {role} must be given the tokens behind its cache one by one, because "
                f"{type(backbones[name].decoder).__name__} cannot go on from its state with several, but got more than "
                f"one: pass the whole text without past_key_values and prefill_chunk_size."
            )


def keeps_state(cache: Cache) -> bool:
    """Whether some layer of a model keeps a state of linear attention."""
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)


_CONTINUES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # by decoder


def continues(backbone: Backbone) -> bool:
    """Whether a model that keeps a state goes on from it with several tokens at once; it is tried out once."""
    if backbone.decoder not in _CONTINUES:
        _CONTINUES[backbone.decoder] = _trial(backbone)
    return _CONTINUES[backbone.decoder]


def _trial(backbone: Backbone) -> bool:
    """Three tokens behind three others, against all six at once."""
    decoder: Any = backbone.decoder
    ids = torch.arange(6, device=execution_device(decoder))[None] % backbone.vocab_size
    own = {str(backbone.cache_argument): DynamicCache(config=text_config(decoder))}
    behind = {"position_ids": torch.arange(3, 6, device=ids.device)[None]} if backbone.takes_positions else {}
    with torch.no_grad():
        whole = decoder(input_ids=ids, use_cache=False)[0][:, 3:].float()
        decoder(input_ids=ids[:, :3], use_cache=True, **own)
        try:
            continued = decoder(input_ids=ids[:, 3:], use_cache=True, **own, **behind)[0].float()
        except RuntimeError:
            return False
    return bool((whole - continued).abs().max() <= TOLERANCE * whole.abs().max())
