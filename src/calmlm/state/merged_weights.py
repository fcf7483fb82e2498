"""Adapters inside the weights they stand beside: the same sums in one product, for as long as a composition wants it.

The anchor's own weights stay as they are, so that the composition can still be switched off bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from calmlm.bases.peft_parts import tuner_layers
from calmlm.connectors.adapters import Adapter, Adapters
from calmlm.errors import ModelError
from calmlm.state.call import Slot
from calmlm.state.hooks import AdaptHook

__all__ = ["Merge", "check_map", "map_of", "merge", "merged_in", "unmerge"]

MAPS = ("Linear", "Conv1D", "FalconLinear")
"""Types of maps that are x W^T + b, or x W + b, and nothing more."""


class Merge:
    """What one composition makes of a linear map of its anchor.

    Args:
        module: the map.
        slot: of the composition.
        decoder: the anchor's.
        target: the map's name in it.
        adapted: the connectors of each augmenting model that has adapters here, by name.
    """

    def __init__(
        self, module: nn.Module, slot: Slot, decoder: nn.Module, target: str, adapted: Mapping[str, nn.ModuleList]
    ) -> None:
        above, _, self.leaf = target.rpartition(".")
        self.parent = decoder.get_submodule(above)
        self.module, self.slot, self.adapted = module, slot, dict(adapted)
        self.names = frozenset(adapted)
        self.target = target
        self.found: dict[str, Any] = {name: connectors[-1] for name, connectors in adapted.items()}
        self.forward: MergedForward | None = None
        self.weight: Tensor | None = None
        self._made_of: Snapshot | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "weight": None, "_made_of": None}  # made anew by the copy

    def update(self) -> None:
        """Make ``weight`` (outputs, inputs), the map's and its adapters' in one, anew where one of them has changed.

        It is None where the adapters are not what they were: in training, or with something of PEFT's around them.
        """
        if self.weight is not None and self._made_of is not None and self._made_of.holds():
            return
        self.weight = self._made_of = None
        if not all(self.adapted[name][-1] is found and not found.training for name, found in self.found.items()):
            return  # PEFT's copy trains in its place
        adapters = [found.of(self.target) for found in self.found.values()]
        if _against(self.target, self.module) is None and all(map(_own, adapters)):
            made_of = self._snapshot(adapters)
            self.weight, self._made_of = self._sum(adapters), made_of

    def _snapshot(self, adapters: list[Any]) -> Snapshot:
        """All that the sum depends on. PEFT writes where no tensor notices, and tells so in a list."""
        outer = self.parent._modules[self.leaf]
        merged = vars(outer).get("merged_adapters")
        places = [(self.parent._modules, self.leaf), (vars(outer), "merged_adapters"), (vars(self.module), "_hf_hook")]
        for name, found in self.found.items():
            kept = self.adapted[name]._modules
            places += [(vars(found), "training"), *((kept, str(index)) for index in (len(kept) - 1, len(kept)))]
            places += [(found._modules, "maps"), (found.maps._modules, found.key(self.target))]
        linear_maps = [self.module]
        for adapter in adapters:
            places += [(vars(adapter), "scaling"), (adapter._modules, "down"), (adapter._modules, "up")]
            linear_maps += [adapter.down, adapter.up]
        places += [(each._parameters, "weight") for each in linear_maps]
        places += [(vars(each), "forward") for each in (*adapters, *linear_maps[1:])]
        hooks = [each for one in (*adapters, *linear_maps[1:]) for each in (one._forward_hooks, one._forward_pre_hooks)]
        return Snapshot(places, [each.weight for each in linear_maps], merged, hooks)  # type: ignore[misc]

    @torch.no_grad()
    def _sum(self, adapters: list[Any]) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        whole = (weight.T if isinstance(self.module, Conv1D) else weight).to(dtype)
        for adapter in adapters:
            whole = whole + adapter.scaling * (adapter.up.weight.to(dtype) @ adapter.down.weight.to(dtype))
        return whole.to(weight.dtype).contiguous()


class Snapshot:
    """What something was made of. It tells without a look at values whether all is as it was: each token asks.

    Args:
        places: names in dictionaries of modules, under which the same things have to be.
        tensors: that have to hold the same values. Their memory is kept, so that no other takes it.
        names: a list that has to hold the same, if there is one.
        empty: what has to stay without anything in it.
    """

    def __init__(
        self,
        places: Iterable[tuple[Mapping[str, Any], str]],
        tensors: Iterable[Any],
        names: list[str] | None,
        empty: list[Mapping[Any, Any]],
    ) -> None:
        self.places = [(place, name, place.get(name)) for place, name in places]
        self.tensors = [(each, each._version, each.data_ptr(), each.untyped_storage()) for each in tensors]
        self.names = (names, None if names is None else list(names))
        self.empty = empty

    def holds(self) -> bool:
        """Whether all is as it was."""
        for place, name, found in self.places:
            if place.get(name) is not found:
                return False
        for tensor, version, address, _ in self.tensors:
            if tensor._version != version or tensor.data_ptr() != address:
                return False
        return self.names[0] == self.names[1] and not any(self.empty)


class MergedForward:
    """In the place of the forward method of a linear map, which it is for all calls but those of a merge.

    It leaves in the call whether the adapters are in what it gives, for whatever others put around it, or take away.

    Args:
        module: the map.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.merges: list[Merge] = []

    def __call__(self, input: Tensor) -> Tensor:
        for merge in self.merges:
            call = merge.slot.call
            if call is None:
                continue
            weight = merge.weight if merge.names <= call.merged else None
            call.adapted = None if weight is None else self.module
            if weight is not None:
                return linear(input, weight, self.module.bias)  # type: ignore[arg-type]
        return type(self.module).forward(self.module, input)


