"""LegoNN's connector (Dalmia et al., 2022): an interpretable interface, the augmenting model's output distribution.

What passes between the models is a distribution over the augmenting vocabulary and nothing else. An ingestor turns it
into vectors (a weighted embedding: the expected embedding under the distribution), from which the anchor reads by
cross-attention. Its table is learned, or it is the anchor's own (``calmlm.connectors.ingestor``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from calmlm.connectors.cross_attention import Attention, CrossAttention, Rotation, eager_attention

EMBEDDING_SIZE = 64  # of an ingestor's embedding table; the vocabulary is large, so the table is narrow


class LegoNN(nn.Module):
    """A weighted-embedding ingestor and a cross-attention.

    ::

        E = P_A W_E            P_A: (B, S, V_A) probabilities, W_E: (V_A, 64)
        H_{A+B} = CrossAttention(H_B, E)

    Args:
        augmenting_size: V_A, the augmenting vocabulary; with ``ingestor="anchor"`` the width of E.
        anchor_size: D_B.
        num_heads: N_H.
        ingestor: ``"learned"``, or ``"anchor"`` where an ``AnchorIngestor`` makes E, once for all connections.
        options: of ``calmlm.connectors.cross_attention.CrossAttention``.
    """

    before_layer = False
    reads_distribution = True

    def __init__(
        self, augmenting_size: int, anchor_size: int, num_heads: int, *, ingestor: str = "learned", **options: Any
    ) -> None:
        super().__init__()
        width = augmenting_size if ingestor == "anchor" else min(EMBEDDING_SIZE, anchor_size)
        self.ingestor = None if ingestor == "anchor" else nn.Linear(augmenting_size, width, bias=False)
        if self.ingestor is not None:
            nn.init.normal_(self.ingestor.weight)
        self.attention = CrossAttention(width, anchor_size, num_heads, **options)

    @property
    def is_identity(self) -> bool:
        """See ``CrossAttention.is_identity``."""
        return self.attention.is_identity

    def keys_values(self, augmenting: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor]:
        """Keys and values of a distribution (B, S_new, V_A) or of E; see ``CrossAttention.keys_values``."""
        if self.ingestor is not None:
            augmenting = self.ingestor(augmenting.to(self.ingestor.weight.dtype))
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
        """See ``CrossAttention.forward``."""
        return self.attention(anchor, keys, values, mask=mask, rotation=rotation, attention=attention, seeing=seeing)
