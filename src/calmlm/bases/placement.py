"""Where a model's layers compute, which is not always where their weights lie.

With a ``device_map``, accelerate keeps weights in memory or on disk, and its hooks bring them to a layer's device when
the layer runs. Between calls such a weight is on the device ``meta``: it has a shape and no values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn


def execution_device(module: nn.Module) -> torch.device:
    """The device that a module computes on: its hook's where it has one, else that of its weights."""
    parameter = next(module.parameters(), None)
    # Called for every token: a model without hooks is not searched for any.
    searched = module.modules() if parameter is not None and parameter.is_meta else [module]
    for part in searched:
        for hook in _hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return torch.device("cpu") if parameter is None else parameter.device


def device_map_of(parts: dict[str, nn.Module]) -> dict[str, Any] | None:
    """The device map of several models that are parts of one; None where none of them has any.

    Args:
        parts: the models, each by its name within the whole.
    """
    found: dict[str, Any] = {}
    for name, part in parts.items():
        for key, device in (getattr(part, "hf_device_map", None) or {}).items():
            found[f"{name}.{key}".rstrip(".")] = device
    return found or None


def real_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters in the order of their names; those that are offloaded are brought to the CPU one at a time."""
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.is_meta:
            yield name, parameter
            continue
        path, _, own = name.rpartition(".")
        owner = model.get_submodule(path)
        if not _hooks(owner):
            yield name, parameter  # no values anywhere
            continue
        with align_module_device(owner, torch.device("cpu")):
            yield name, owner.get_parameter(own)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """The hooks that accelerate has put on a module."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else getattr(hook, "hooks", (hook,))
