"""Attention masks for several continuations of one text in one call: each token sees its own past and no branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    full = _form(config, visible, dtype)
    if not window or not getattr(config, "use_sliding_window", True):
        return dict.fromkeys(kinds, full) if len(kinds) > 1 else full
    near = _form(config, visible & (distance < window), dtype)
    if not kinds:
        return near
    made = {kind: near if kind == SLIDING else full for kind in kinds}
    return made if len(kinds) > 1 else next(iter(made.values()))


def _form(config: PreTrainedConfig, visible: Tensor, dtype: torch.dtype) -> Tensor:
    visible = visible[:, None]
    if config._attn_implementation == "sdpa":
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
