"""Attention masks for several continuations of one text in one call: each token sees its own past and no branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

IMPLEMENTATIONS = ("eager", "sdpa")  # of attention that take a mask for each pair of tokens

SLIDING, FULL = "sliding_attention", "full_attention"


def takes_trees(config: PreTrainedConfig) -> bool:
    """Whether such a mask can be made for a decoder; whether it reads rightly by it has to be tried out."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return config._attn_implementation in IMPLEMENTATIONS and kinds <= {SLIDING, FULL}


def tree_mask(config: PreTrainedConfig, visible: Tensor, distance: Tensor, dtype: torch.dtype) -> Any:
    """The mask of a call in the form that a decoder of transformers takes.

    Args:
        config: of the decoder.
        visible: (B, T, S) bool, which earlier tokens and branch tokens each new token has behind it, itself included.
        distance: (B, T, S) int64, how many tokens lie between the two along the branch.
        dtype: in which the decoder computes.

    Returns:
        a mask (B, 1, T, S), or one for each kind of layer where the decoder has several.
    """
    window = config.sliding_window if has_window(config) else None
    kinds = set(getattr(config, "layer_types", None) or ())
    full = _form(config, visible, dtype)
    if not window:
        return dict.fromkeys(kinds, full) if len(kinds) > 1 else full
    near = _form(config, visible & (distance < window), dtype)
    if not kinds:
        return near
    made = {kind: near if kind == SLIDING else full for kind in kinds}
    return made if len(kinds) > 1 else next(iter(made.values()))


def padded_mask(config: PreTrainedConfig, real: Tensor, new: int, dtype: torch.dtype, length: int | None = None) -> Any:
    """The causal mask of a call in which padding stands within rows, so that columns tell no distances.

    Args:
        config: of the decoder, one that ``takes_trees``.
        real: (B, S) which columns hold tokens, those of this call at the end.
        new: how many columns are this call's.
        dtype: in which the decoder computes.
        length: of a static cache, which has more columns.

    Returns:
        as ``tree_mask``.
    """
    total = real.shape[1]
    real = real.bool()
    place = real.long().cumsum(-1) - 1
    columns = torch.arange(total, device=real.device)
    rows = columns[total - new :, None]
    visible = (real[:, None] & (columns <= rows)) | (columns == rows)  # padding has to see something
    distance = place[:, total - new :, None] - place[:, None]
    more = 0 if length is None else length - total
    return tree_mask(config, nn.functional.pad(visible, (0, more)), nn.functional.pad(distance, (0, more)), dtype)


def has_window(config: PreTrainedConfig) -> bool:
    """Whether some layers of a decoder look back over so many columns and no more."""
    return bool(getattr(config, "sliding_window", None)) and bool(getattr(config, "use_sliding_window", True))


def _form(config: PreTrainedConfig, visible: Tensor, dtype: torch.dtype) -> Tensor:
    visible = visible[:, None]
    if config._attn_implementation == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
