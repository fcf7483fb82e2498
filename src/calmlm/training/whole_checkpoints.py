"""Checkpoints of a composition that FSDP2 spreads over processes: the same files as those of one process.

transformers would write the frozen bases as well, and load a checkpoint only where FSDP is on. Here the composition and
the state of its optimizer are gathered, and parted again when they are read, among as many processes as there are then.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from calmlm.bases.sharding import gathered
from calmlm.files.storage import WEIGHTS_NAME

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

__all__ = ["OPTIMIZER_NAME", "SCHEDULER_NAME", "WholeCheckpoints", "is_fsdp2"]

OPTIMIZER_NAME, SCHEDULER_NAME = "optimizer.pt", "scheduler.pt"  # as Trainer calls them


def is_fsdp2(arguments: Any) -> bool:
    """Whether these arguments of a trainer ask for FSDP2."""
    return bool(arguments.fsdp) and int((arguments.fsdp_config or {}).get("version", 2)) == 2


class WholeCheckpoints(Trainer):
    """Stands before ``Trainer``, or a subclass of it, in a class of both; changes nothing without FSDP2."""

    @property
    def _is_parted(self) -> bool:
        return bool(self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 2)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the composition, gathered by all processes."""
        if not self._is_parted:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        bare = self.accelerator.unwrap_model(self.model)
        state = gathered(self.model_wrapped, bare.is_composition)
        self._save(output_dir if output_dir is not None else self.args.output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_parted:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = _whole(self.optimizer.state_dict())  # all processes gather it
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._is_parted:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self._take(Path(resume_from_checkpoint), self.model if model is None else model)

    def _load_best_model(self) -> None:
        if not self._is_parted:
            super()._load_best_model()
            return
        self._take(Path(self.state.best_model_checkpoint), self.model)

    def _take(self, checkpoint: Path, model: nn.Module) -> None:
        tensors = load_file(checkpoint / WEIGHTS_NAME)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                found = tensors.get(name.replace("_orig_mod.", ""))
                if found is not None:
                    parameter.copy_(_parted_as(parameter, found))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_parted:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for index, entry in optimizer["state"].items():
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.ndim and value.shape == parameters[index].shape:
                    entry[key] = _parted_as(parameters[index], value)
        self.optimizer.load_state_dict(optimizer)
        self.lr_scheduler.load_state_dict(scheduler)


def _parted_as(parameter: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor as a parameter is parted among processes, all of which have to call this."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return whole.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements)  # type: ignore[attr-defined]


def _whole(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer with whole tensors on the CPU."""

    def entries(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, value in entry.items():
            if isinstance(value, Tensor):
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                value = value.detach().cpu()
            yield key, value

    return {**state, "state": {index: dict(entries(entry)) for index, entry in state["state"].items()}}
