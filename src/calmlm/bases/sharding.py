"""Models that are spread over processes, each of which holds a part of their tensors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of a tensor only: FSDP2 and tensor parallelism (DTensor), DeepSpeed ZeRO-3."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id")


def is_spread(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is spread over processes."""
    fsdp1 = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    return any(is_sharded(p) for p in model.parameters()) or any(isinstance(m, fsdp1) for m in model.modules())


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor, of which this process may hold a part."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_absent(tensor: Tensor) -> bool:
    """Whether the values of a tensor lie elsewhere: with other processes, or on a disk."""
    return tensor.is_meta or is_sharded(tensor)


def gathered(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, Tensor] | None:
    """Tensors of a model that is spread over processes, whole and on the CPU; all processes have to call this.

    Args:
        model: as a trainer has wrapped it.
        wanted: tells which tensors, by their names without wrappers.

    Returns:
        the tensors by name, on the first process; other processes may get none of them. None where nothing is spread.
    """
    if not is_spread(model):
        return None
    partitioned = {name.removeprefix("module."): p for name, p in model.named_parameters() if hasattr(p, "ds_id")}
    if partitioned:
        found = {name: p for name, p in partitioned.items() if wanted(name)}
        with import_module("deepspeed.zero").GatheredParameters(list(found.values())):
            return {name: p.detach().cpu().clone() for name, p in found.items()}
    own = {name.replace("_orig_mod.", "").removeprefix("module."): t for name, t in model.state_dict().items()}
    if any(hasattr(tensor, "full_tensor") for tensor in own.values()):
        chosen = {name: tensor for name, tensor in own.items() if wanted(name)}
        return {
            name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu()
            for name, tensor in chosen.items()
        }
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    # The frozen bases stay where they are.
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and wanted(name)}
