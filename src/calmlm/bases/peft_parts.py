"""What PEFT has put into a model, found without importing PEFT: where it was never imported, there is nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn


def peft_class(module: str, name: str) -> Any:
    """A class of PEFT's for ``isinstance``; of nothing where PEFT was not imported."""
    return getattr(sys.modules.get(f"peft.{module}"), name, ())


def tuner_layers() -> Any:
    """The class of the layers that PEFT puts around others."""
    return peft_class("tuners.tuners_utils", "BaseTunerLayer")


def train_added(base: nn.Module, mode: bool) -> None:
    """Set what PEFT has put into a base to training or evaluation; the base's own modules stay as they are.

    Args:
        base: a frozen model.
        mode: whether it trains.
    """
    layers, wrappers = tuner_layers(), peft_class("utils.other", "AuxiliaryTrainingWrapper")
    for module in list(base.modules()) if layers or wrappers else ():
        if isinstance(module, (layers, wrappers)):
            for name, child in module.named_children():
                if name not in ("base_layer", "original_module"):
                    child.train(mode)


ADDING = ("lora", "adalora", "loha", "lokr", "vera", "vblora", "fourierft", "randlora")
"""PEFT's methods that add to what a map gives, and leave that as it is."""


def scaling_tuners(base: nn.Module, chosen: Callable[[nn.Module], bool]) -> list[str]:
    """Types of PEFT's layers that change what the map inside gives, or what it is given, instead of adding to it.

    Args:
        base: a model.
        chosen: whether a map counts.
    """
    layers = tuner_layers()
    if not layers:
        return []
    found = []
    for module in base.modules():
        if not isinstance(module, layers) or not chosen(module.get_base_layer()):
            continue
        method = type(module).__module__.removeprefix("peft.tuners.").split(".")[0]
        if method not in ADDING or any(getattr(module, "use_dora", {}).values()) or getattr(module, "lora_variant", {}):
            found.append(type(module).__name__)
    return found
