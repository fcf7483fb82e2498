"""A gate between two models' states at the same position, which is exactly 0 at the start and has a gradient there.

    g = o sigmoid(u h_B + v h_A + b)

with the anchor's state h_B and the augmenting model's state h_A scaled to unit root mean square. The opening o in
[0, 1] is 0 at the start, so that an untrained composition is the anchor, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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


class ConvexGate(nn.Module):
    """What a connection has that mixes the states of two models at each position.

    Args:
        augmenting_size: D_A.
        anchor_size: D_B.
        bias: where the gate's logit starts.
        opened: whether the opening starts at 1.

    Attributes:
        observe: is told of each batch's gates, (..., 1) float32, and where they count, (...) bool or None; None for
            nobody.
    """

    observe: Callable[[Tensor, Tensor | None], None] | None = None

    # The protocol of ``calmlm.connectors``.
    before_layer = False
    reads_distribution = False
    rotary = False
    null_key = None
    head_dim = 2

    def __init__(self, augmenting_size: int, anchor_size: int, *, bias: float = 0.0, opened: bool = False) -> None:
        super().__init__()
        # FSDP2 takes no parameters without a dimension.
        self.gate_anchor = nn.Parameter(torch.zeros(anchor_size))
        self.gate_augmenting = nn.Parameter(torch.zeros(augmenting_size))
        self.gate_bias = nn.Parameter(torch.tensor([bias / GATE]))
        self.opening = nn.Parameter(torch.tensor([1 / OPENING if opened else 0.0]))

    @property
    def attention(self) -> ConvexGate:
        """Itself: it attends to one state."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.gate_anchor.dtype

    @property
    def is_identity(self) -> bool:
        """Whether all states are left as they are: the gate is shut, as at the start."""
        return not bool(self.opened())

    def gate(self, anchor: Tensor, augmenting: Tensor) -> Tensor:
        """The gate's logit, (B, T, 1), from the states (B, T, D_B) and (B, T, D_A)."""
        found = _unit(anchor) @ self.gate_anchor.float() + _unit(augmenting) @ self.gate_augmenting.float()
        return GATE * (found + self.gate_bias.float())[..., None]

    def opened(self) -> Tensor:
        """How far the gate is opened, (1,), in [0, 1]."""
        return _Bounded.apply(OPENING * self.opening.float())  # type: ignore[no-any-return,no-untyped-call]


def shares(parts: list[tuple[ConvexGate, Tensor, Tensor | None]], anchor: Tensor) -> Tensor:
    """How much each augmenting model has of each position, (B, T, parts) float32.

    With gate logits l and openings o, model i has o_i e^l_i / (1 + e^l_i + sum_{j != i} o_j e^l_j): its own gate where
    it is alone, a softmax with the anchor where all are open. A model whose opening is 0 takes nothing from the others.

    Args:
        parts: for each model its gate, its states (B, T, D_A), and where it has read anything, (B, T) bool or None for
            everywhere.
        anchor: the anchor's states, (B, T, D_B).
    """
    logits = [_hidden(gate.gate(anchor, states), seen) for gate, states, seen in parts]
    whole, opened = torch.cat(logits, dim=-1), torch.cat([gate.opened() for gate, _, _ in parts])
    # Everything is divided by the largest term of the denominator, or it could overflow.
    largest = torch.where(opened > 0, whole, 0).detach().amax(-1, keepdim=True).clamp(min=0)
    weights = opened * (whole - largest).clamp(max=80).exp()
    others = (-largest).exp() + weights.sum(-1, keepdim=True) - weights
    found = opened * torch.sigmoid(whole - largest - others.clamp(min=1e-37).log())
    for (gate, _, seen), own in zip(parts, found.split(1, dim=-1), strict=True):
        if gate.observe is not None:
            gate.observe(own, seen)
    return found


def wide(state: Tensor) -> Tensor:
    """A state in float32, or in float64 where it is: where a gate is 0, its own values have to come back."""
    return state if state.dtype == torch.float64 else state.float()


def _unit(state: Tensor) -> Tensor:
    state = state.float()
    return state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-6)


def _hidden(logit: Tensor, seen: Tensor | None) -> Tensor:
    return logit if seen is None else logit.masked_fill(~seen[..., None], float("-inf"))
