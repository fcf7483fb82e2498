"""Adapters of a composition: PEFT says where they stand in the anchor and how they start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from calmlm.connectors.adapters import JOINT
from calmlm.data.extras import require
from calmlm.errors import ConfigError, first_line

NAME = "default"  # PEFT's own
EXTRA = "compare"
LATER = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "use_dora")
"""Settings of PEFT that change more of the anchor than what is added to the outputs of linear maps."""


def build_adapters(model: nn.Module, decoder: nn.Module, wanted: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a composition records of its adapters, and the tensors with which they start.

    Args:
        model: the anchor; it is as before afterwards.
        decoder: its own, in which the adapters stand.
        wanted: the rank, or settings of ``peft.LoraConfig``, or one. By default they stand beside all linear maps, with
            ``lora_alpha`` twice the rank.

    Returns:
        ``{"rank", "scaling", "dropout", "targets": {name: [inputs, outputs]}}``, and tensors by the names that they
        have in ``calmlm.connectors.adapters.Adapters``.

    Raises:
        ConfigError: for settings that PEFT or a composition does not take.
        MissingExtraError: without PEFT.
    """
    require("peft", EXTRA, "adapters")
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    settings = _settings(wanted, LoraConfig)
    # Linear maps of transformers' own, of GPT-2 and its kin, have their weights the other way round.
    settings = replace(settings, fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()))
    strange = [name for name in LATER if getattr(settings, name, None)]
    strange += ["bias"] if settings.bias != "none" else []
    if strange:
        raise ConfigError(
            f"adapters must be added to outputs of linear maps and nothing else, but got {', '.join(strange)}: leave "
            f"that out."
        )
    attributes = set(vars(model))
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        inject_adapter_in_model(settings, model)
        start = next(name for name, module in model.named_modules() if module is decoder)
        found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"adapters must fit the anchor, but PEFT finds that they do not ({first_line(error)}): correct them."
        ) from None
    finally:
        _restore(model, LoraLayer, attributes)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
    outside = sorted(name for name in found if not name.startswith(f"{start}." if start else ""))
    if outside:
        raise ConfigError(
            f"adapters must stand in the anchor's decoder, below its output, but {outside[0]!r} is outside: choose "
            f"other target_modules."
        )
    return _record({name.removeprefix(f"{start}."): layer for name, layer in found.items()})


def _settings(wanted: Any, kind: Any) -> Any:
    if isinstance(wanted, kind):
        return wanted
    given = {"r": wanted} if isinstance(wanted, int) and not isinstance(wanted, bool) else wanted
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"adapters must be a rank, or settings of peft.LoraConfig, but got {wanted!r}: write for example "
            f"adapters=16."
        )
    rank = given.get("r", 8)
    try:
        return kind(**{"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", **given})
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"adapters must be settings of peft.LoraConfig, but it refuses them ({first_line(error)}): correct them."
        ) from None


def _restore(model: nn.Module, kind: Any, attributes: set[str]) -> None:
    """Put the anchor's own maps back where PEFT has put its layers around them."""
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.base_layer)
    for name in set(vars(model)) - attributes:
        delattr(model, name)


def _record(layers: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    targets: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    ranks, scalings, dropouts = set[int](), set[float](), set[float]()
    for name, layer in layers.items():
        if not (NAME in layer.lora_A and isinstance(layer.lora_A[NAME], nn.Linear)):
            raise ConfigError(
                f"adapters must stand beside linear maps, but {name!r} is none: choose other target_modules."
            )
        down, up = layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()
        targets[name] = [down.shape[1], up.shape[0]]
        tensors |= {f"{name.replace('.', JOINT)}.{part}.weight": t for part, t in (("down", down), ("up", up))}
        ranks.add(down.shape[0])
        scalings.add(float(layer.scaling[NAME]))
        dropouts.add(float(getattr(layer.lora_dropout[NAME], "p", 0.0)))
    if any(len(found) != 1 for found in (ranks, scalings, dropouts)):
        raise ConfigError(
            "adapters must have one rank, scaling and dropout, but got several: leave rank_pattern and alpha_pattern "
            "out."
        )
    changed = any(bool(t.any()) for name, t in tensors.items() if name.endswith("up.weight"))
    if changed:
        raise ConfigError(
            "adapters must start as the anchor, but their init_lora_weights change it: leave init_lora_weights out."
        )
    record = {"rank": ranks.pop(), "scaling": scalings.pop(), "dropout": dropouts.pop(), "targets": targets}
    return record, {name: tensor.float().cpu() for name, tensor in tensors.items()}
