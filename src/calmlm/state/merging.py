"""Adapters inside the weights they stand beside: the same sums in one product, for as long as a composition wants it.

The anchor's own weights stay as they are, so that the composition can still be switched off bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from calmlm.connectors.adapters import Adapter, Adapters
from calmlm.errors import ModelError
from calmlm.state.call import Slot

__all__ = ["check_plain", "merge", "speaks_merged", "unmerge"]

MAPS = (nn.Linear, Conv1D)


class Merge:
    """What one composition makes of a linear map of its anchor.

    Args:
        module: the map.
        slot: of the composition.
        target: the map's name.
        adapted: the connectors of each augmenting model that has adapters here, by name.
    """

    def __init__(self, module: nn.Module, slot: Slot, target: str, adapted: Mapping[str, nn.ModuleList]) -> None:
        self.module, self.slot, self.adapted = module, slot, dict(adapted)
        self.found: dict[str, Any] = {name: connectors[-1] for name, connectors in adapted.items()}
        self.adapters: list[Any] = [found.of(target) for found in self.found.values()]
        self._weight: Tensor | None = None
        self._made_of: tuple[Any, ...] = ()

    def speaks(self) -> bool:
        """Whether all of its adapters speak in this call, in all rows, wholly, and as they do outside training."""
        call = self.slot.call
        if call is None or call.scale != 1 or torch.is_grad_enabled():
            return False
        return all(
            name in call.streams
            and name not in call.rows
            and self.adapted[name][-1] is found  # and not PEFT's copy that trains in its place
            and not found.training
            for name, found in self.found.items()
        )

    def weight(self) -> Tensor:
        """The map's weights (outputs, inputs) and its adapters' in one; made anew where one of them has changed."""
        made_of = tuple(_mark(tensor) for tensor in self._tensors())
        if self._weight is None or made_of != self._made_of:
            self._weight, self._made_of = self._sum(), made_of
        return self._weight

    def _tensors(self) -> Iterator[Tensor]:
        yield self.module.weight  # type: ignore[misc]
        for adapter in self.adapters:
            yield adapter.down.weight
            yield adapter.up.weight

    @torch.no_grad()
    def _sum(self) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        whole = (weight.T if isinstance(self.module, Conv1D) else weight).float()
        for adapter in self.adapters:
            whole = whole + adapter.scaling * (adapter.up.weight.float() @ adapter.down.weight.float())
        return whole.to(weight.dtype).contiguous()


class MergedForward:
    """In the place of the forward method of a linear map, which it is for all calls but those of a merge.

    Args:
        module: the map.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.merges: list[Merge] = []

    def __call__(self, input: Tensor) -> Tensor:
        for merge in self.merges:
            if merge.speaks():
                return linear(input, merge.weight(), self.module.bias)  # type: ignore[arg-type]
        return type(self.module).forward(self.module, input)


def merge(slot: Slot, decoder: nn.Module, adapted: Mapping[str, Mapping[str, nn.ModuleList]]) -> None:
    """Merge the adapters of a composition where they stand.

    Args:
        slot: of the composition.
        decoder: the anchor's.
        adapted: the connectors of the augmenting models that have adapters beside a map, by its name and theirs.

    Raises:
        ModelError: for maps whose weights are no plain tensors, or adapters that PEFT has put something around.
    """
    maps = {target: decoder.get_submodule(target) for target in adapted}
    for target, module in maps.items():
        check_plain(target, module, [connectors[-1] for connectors in adapted[target].values()])
    unmerge(slot, decoder)
    for target, module in maps.items():
        forward = vars(module).setdefault("forward", MergedForward(module))
        forward.merges.append(Merge(module, slot, target, adapted[target]))


def unmerge(slot: Slot, decoder: nn.Module) -> None:
    """Let the hooks of a composition's adapters do their work again."""
    for module in decoder.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, MergedForward):
            forward.merges = [merge for merge in forward.merges if merge.slot is not slot]
            if not forward.merges:
                del module.forward


def speaks_merged(module: nn.Module, slot: Slot) -> bool:
    """Whether the adapters of a composition are in the weights with which a map computes in this call."""
    forward = vars(module).get("forward")
    return isinstance(forward, MergedForward) and any(m.slot is slot and m.speaks() for m in forward.merges)


def check_plain(target: str, module: nn.Module, adapters: Sequence[nn.Module]) -> None:
    """Raise where adapters cannot be merged into a map.

    Raises:
        ModelError: saying why.
    """
    forward = vars(module).get("forward")
    if type(module) not in MAPS or not _plain(module.weight) or "_hf_hook" in vars(module):
        reason = f"{target!r} of the anchor has quantised weights, or weights that lie elsewhere"
    elif forward is not None and not isinstance(forward, MergedForward):
        reason = f"another tool has put something in the place of {target!r} of the anchor"
    elif not all(type(found) is Adapters and _own(found.of(target)) for found in adapters):
        reason = f"another tool has put something around the adapters of {target!r}, or holds parts of them"
    else:
        return
    raise ModelError(
        f"Adapters can be merged into plain weights in memory, but {reason}: use the composition without merging."
    )


def _own(adapter: Any) -> bool:
    """Whether an adapter is as it was made, and whole."""
    parts = (adapter.down, adapter.up) if type(adapter) is Adapter else ()
    return bool(parts) and all(type(part) is nn.Linear and _plain(part.weight) for part in parts)


def _plain(tensor: Any) -> bool:
    return type(tensor.data) is Tensor and tensor.is_floating_point() and not tensor.is_meta


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    """What changes with a tensor's values, without a look at them."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device
