"""What keeps the anchor's skills: on general text, the composition is held to what the anchor alone predicts.

The loss is the mean over positions of KL(anchor || composition), in nats. The anchor is the composition itself,
switched off, so that no second model is in memory.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calmlm.data.padding import padded

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

__all__ = ["Retained", "RetainingTrainer", "divergence"]


class Retained:
    """General text for the loss.

    Args:
        rows: token ids of its lines.
        weight: of the loss beside that of the data.
        lines: how many are read with each batch, in parts of a batch as well.
        positions: how many of a line's columns are compared, drawn anew each time.
        pad: the padding token.
        seed: of the order and the columns; a resumed run goes on with the same ones.
    """

    def __init__(
        self, rows: Sequence[list[int]], weight: float, lines: int, positions: int, pad: int, seed: int
    ) -> None:
        self.rows = [row for row in rows if len(row) > 1]
        self.weight, self.lines, self.positions = weight, lines, positions
        self.pad, self.seed = pad, seed
        self._pass: tuple[int, list[int]] = (-1, [])

    def batch(self, number: int) -> tuple[dict[str, Tensor], Tensor]:
        """The lines of the batch with this number, and the columns that are compared, (K,) int64.

        Each pass over the text has an order of its own.
        """
        chosen = []
        for place in range(number * self.lines, (number + 1) * self.lines):
            around, index = divmod(place, len(self.rows))
            chosen.append(self.rows[self._order(around)[index]])
        width = max(map(len, chosen))
        ids, mask = padded(chosen, self.pad), padded([[1] * len(row) for row in chosen], 0)
        columns = sorted(
            random.Random(f"{self.seed}-{number}-columns").sample(range(width), min(width, self.positions))
        )
        return {"input_ids": ids, "attention_mask": mask}, torch.tensor(columns)

    def rows_read(self, batches: int) -> list[dict[str, list[int]]]:
        """As many of the lines as so many batches read; which ones is settled when they do."""
        return [{"input_ids": row} for row in self.rows[: batches * self.lines]]

    def _order(self, around: int) -> list[int]:
        """The order of a pass, drawn when it begins: there may be millions of lines."""
        if self._pass[0] != around:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed}-{around}").shuffle(order)
            self._pass = around, order
        return self._pass[1]


def divergence(model: nn.Module, bare: Any, batch: dict[str, Tensor], columns: Tensor) -> Tensor:
    """Mean KL(anchor || composition) at some columns, in nats.

    Args:
        model: the composition, as the trainer has wrapped it.
        bare: the composition itself.
        batch: ``input_ids`` and ``attention_mask``, (B, T) int64, padded on the right.
        columns: (K,) int64.
    """
    given = {**batch, "logits_to_keep": columns, "use_cache": False}
    with torch.no_grad(), bare.disable_composition():
        expected = bare(**given).logits.float().log_softmax(-1)
    found = model(**given).logits.float().log_softmax(-1)
    counted = batch["attention_mask"][:, columns].bool()
    return nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1)[counted].mean()


class RetainingTrainer(Trainer):
    """Adds the loss on general text; stands before ``Trainer``, or a subclass of it, in a class of both.

    Attributes:
        retained: the text; None for none.
    """

    retained: Retained | None = None
    _step, _part = -1, 0

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **more: Any
    ) -> Any:
        """The loss of the data, and that of general text beside it while the model trains."""
        found = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **more
        )
        if self.retained is None or not model.training:
            return found
        loss = found[0] if return_outputs else found
        parts = self.args.gradient_accumulation_steps
        if self.state.global_step != self._step:
            self._step, self._part = self.state.global_step, 0
        number = (self._step * parts + self._part) * self.args.world_size + self.args.process_index
        self._part += 1
        batch, columns = self.retained.batch(number)
        batch = {name: tensor.to(loss.device) for name, tensor in batch.items()}
        more_loss = divergence(model, self.accelerator.unwrap_model(model), batch, columns.to(loss.device))
        # Where Trainer was told how many labels the whole batch has, the parts' losses add up: of the last batch of an
        # epoch there may be fewer.
        share = 1 / self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1.0
        loss = loss + self.retained.weight * share * more_loss
        return (loss, *found[1:]) if return_outputs else loss