def merge(
    slot: Slot, decoder: nn.Module, adapted: Mapping[str, Mapping[str, nn.ModuleList]], earlier: Iterable[Merge]
) -> list[Merge]:
    """Merge the adapters of a composition where they stand.

    Args:
        slot: of the composition.
        decoder: the anchor's.
        adapted: the connectors of the augmenting models that have adapters beside a map, by its name and theirs.
        earlier: merges of this composition that these replace.

    Raises:
        ModelError: for maps whose weights are no plain tensors, or adapters that PEFT has put something around.
    """
    maps = {target: map_of(decoder, target) for target in adapted}
    for target, module in maps.items():
        check_map(target, module)
        _check_adapters(target, [connectors[-1] for connectors in adapted[target].values()])
    unmerge(earlier)
    found = [Merge(module, slot, decoder, target, adapted[target]) for target, module in maps.items()]
    for one in found:
        forward = vars(one.module).get("forward")
        if not isinstance(forward, MergedForward):
            forward = one.module.forward = MergedForward(one.module)
        one.forward = forward
        forward.merges.append(one)
    return found


def unmerge(merges: Iterable[Merge]) -> None:
    """Let the hooks of a composition's adapters do their work again."""
    for one in merges:
        forward, one.forward = one.forward, None
        if forward is None:
            continue
        forward.merges.remove(one)
        if not forward.merges and vars(one.module).get("forward") is forward:
            del one.module.forward


@torch.compiler.disable  # whether weights are up to date cannot be asked within a graph
def merged_in(merges: Sequence[Merge], streams: Iterable[str], rows: Mapping[str, Any], scale: float) -> frozenset[str]:
    """The augmenting models whose adapters a call takes from merged weights, which are up to date then.

    Args:
        merges: of the composition.
        streams: the augmenting models that speak in the call.
        rows: those of them that do so in some rows alone.
        scale: of all that the composition adds.
    """
    if not merges or scale != 1 or torch.is_grad_enabled():
        return frozenset()
    for one in merges:
        one.update()
    return frozenset(name for name in streams if name not in rows)


def map_of(decoder: nn.Module, target: str) -> nn.Module:
    """The map that adapters stand beside: the one inside, where PEFT has put something around it later."""
    module = decoder.get_submodule(target)
    while isinstance(module, tuner_layers()) and not any(
        isinstance(hook, AdaptHook) for hook in module._forward_hooks.values()
    ):
        module = module.base_layer  # type: ignore[assignment]
    return module


def check_map(target: str, module: nn.Module) -> None:
    """Raise where no adapters can be merged into a map.

    Raises:
        ModelError: saying why.
    """
    reason = _against(target, module)
    if reason:
        raise _refused(reason)


def _against(target: str, module: nn.Module) -> str | None:
    """Why no adapters can be merged into a map; None where they can."""
    forward, kind = vars(module).get("forward"), type(module).__name__
    own = getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
    if isinstance(module, tuner_layers()):
        return f"PEFT has put something around {target!r} of the anchor before they were made"
    if kind not in MAPS:
        return f"{target!r} of the anchor is a {kind}, whose weights are quantised, or which may do more"
    if not _plain(module) or "_hf_hook" in vars(module):
        return f"{target!r} of the anchor has weights that are quantised, lie elsewhere, or are made of others"
    if not (forward is None or own or isinstance(forward, MergedForward)):
        return f"another tool has put something in the place of {target!r} of the anchor"
    return None


def _check_adapters(target: str, adapters: Sequence[Any]) -> None:
    if not all(type(found) is Adapters and _own(found.of(target)) for found in adapters):
        raise _refused(f"another tool has put something around the adapters of {target!r}, or holds parts of them")


def _refused(reason: str) -> ModelError:
    return ModelError(
        f"Adapters can be merged into plain weights in memory, but {reason}: use the composition without merging."
    )


def _own(adapter: Any) -> bool:
    """Whether an adapter is as it was made, and whole."""
    parts = (adapter.down, adapter.up) if type(adapter) is Adapter else ()
    if not parts or any(type(part) is not nn.Linear or not _plain(part) for part in parts):
        return False
    return not any(_changed(part) for part in (adapter, *parts))


def _changed(module: nn.Module) -> bool:
    """Whether somebody has put something around what a module computes."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def _plain(module: nn.Module) -> bool:
    """Whether a module's weight is a parameter of torch's own, with values, that tells when they change."""
    weight = module._parameters.get("weight")
    if weight is None or weight is not module.weight:
        return False  # as where others are pruned or parametrised
    return type(weight.data) is Tensor and weight.is_floating_point() and not (weight.is_meta or weight.is_inference())
