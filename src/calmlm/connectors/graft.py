"""A graft: where one of the augmenting model's tokens ends, its state takes the place of the anchor's.

::

    h = h_B + g [o (W x + w - h_B) + V x]      x = (h_A - m) / s

with the mean m and deviation s of h_A in plain text, the gate g = sigmoid(u h_B + v h_A + b) and the opening o of
``calmlm.connectors.gate``. The map W comes from a ridge regression between both models' states over plain text, see
``calmlm.composing.aligning``: what the augmenting model understands reaches the anchor before anything is trained. It
stays as it is; what is trained is its correction V, 0 at the start. At the start o is 0 as well, or 1 on request.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calmlm.connectors.gate import ConvexGate, wide

BIAS = 3.0  # of the gate: halves of two states are worse than either


class Graft(ConvexGate):
    """Puts an augmenting model's state into the anchor's place.

    Args:
        augmenting_size: D_A.
        anchor_size: D_B.
        opened: whether the gate is open at the start; otherwise the graft starts as the identity.
        train_map: whether there is a correction V beside the gate.
        options: of other connectors.
    """

    def __init__(
        self, augmenting_size: int, anchor_size: int, *, opened: bool = False, train_map: bool = True, **options: Any
    ) -> None:
        super().__init__(augmenting_size, anchor_size, bias=BIAS, opened=opened)
        self.map = nn.Linear(augmenting_size, anchor_size)
        nn.init.normal_(self.map.weight, std=augmenting_size**-0.5)
        nn.init.zeros_(self.map.bias)
        self.map.requires_grad_(False)
        self.correction = nn.Linear(augmenting_size, anchor_size, bias=False) if train_map else None
        if self.correction is not None:
            nn.init.zeros_(self.correction.weight)
        self.mean = nn.Parameter(torch.zeros(augmenting_size), requires_grad=False)
        self.deviation = nn.Parameter(torch.ones(augmenting_size), requires_grad=False)

    @property
    def is_identity(self) -> bool:
        """Whether all states are left as they are, as at the start: shut, and without a correction."""
        # PEFT may have put something around the correction.
        plain = self.correction is None or type(self.correction) is nn.Linear
        return super().is_identity and plain and (self.correction is None or not bool(self.correction.weight.any()))

    def forward(self, anchor: Tensor, augmenting: Tensor, where: Tensor | None) -> Tensor:
        """The anchor's new states.

        Args:
            anchor: h_B, (B, T, D_B).
            augmenting: h_A at the same positions, (B, T, D_A).
            where: (B, T) bool, which positions are changed; None for all.

        Returns:
            (B, T, D_B) in the dtype of ``anchor``; its own values where the gate is 0, or ``where`` says so.
        """
        gate = self.gate(anchor, augmenting).sigmoid()
        if where is not None:
            gate = gate * where[..., None]
        own = wide(anchor)
        standard = (augmenting.to(self.dtype) - self.mean) / self.deviation
        opened = self.opened()
        if self.observe is not None:
            self.observe(opened * gate, where)
        change = opened * (self.map(standard).float() - own)
        if self.correction is not None:
            change = change + self.correction(standard).float()
        return (own + gate * change).to(anchor.dtype)

    @torch.no_grad()
    def align(self, weight: Tensor, bias: Tensor, mean: Tensor, deviation: Tensor) -> None:
        """Start from a map that was fitted: ``weight`` (D_B, D_A), ``bias`` (D_B,), ``mean``, ``deviation`` (D_A,)."""
        for parameter, value in (
            (self.map.weight, weight),
            (self.map.bias, bias),
            (self.mean, mean),
            (self.deviation, deviation),
        ):
            parameter.copy_(value)
