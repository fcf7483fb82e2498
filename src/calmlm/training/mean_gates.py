"""How far the gates of a composition are open, on average over the positions of the batches that train it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calmlm.connectors.gate import ConvexGate
from calmlm.connectors.graft import Graft
from calmlm.connectors.pointer import Pointer

__all__ = ["GATE", "MeanGates"]

GATE = "gate/"
"""Before the name of each gate in the logs."""


class MeanGates:
    """Looks on while a composition trains.

    A gate that depends on the states counts at the positions where it may be open; the tanh gate of an attention is a
    number of its own, of which the magnitude is taken.

    Args:
        model: the composition.
    """

    def __init__(self, model: Any) -> None:
        self.gates: dict[str, ConvexGate] = {}
        self.fixed: dict[str, Tensor] = {}
        for name, connectors in model.model.connectors.items():
            pairs = model.config.augmenting[name]["connections"]
            for index, connector in enumerate(connectors):
                if isinstance(connector, ConvexGate):
                    pointing = "pointer" if isinstance(connector, Pointer) else "words"
                    kind = f"layer {pairs[index][1]}" if isinstance(connector, Graft) else pointing
                    self.gates[self._free(f"{GATE}{name}/{kind}")] = connector
                elif index < len(pairs):
                    for label, gate in connector.named_parameters():
                        if gate.numel() == 1 and label.endswith("gate"):
                            of = "feed-forward" if "feed_forward" in label else "attention"
                            self.fixed[self._free(f"{GATE}{name}/layer {pairs[index][1]} {of}")] = gate
        self._sums: dict[str, Tensor] = {}

    def _free(self, label: str) -> str:
        """A label that no gate has: two connections may lead into one layer."""
        while label in self.gates or label in self.fixed:
            label += "'"
        return label

    @contextmanager
    def watching(self, mask: Tensor | None) -> Iterator[None]:
        """Within this context gates are counted.

        Args:
            mask: (B, T), 0 for padding, which does not count; None where there is none.
        """
        for label, gate in self.gates.items():
            gate.observe = partial(self._take, label, mask)
        try:
            yield
        finally:
            for gate in self.gates.values():
                gate.observe = None

    def _take(self, label: str, mask: Tensor | None, gates: Tensor, where: Tensor | None) -> None:
        found = gates.detach()[..., 0].float()
        counted = torch.ones_like(found, dtype=torch.bool) if where is None else where.expand_as(found)
        if mask is not None and mask.shape == found.shape:
            counted = counted & mask.to(found.device).bool()
        pair = torch.stack([torch.where(counted, found, 0).sum(), counted.sum().float()])
        self._sums[label] = self._sums[label].to(pair) + pair if label in self._sums else pair

    def take_means(self, device: torch.device, *, together: bool) -> dict[str, float]:
        """The means since the last call, by label; without those that had no position.

        Args:
            device: of collectives.
            together: whether other processes have counted too; then all of them have to call this.
        """
        means: dict[str, float] = {}
        if self.gates:
            zero = torch.zeros(2)
            sums = torch.stack([self._sums.get(label, zero).to(device) for label in self.gates])
            if together:
                torch.distributed.all_reduce(sums)
            self._sums = {}
            means = {
                label: total / count for label, (total, count) in zip(self.gates, sums.tolist(), strict=True) if count
            }
        return means | {label: abs(gate.detach().float().tanh().item()) for label, gate in self.fixed.items()}
