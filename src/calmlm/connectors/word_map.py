"""A connection into the anchor's last state: what the augmenting model would say, in the anchor's own words.

Both models' output embeddings are known, and many tokens stand in both vocabularies. So the linear map that says in the
anchor's space what the augmenting model's last state says is a least-squares problem, solved without any training:

    W = argmin sum_v c_v |(E_B[v] - mean) W - (E_A[v'] - mean)|^2 + ridge |W|^2

over the tokens v of the anchor and v' of the augmenting model that write the same bytes, each with its frequency c_v.
Where the anchor is about to predict, its last state h_B becomes a mixture with what the augmenting model says there:

    h = (1 - g) s_B h_B + g s_A (W h_A + w)      s_B = 1 + g (t - 1)

behind the gate g of ``calmlm.connectors.gate``. Several augmenting models share each position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from calmlm.connectors.gate import ConvexGate, shares, wide

RIDGE = 1e-4


class WordMap(ConvexGate):
    """Says in the anchor's space what an augmenting model's last state says.

    Args:
        augmenting_size: D_A.
        anchor_size: D_B.
        bias: where the gate's logit starts.
        train_map: whether W is trained as well.
    """

    def __init__(self, augmenting_size: int, anchor_size: int, *, bias: float = 0.0, train_map: bool = False) -> None:
        super().__init__(augmenting_size, anchor_size, bias=bias)
        self.map = nn.Linear(augmenting_size, anchor_size)
        with torch.no_grad():
            self.map.weight.zero_()
            self.map.bias.zero_()
        self.map.requires_grad_(train_map)
        self.scale_augmenting = nn.Parameter(torch.ones(1))
        self.scale_anchor = nn.Parameter(torch.ones(1))

    @torch.no_grad()
    def start(self, weight: Tensor, bias: Tensor) -> None:
        """Take a map, (D_B, D_A) and (D_B,)."""
        self.map.weight.copy_(weight)
        self.map.bias.copy_(bias)

    def said(self, augmenting: Tensor) -> Tensor:
        """What the augmenting model says, (B, T, D_B) float32."""
        return self.scale_augmenting.float() * self.map(augmenting.to(self.map.weight.dtype)).float()


def mix(anchor: Tensor, parts: Sequence[tuple[WordMap, Tensor, Tensor | None]]) -> Tensor:
    """The anchor's last state with what augmenting models say.

    Args:
        anchor: (B, T, D_B).
        parts: for each model its map, its last state at each position (B, T, D_A), and where it has read anything at
            all, (B, T) bool or None for everywhere.

    Returns:
        (B, T, D_B) in the anchor's dtype; its own values wherever all gates are 0.
    """
    gates = shares(list(parts), anchor)
    own, scale = torch.ones_like(gates[..., :1]), torch.ones_like(gates[..., :1])
    new = torch.zeros_like(anchor, dtype=torch.float32)
    for index, (words, states, _) in enumerate(parts):
        share = gates[..., index : index + 1]
        own = own - share
        new = new + share * words.said(states)
        scale = scale + share * (words.scale_anchor.float() - 1)
    return (own * scale * wide(anchor) + new).to(anchor.dtype)


def fit_map(anchor: Tensor, augmenting: Tensor, weights: Tensor, ridge: float = RIDGE) -> Tensor:
    """The map W from output embeddings of shared tokens, in closed form.

    Args:
        anchor: E_B, (n, D_B).
        augmenting: E_A of the same tokens, (n, D_A).
        weights: how much each counts, (n,).
        ridge: relative to the mean variance of E_B.

    Returns:
        (D_B, D_A) float32.
    """
    share = (weights.double() / weights.double().sum())[:, None]
    ours, theirs = anchor.double(), augmenting.double()
    ours, theirs = ours - (share * ours).sum(0), theirs - (share * theirs).sum(0)
    gram = ours.T @ (share * ours)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, ours.T @ (share * theirs)).float()
