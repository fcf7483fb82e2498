"""Adapters of a composition: PEFT says where they stand in the anchor and how they start."""

from __future__ import annotations

import math
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
MORE = (
    "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "use_dora", "lora_bias",
    "use_qalora", "alora_invocation_tokens", "arrow_config",
)  # fmt: skip
"""Settings of PEFT that do more than add a low-rank map to the outputs of linear maps."""
TAKEN = (".out_proj", ".x_proj", ".dt_proj")
STARTS = (True, "gaussian")
"""Settings of ``init_lora_weights`` with which the anchor stays as it is, and starts as itself."""


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
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    settings = _checked(model, decoder, wanted)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    # Without its configuration, by which PEFT would take other maps than those named: experts' stacked weights.
    parts = nn.Module()
    for name, child in model.named_children():
        parts.add_module(name, child)
    try:
        inject_adapter_in_model(settings, parts)
        start = next(name for name, module in parts.named_modules() if module is decoder)
        found = {name: module for name, module in parts.named_modules() if isinstance(module, LoraLayer)}
    except Exception as error:  # of settings of any form
        raise ConfigError(
            f"adapters must fit the anchor, but PEFT finds that they do not ({first_line(error)}): correct them."
        ) from None
    finally:
        _restore(parts, LoraLayer)
        for parameter, before in trained:
            parameter.requires_grad_(before)
    outside = sorted(name for name in found if not name.startswith(f"{start}." if start else ""))
    if outside:
        raise ConfigError(
            f"adapters must stand in the anchor's decoder, below its output, but {outside[0]!r} is outside: choose "
            f"other target_modules."
        )
    return _record({name.removeprefix(f"{start}."): layer for name, layer in found.items()})


def planned_adapters(model: nn.Module, decoder: nn.Module, wanted: Any) -> tuple[int, list[str]]:
    """The rank of such adapters and the names of the decoder's maps beside which they would stand; nothing is made.

    Raises:
        ConfigError: for settings that PEFT or a composition does not take.
        MissingExtraError: without PEFT, for more than a rank.
    """
    start = next(name for name, module in model.named_modules() if module is decoder)
    linear = _linear(decoder)
    if isinstance(wanted, int):
        return wanted, linear
    require("peft", EXTRA, "adapters")
    from peft.tuners.tuners_utils import check_target_module_exists

    settings = _checked(model, decoder, wanted)
    found = [name for name in linear if check_target_module_exists(settings, f"{start}.{name}" if start else name)]
    if not found:
        raise ConfigError(
            "adapters must fit the anchor, but none of its maps is among target_modules: name some of its own."
        )
    return settings.r, found


def _checked(model: nn.Module, decoder: nn.Module, wanted: Any) -> Any:
    """PEFT's settings of adapters that leave the anchor as it is, and start as itself.

    Raises:
        ConfigError: for others.
    """
    from peft import LoraConfig

    settings = _settings(wanted, LoraConfig)
    # Linear maps of transformers' own, of GPT-2 and its kin, have their weights the other way round.
    settings = replace(settings, fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()))
    if settings.target_modules == "all-linear":  # which PEFT takes to mean the experts' stacked weights as well
        settings = replace(settings, target_modules=_endings(model, decoder))
    strange = [name for name in MORE if getattr(settings, name, None)]
    strange += ["bias"] if settings.bias != "none" else []
    strange += ["peft_type"] if settings.peft_type != "LORA" else []
    if strange:
        raise ConfigError(
            f"adapters must be added to outputs of linear maps and nothing else, but got {', '.join(strange)}: leave "
            f"that out."
        )
    if settings.init_lora_weights not in STARTS:
        raise ConfigError(
            f"adapters must start as the anchor, but got init_lora_weights={settings.init_lora_weights!r}: leave that "
            f"out."
        )
    return settings


def _linear(decoder: nn.Module) -> list[str]:
    """The names of a decoder's linear maps, but for those whose weights the kernels of Mamba take alone."""
    scans = {name for name, module in decoder.named_modules() if hasattr(module, "A_log") and hasattr(module, "D")}
    linear = [name for name, module in decoder.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return [name for name in linear if not (name.rpartition(".")[0] in scans and name.endswith(TAKEN))]


def _endings(model: nn.Module, decoder: nn.Module) -> list[str]:
    """How the names of a decoder's linear maps end in the anchor, and no others': PEFT takes whole names otherwise."""
    start = next(name for name, module in model.named_modules() if module is decoder)
    last = start.rpartition(".")[2] + "." if "." in start else ""
    return [last + name for name in _linear(decoder)]


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


def _restore(model: nn.Module, kind: Any) -> None:
    """Put the anchor's own maps back where PEFT has put its layers around them."""
    around = [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]
    for name, module in around:
        parent, _, last = name.rpartition(".")
        if any(parent == outer or parent.startswith(f"{outer}.") for outer, _ in around):
            continue  # a layer around a layer
        while isinstance(module, kind):
            module = module.base_layer
        setattr(model.get_submodule(parent), last, module)


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
        tensors |= {f"maps.{name.replace('.', JOINT)}.{part}.weight": t for part, t in (("down", down), ("up", up))}
        ranks.add(down.shape[0])
        scalings.add(float(layer.scaling[NAME]))
        dropouts.add(float(getattr(layer.lora_dropout[NAME], "p", 0.0)))
    if any(len(set(map(str, found))) != 1 for found in (ranks, scalings, dropouts)):
        raise ConfigError(
            "adapters must have one rank, scaling and dropout, but got several: leave rank_pattern and alpha_pattern "
            "out."
        )
    scaling, dropout = scalings.pop(), dropouts.pop()
    if not (0 < abs(scaling) < math.inf and dropout < 1):
        raise ConfigError(
            f"adapters must have a finite lora_alpha other than 0 and a lora_dropout below 1, but got a scaling of "
            f"{scaling} and a dropout of {dropout}: correct them."
        )
    record = {"rank": ranks.pop(), "scaling": scaling, "dropout": dropout, "targets": targets}
    return record, {name: tensor.float().cpu() for name, tensor in tensors.items()}
