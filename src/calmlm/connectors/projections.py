"""The linear maps of a cross-attention, and the map of the augmenting model's states that is not linear."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu


class LowRank(nn.Module):
    """A linear map through a narrow middle: ``x W_down W_up``."""

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """From (..., inputs) to (..., outputs)."""
        return self.up(self.down(x))


def linear(inputs: int, outputs: int, rank: int | None, *, bias: bool = False) -> nn.Module:
    """A linear map, of low rank where one is given."""
    return nn.Linear(inputs, outputs, bias=bias) if rank is None else LowRank(inputs, outputs, rank, bias=bias)


class ResidualProjection(nn.Module):
    """A linear map and a SwiGLU layer (Shazeer, 2020) beside it.

    ::

        f_proj(x) = x W + (silu(x W_gate) * (x W_up)) W_out

    W_out starts at zero, so that the map starts as the linear one.

    Args:
        inputs: D_A.
        outputs: D_B.
        rank: of W, and width of the layer; None for a full W and a layer of width D_B.
    """

    def __init__(self, inputs: int, outputs: int, rank: int | None) -> None:
        super().__init__()
        width = outputs if rank is None else rank
        self.linear = linear(inputs, outputs, rank)
        self.gate = nn.Linear(inputs, width, bias=False)
        self.up = nn.Linear(inputs, width, bias=False)
        self.out = nn.Linear(width, outputs, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """From (..., D_A) to (..., D_B)."""
        return self.linear(x) + self.out(silu(self.gate(x)) * self.up(x))
