"""What makes a resumed run the same run: a checkpoint that is whole, and all that the trainer knew when it was written.

Trainer's own checkpoints leave out the loss since the last log, what the activation cache has not written yet, and
whether the other processes are done writing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers.trainer_pt_utils import nested_gather

from calmlm.errors import CalmError, ConfigError, WriteError, is_full, unwritten
from calmlm.files.storage import write_text
from calmlm.training.changed_rates import let_hold, settings_of

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

__all__ = ["RUNNING", "ResumedTrainer", "check_agreement", "highest", "mark_of", "other_data"]

RUNNING = "running.json"


class ResumedTrainer(Trainer):
    """Stands before ``Trainer``, or a subclass of it, in a class of both.

    Attributes:
        before_saving: called in every process before a checkpoint is written.
        data: what tells the examples from others, see ``mark_of``.
    """

    before_saving: Callable[[], None] | None = None
    data: dict[str, Any] | None = None
    _loss_so_far = 0.0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as Trainer does, or leave nothing and say why.

        Raises:
            CalmError: it could not be written, or would hold weights that are not finite.
        """
        step, place = self.state.global_step, Path(self.args.output_dir)
        check_finite(self)
        if self.before_saving is not None:
            self.before_saving()
        self._loss_so_far = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item() if step else 0.0
        try:
            super()._save_checkpoint(model, trial)
        except (CalmError, OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, CalmError) and not isinstance(error, WriteError):
                raise
            if not (isinstance(error, (OSError, SafetensorError)) or is_full(error)):
                raise
            if self.args.should_save:
                shutil.rmtree(place / f"checkpoint-{step}", ignore_errors=True)
            cause = error.__cause__ if isinstance(error, WriteError) and error.__cause__ is not None else error
            reason = unwritten(cause)
            raise CalmError(
                f"Expected to write the checkpoint of step {step} in {place}, but that failed ({reason}): make room "
                f"there, then go on from the one before it with --resume."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        """Also save what is known since the last log, and let no process be left behind: its state comes last."""
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            known = {
                "loss": self._loss_so_far,
                "last_logged": getattr(self, "_globalstep_last_logged", 0),
                "metrics": {key: list(found) for key, found in self._measured().items()},
                "tokens": getattr(self, "_total_train_tokens", 0),
                "learning_rate": self.args.learning_rate,
                "data": self.data,
            }
            write_text(Path(output_dir) / RUNNING, json.dumps(known))
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both; a learning rate, a weight decay and so on that the run is given anew hold from here on."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        made = settings_of(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        before = _known(checkpoint).get("learning_rate")
        let_hold(made, self.optimizer, self.lr_scheduler, before, self.args.learning_rate)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        known = _known(checkpoint)
        if not known:
            return
        # In place: the loop holds the tensor already.
        self._tr_loss += torch.tensor(known["loss"], dtype=self._tr_loss.dtype, device=self._tr_loss.device)
        self._total_loss_scalar -= known["loss"]  # the run's mean is over the steps of this call
        self._globalstep_last_logged = known["last_logged"]
        for key, values in known["metrics"].items():
            self._measured()[key] = list(values)
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = known["tokens"]

    def _measured(self) -> dict[str, list[float]]:
        """What TRL's trainer measures between two logs."""
        found: dict[str, list[float]] = getattr(self, "_metrics", {}).get("train", {})
        return found


def _known(checkpoint: str | None) -> dict[str, Any]:
    """What the run knew when it wrote a checkpoint; nothing of one that an older version has written."""
    path = Path(checkpoint or "") / RUNNING
    if checkpoint is None or not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def mark_of(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What tells examples from others: their number, and a digest of their lengths and of a thousand of them."""
    digest = hashlib.sha256(array("q", [len(row["input_ids"]) for row in rows]).tobytes())
    for row in rows[:: max(1, len(rows) // 1000)]:
        digest.update(array("q", [*row["input_ids"], *row["labels"]]).tobytes())
    return {"examples": len(rows), "digest": digest.hexdigest()[:16]}


def other_data(checkpoint: Path, now: dict[str, Any]) -> str | None:
    """How the examples of a run differ from those of the checkpoint that it goes on from; None where they do not."""
    before = _known(str(checkpoint)).get("data")
    if before is None or before == now:
        return None
    if before["examples"] != now["examples"]:
        return f"{now['examples']} examples in place of {before['examples']}"
    return f"as many examples, {now['examples']}, but others"


def highest(trainer: Trainer, value: int) -> int:
    """The highest of all processes' values; all of them have to ask."""
    if trainer.args.world_size == 1:
        return value
    found = torch.tensor(value, device=trainer.args.device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found)


def check_finite(trainer: Trainer) -> None:
    """Raise where a checkpoint would replace good ones with weights that nothing can go on from.

    Raises:
        CalmError: naming the step.
    """
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    own = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in trained]
    if highest(trainer, not all(bool(torch.isfinite(parameter).all()) for parameter in own)):
        raise CalmError(
            f"Expected weights that stay finite, but after step {trainer.state.global_step} some are infinite or no "
            f"number, so they were not saved: lower trainer.learning_rate, then go on from the last checkpoint with "
            f"--resume."
        )


def check_agreement(checkpoint: Path | None) -> None:
    """Raise unless all processes go on from the same checkpoint.

    Raises:
        ConfigError: they do not, as on machines that do not share the output.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    name = checkpoint.name if checkpoint is not None else "none"
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, name)
    if len(set(found)) > 1:
        raise ConfigError(
            f"--resume: expected all processes to find the same checkpoint, but they find {', '.join(found)}; put the "
            f"output on a disk that all machines share."
        )
