"""What watches over a training: numbers that are not finite and losses that run away stop it, with the batch kept.

A step whose loss or gradient is infinite or no number is never taken. A loss runs away when its means between logs stay
above ``bound_of`` for ``PATIENCE`` logs; while the last one is above, no checkpoint is written over an older one.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from calmlm.errors import CalmError
from calmlm.files.storage import text_writer, write_together
from calmlm.training.going_on import highest
from calmlm.training.mean_gates import MeanGates
from calmlm.training.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

__all__ = ["WatchedTrainer", "bound_of", "is_far"]

FIRST = 5  # logs that say what a loss is like at the start
PATIENCE = 5  # logs in a row that a loss has to be above the bound
TIMES, MORE = 2.0, 1.0  # of the start, and nats above that: a composition starts as the anchor, and only gets better
BAD_GRADIENT, BAD_LOSS = 1, 2
Part = tuple[dict[str, Any], Tensor]
"""A batch that was in memory at once, and its loss."""


def bound_of(losses: Sequence[float]) -> float:
    """Above which a loss is far from where it began: 2 x the median of the first logs, and 1 nat."""
    return TIMES * statistics.median(losses[:FIRST]) + MORE if len(losses) > FIRST else math.inf


def is_far(history: Sequence[dict[str, Any]], logs: int = 1) -> bool:
    """Whether so many of the last logged losses are above the bound.

    Args:
        history: the trainer's log.
        logs: how many.
    """
    losses = [entry["loss"] for entry in history if "loss" in entry]
    later = losses[FIRST:][-logs:]
    return len(later) == logs and all(loss > bound_of(losses) for loss in later)


class WatchedTrainer(Trainer):
    """Stands before ``Trainer``, or a subclass of it, in a class of both.

    Attributes:
        run: the folder in which a batch is kept.
        gates: what is known of the composition's gates.
    """

    run: RunFolder
    gates: MeanGates | None = None
    _batches: list[Part]
    _now = -1

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """A part of a step, of which the batch and the loss are remembered until the step is done."""
        if self.state.global_step != self._now:
            self._now, self._batches = self.state.global_step, []
        if self.gates is None:
            self.gates = MeanGates(self.accelerator.unwrap_model(model))
        batch = dict(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._batches.append((batch, loss))
        return loss

    def compute_loss(self, model: Any, inputs: Any, *more: Any, **named: Any) -> Any:
        """The loss, with an eye on the gates while the model trains: backward may open them once more."""
        # Nobody can look into what torch has compiled.
        if self.gates is None or self.args.torch_compile or not model.training:
            return super().compute_loss(model, inputs, *more, **named)
        with self.gates.watching(inputs.get("attention_mask")):
            return super().compute_loss(model, inputs, *more, **named)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of a step's gradient, before the step is taken.

        Raises:
            CalmError: it, or a loss of the step, is infinite or no number, in any of the processes.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        found = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # A scaler of losses tries factors that are too large, and skips those steps by itself.
        scaled = getattr(self.accelerator, "scaler", None) is not None
        infinite = found is not None and not scaled and not math.isfinite(float(found))
        bad = [part for part in self._batches if not bool(torch.isfinite(part[1]).all())]
        worst = highest(self, BAD_LOSS if bad else BAD_GRADIENT if infinite else 0)
        step = f"step {self._now + 1}"
        if worst == BAD_LOSS:
            what = f"the loss of {step} is {float(bad[0][1]):g}" if bad else f"another process has none at {step}"
            self._stop(f"Expected a finite loss, but {what}", bad, together=True)
        elif worst == BAD_GRADIENT:
            has = f"the gradient of {step} has the norm {float(found):g}"
            self._stop(f"Expected a finite gradient, but {has}", self._batches, together=True)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what is given, and the means of the gates beside a loss.

        Raises:
            CalmError: the loss has run away.
        """
        trained = "loss" in logs
        if trained and self.gates is not None:
            logs |= self.gates.take_means(self.args.device, together=self.args.world_size > 1)
        super().log(logs, *args, **kwargs)
        if trained and is_far(self.state.log_history, PATIENCE):
            losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            self._stop(
                f"Expected a loss near {statistics.median(losses[:FIRST]):.3g}, as at the start, but at step "
                f"{self.state.global_step} it is {losses[-1]:.3g}, and the last {PATIENCE} logged ones are all above "
                f"{bound_of(losses):.3g}",
                self._batches,
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save as Trainer does, unless the loss is far from where it began; the last step is saved in any case."""
        if self.state.global_step >= self.state.max_steps or not is_far(self.state.log_history):
            super()._save_checkpoint(model, trial)

    def _stop(self, what: str, parts: list[Part], together: bool = False) -> None:
        """Keep some parts of this step and raise.

        Args:
            what: has happened.
            parts: to keep.
            together: whether all processes have come here.
        """
        try:
            kept = [
                self._keep(number, part)
                for number, part in enumerate(self._batches)
                if any(part is other for other in parts)
            ]
            where = f"its batch lies in {kept[0]}" if kept else f"that one keeps the batch in {self.run.stopped}"
        except OSError as error:
            where = f"its batch could not be kept ({error.strerror})"
        if together:  # the first process that ends takes the others with it, with what they have not kept
            highest(self, 0)
        raise CalmError(
            f"{what}; {where}: look at its rows, lower trainer.learning_rate or load the models in float32, then "
            f"{self.run.way_on()}."
        )

    def _keep(self, number: int, part: Part) -> Path:
        """Write a part of a step as safetensors, and as JSON for people."""
        (batch, loss), step = part, self._now + 1
        found = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}
        rank = f"-process-{self.args.process_index}" if self.args.world_size > 1 else ""
        numbered = f"-part-{number}" if len(self._batches) > 1 else ""
        name = f"step-{step}{rank}{numbered}"
        told = {"step": step, "process": self.args.process_index, "part": number, "loss": str(float(loss))}
        told |= {"rows": _rows(tensors, self.processing_class)}
        text = json.dumps(told, indent=1, ensure_ascii=False)
        write_together(
            self.run.stopped,
            {
                f"{name}.safetensors": lambda path: save_file(tensors, str(path)),
                f"{name}.json": text_writer(text),
            },
        )
        return self.run.stopped / f"{name}.safetensors"


def _rows(tensors: dict[str, Tensor], tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of a batch: their texts, and what of these is learned, without padding."""
    ids = tensors.get("input_ids")
    if ids is None:
        return []
    mask = tensors.get("attention_mask", torch.ones_like(ids)).bool()
    mask = mask if mask.shape == ids.shape else torch.ones_like(ids).bool()
    labels = tensors.get("labels", torch.full_like(ids, -100))
    rows = []
    for row, counted, learned in zip(ids, mask, labels, strict=True):
        own = {"ids": row[counted].tolist(), "learned": learned[learned >= 0].tolist()}
        if hasattr(tokenizer, "decode"):
            own |= {"text": tokenizer.decode(own["ids"]), "learned_text": tokenizer.decode(own["learned"])}
        rows.append(own)
    return rows
