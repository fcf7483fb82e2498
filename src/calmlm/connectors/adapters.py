"""Low-rank adapters beside the anchor's frozen weights, which belong to a composition and are off with it.

    y = x W^T + b + (alpha / r) dropout(x) A^T B^T

B is zero at the start (Hu et al., 2021, section 4.1). The anchor needs some freedom to read what a connection brings.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.functional import linear

JOINT = "__"  # in the place of the dots of a layer's name, which no module of torch may have


class Adapter(nn.Module):
    """What is added to the output of one linear map.

    Args:
        inputs, outputs: widths of the map.
        rank: r.
        scaling: alpha / r.
        dropout: of its input.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """From (..., inputs) to (..., outputs).

        While it trains it computes in the dtype of ``x``: a copy of that in another one would cost more than all this.
        Otherwise it computes in its own, as PEFT does: few tokens are rounded sooner than all weights.
        """
        if self.training:
            return _applied(self.up, _applied(self.down, self.dropout(x))) * self.scaling
        return self.up(self.down(self.dropout(x).to(self.down.weight.dtype))) * self.scaling

    @property
    def is_identity(self) -> bool:
        """Whether nothing is added, as at the start."""
        return type(self.up) is nn.Linear and not bool(self.up.weight.any())


def _applied(part: nn.Module, x: Tensor) -> Tensor:
    """A linear map of ``x``, in its dtype; with what PEFT has put around it."""
    weight: Tensor = part.weight  # type: ignore[assignment]
    return linear(x, weight.to(x.dtype)) if type(part) is nn.Linear else part(x.to(weight.dtype)).to(x.dtype)


class Adapters(nn.Module):
    """The adapters of one augmenting model, by the names of the linear maps of the anchor's decoder.

    Args:
        targets: inputs and outputs of each map, by name.
        rank, scaling, dropout: see ``Adapter``.
    """

    def __init__(self, targets: Mapping[str, tuple[int, int]], rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.maps = nn.ModuleDict(
            {
                self.key(name): Adapter(inputs, outputs, rank, scaling, dropout)
                for name, (inputs, outputs) in targets.items()
            }
        )

    @property
    def is_identity(self) -> bool:
        """Whether nothing is added, as at the start."""
        return all(bool(adapter.is_identity) for adapter in self.maps.values())

    def of(self, name: str) -> nn.Module:
        """The adapter of the map with this name."""
        return self.maps[self.key(name)]

    @staticmethod
    def key(name: str) -> str:
        """What the adapter of the map with this name is called."""
        return name.replace(".", JOINT)
