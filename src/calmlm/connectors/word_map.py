"""A connection into the anchor's last state: what the augmenting model would say, in the anchor's own words.

Both models' output embeddings are known, and many tokens stand in both vocabularies. So the linear map that says in the
anchor's space what the augmenting model's last state says is a least-squares problem, solved without any training:

    W = argmin sum_v c_v |(E_B[v] - mean) W - (E_A[v'] - mean)|^2 + ridge |W|^2

over the tokens v of the anchor and v' of the augmenting model that write the same bytes, each with its frequency c_v.
Where the anchor is about to predict, its last state h_B becomes a mixture with what the augmenting model says there:

    h = (1 - g) s_B h_B + g s_A (W h_A + w)      s_B = 1 + g (t - 1),  g = o sigmoid(u h_B + v h_A + b)

with h_B, h_A scaled to unit root mean square within the gate. The opening o in [0, 1] is 0 at the start, so that an
untrained composition is the anchor, bit for bit, with a gradient. Several augmenting models share one softmax of gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

RIDGE = 1e-4
OPENING = 100.0  # how much faster than its parameter the opening moves: it has to come from exactly 0
GATE = 3.0  # the same for the gate, of which a hundred steps have to be enough


class _Bounded(torch.autograd.Function):
    """Bounds to [0, 1]; a gradient that leads further out is dropped, one that leads back in is not."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (value,) = ctx.saved_tensors
        outward = ((value <= 0) & (gradient > 0)) | ((value >= 1) & (gradient < 0))
        return gradient.masked_fill(outward, 0)


class WordMap(nn.Module):
    """Says in the anchor's space what an augmenting model's last state says.

    Args:
        augmenting_size: D_A.
        anchor_size: D_B.
        bias: where the gate's logit starts.
        train_map: whether W is trained as well.
    """

    before_layer = False
    reads_distribution = False
    rotary = False
    null_key = None
    head_dim = 2

    def __init__(self, augmenting_size: int, anchor_size: int, *, bias: float = 0.0, train_map: bool = False) -> None:
        super().__init__()
        self.map = nn.Linear(augmenting_size, anchor_size)
        with torch.no_grad():
            self.map.weight.zero_()
            self.map.bias.zero_()
        self.map.requires_grad_(train_map)
        self.gate_anchor = nn.Parameter(torch.zeros(anchor_size))
        self.gate_augmenting = nn.Parameter(torch.zeros(augmenting_size))
        self.gate_bias = nn.Parameter(torch.tensor(bias / GATE))
        self.opening = nn.Parameter(torch.zeros(()))
        self.scale_augmenting = nn.Parameter(torch.ones(()))
        self.scale_anchor = nn.Parameter(torch.ones(()))

    @property
    def attention(self) -> WordMap:
        """Itself: it attends to one state."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.gate_anchor.dtype

    def gate(self, anchor: Tensor, augmenting: Tensor) -> Tensor:
        """The gate's logit, (B, T, 1), from the states (B, T, D_B) and (B, T, D_A)."""
        found = _unit(anchor) @ self.gate_anchor.float() + _unit(augmenting) @ self.gate_augmenting.float()
        return GATE * (found + self.gate_bias.float())[..., None]

    def said(self, augmenting: Tensor) -> Tensor:
        """What the augmenting model says, (B, T, D_B) float32."""
        return self.scale_augmenting.float() * self.map(augmenting.to(self.map.weight.dtype)).float()

    def opened(self) -> Tensor:
        """How far the gate is opened, a scalar in [0, 1]."""
        return _Bounded.apply(OPENING * self.opening.float())  # type: ignore[no-any-return,no-untyped-call]


def mix(anchor: Tensor, parts: Sequence[tuple[WordMap, Tensor, Tensor | None]]) -> Tensor:
    """The anchor's last state with what augmenting models say.

    Args:
        anchor: (B, T, D_B).
        parts: for each model its map, its last state at each position (B, T, D_A), and where it has read anything at
            all, (B, T) bool or None for everywhere.

    Returns:
        (B, T, D_B) in the anchor's dtype; its own values wherever all gates are 0.
    """
    gates = [_hidden(words.gate(anchor, states), seen) for words, states, seen in parts]
    shares = torch.cat((torch.zeros_like(gates[0]), *gates), dim=-1).softmax(-1)[..., 1:]
    own, scale = torch.ones_like(gates[0]), torch.ones_like(gates[0])
    new = torch.zeros_like(anchor, dtype=torch.float32)
    for index, (words, states, _) in enumerate(parts):
        share = words.opened() * shares[..., index : index + 1]
        own = own - share
        new = new + share * words.said(states)
        scale = scale + share * (words.scale_anchor.float() - 1)
    return (own * scale * anchor.float() + new).to(anchor.dtype)


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


def _unit(state: Tensor) -> Tensor:
    state = state.float()
    return state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-6)


def _hidden(logit: Tensor, seen: Tensor | None) -> Tensor:
    return logit if seen is None else logit.masked_fill(~seen[..., None], float("-inf"))
