"""A mixture of two models' probabilities: what the augmenting model would say next, in the anchor's tokens.

    p = (1 - g) p_B + g (T p_A + (1 - sum T p_A) p_B)

T leads from each of the augmenting model's tokens to the anchor's first token of the same bytes; what the anchor has
nothing for is left to the anchor. The gate g is that of ``calmlm.connectors.gate``, from both models' last states.
Several augmenting models share each position. In the anchor's logits z_B, of which p_B is the softmax:

    z = z_B + log(1 + g (T p_A / p_B - sum T p_A))

so that z is z_B, bit for bit, where g is 0, and its gradient with respect to g is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calmlm.connectors.gate import ConvexGate, wide

NOTHING = -1
"""In a table of tokens: the anchor has nothing for it."""

MOST = 1 - 1e-5  # of a position is said by others: below 1, so that every logit stays finite
RAREST = 80.0  # a probability of the anchor's below e^-80 counts as e^-80, or its inverse would not be finite


class Pointer(ConvexGate):
    """The gate of an augmenting model that speaks in probabilities, and what its tokens stand for.

    Args:
        augmenting_size: D_A.
        anchor_size: D_B.
        table: the anchor's token for each of the augmenting model's, (V_A,) int64, or ``NOTHING``; None for shared ids.
            It is no part of what is saved.
        bias: where the gate's logit starts.
    """

    table: Tensor | None

    def __init__(
        self, augmenting_size: int, anchor_size: int, *, table: Tensor | None = None, bias: float = 0.0
    ) -> None:
        super().__init__(augmenting_size, anchor_size, bias=bias)
        self.register_buffer("table", table, persistent=False)

    @torch.no_grad()
    def said(self, logits: Tensor, size: int) -> Tensor:
        """T p_A, (n, V_B) float32: its sum is below 1 where the anchor has nothing for a token.

        Args:
            logits: the augmenting model's, (n, V_A).
            size: how many logits the anchor has, V_B.
        """
        likely = logits.float().softmax(-1)
        found = likely.new_zeros(len(likely), size + 1)  # the last one is for what the anchor has nothing for
        if self.table is None:
            shared = min(size, likely.shape[-1])
            found[:, :shared] = likely[:, :shared]
        else:
            target = self.table.to(likely.device)[: likely.shape[-1]]
            target = torch.where((target < 0) | (target >= size), size, target)
            found.index_add_(1, target, likely[:, : len(target)])
        return found[:, :size]


def point(anchor: Tensor, shares: Tensor, said: Sequence[Tensor]) -> Tensor:
    """The logits of the mixture, (n, V_B) float32 or float64; the anchor's own values wherever all shares are 0.

    Args:
        anchor: its logits z_B, (n, V_B).
        shares: g of each augmenting model, (n, parts) float32.
        said: T p_A of each, (n, V_B) float32.
    """
    anchor = wide(anchor)
    inverse = (-anchor.log_softmax(-1)).clamp(max=RAREST).exp()
    more = torch.zeros_like(anchor)
    for share, other in zip((MOST * shares).split(1, dim=-1), said, strict=True):
        more = more + share * (other * inverse - other.sum(-1, keepdim=True).clamp(max=1))
    return anchor + torch.log1p(more)
