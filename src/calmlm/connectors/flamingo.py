"""Flamingo's connector (Alayrac et al., 2022): gated cross-attention and gated feed-forward before an anchor layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calmlm.connectors.cross_attention import Attention, CrossAttention, Rotation, eager_attention

EXPANSION = 4  # width of the feed-forward layer, in D_B


class Flamingo(nn.Module):
    """Tanh-gated cross-attention and tanh-gated feed-forward on the input of an anchor layer.

    ::

        H  = H_B + tanh(a) CrossAttention(H_B, H_A)
        H' = H   + tanh(f) FFW(H)                        <- this is the input of the anchor's layer j

    Both gates start at zero, so the module starts as the identity.

    Args:
        augmenting_size: D_A.
        anchor_size: D_B.
        num_heads: N_H.
        options: of ``calmlm.connectors.cross_attention.CrossAttention``; its gate is always on.
    """

    before_layer = True
    reads_distribution = False

    def __init__(self, augmenting_size: int, anchor_size: int, num_heads: int, **options: Any) -> None:
        super().__init__()
        options["gate"] = True
        self.attention = CrossAttention(augmenting_size, anchor_size, num_heads, **options)
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(anchor_size, eps=1e-6),
            nn.Linear(anchor_size, EXPANSION * anchor_size, bias=False),
            nn.GELU(),
            nn.Linear(EXPANSION * anchor_size, anchor_size, bias=False),
        )
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    @property
    def is_identity(self) -> bool:
        """See ``CrossAttention.is_identity``."""
        return self.attention.is_identity and not bool(self.feed_forward_gate)

    def keys_values(self, augmenting: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """See ``CrossAttention.keys_values``."""
        return self.attention.keys_values(augmenting, rotation)

    def forward(
        self,
        anchor: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        rotation: Rotation | None = None,
        attention: Attention = eager_attention,
        seeing: Tensor | None = None,
    ) -> Tensor:
        """See ``CrossAttention.forward``; a position that sees nothing is left as it is."""
        state = self.attention(anchor, keys, values, mask=mask, rotation=rotation, attention=attention, seeing=seeing)
        change = self.feed_forward(state.to(self.feed_forward_gate.dtype)) * self.feed_forward_gate.tanh()
        if seeing is not None:
            change = change.masked_fill(~seeing[..., None], 0.0)
        return state + change.to(state.dtype)
