"""A learned router: the anchor reads the prompt, and a linear map of its state says which model answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calmlm.baselines.choosing import Routed
from calmlm.baselines.given import Bases, Budget, Data, batches_of, losses_of, row_losses
from calmlm.data.padding import padded_left
from calmlm.experiments.fitting import IGNORED, Row
from calmlm.experiments.prompt_choice import Router, train_router

__all__ = ["fit", "prompts_of", "read"]


def prompts_of(rows: list[Row], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """The prompts of rows (what stands before the first label), padded on the left: ids and mask."""
    # A model has to be given one token at least, of an example without a prompt as well.
    begins = [next(i for i, label in enumerate(row["labels"]) if label != IGNORED) for row in rows]
    prompts = [row["input_ids"][: max(1, begin)] for row, begin in zip(rows, begins, strict=True)]
    batch = padded_left(prompts, max(map(len, prompts)), pad, device)
    return batch["input_ids"], batch["attention_mask"]


@torch.no_grad()
def read(router: Router, rows: list[Row], pad: int) -> tuple[Tensor, Tensor]:
    """What the router looks at on each row's prompt, (rows, D_B), and the anchor's losses on the rows, (rows,).

    One pass gives both: the state at a prompt's last token knows nothing of what follows it.
    """
    anchor = router.anchor
    states = torch.zeros(len(rows), router.score.in_features)
    losses = torch.zeros(len(rows))
    for indices, batch in batches_of(anchor, rows, pad, 64):
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        output = anchor(**given, output_hidden_states=True)
        last = ((batch["labels"] != IGNORED).int().argmax(1) - 1).clamp(min=0)
        states[indices] = output.hidden_states[-1][torch.arange(len(last)), last].float().cpu()
        losses[indices] = row_losses(output.logits, batch["labels"]).cpu()
    return states, losses


def fit(bases: Bases, data: Data, budget: Budget) -> Routed:
    """Learn on D_C which of m_B and m_A has the lower loss on the completion."""
    rows, pad = data.composition, bases.tokenizer.pad_token_id
    models = [bases.anchor, bases.augmenting]
    router = Router(bases.anchor, len(models))
    with budget.meter.counting():
        states, ours = read(router, rows, pad)
        losses = torch.stack([ours, losses_of(bases.augmenting, rows, pad)])
    train_router(router, states, losses.argmin(0))
    budget.meter.trainable = sum(parameter.numel() for parameter in router.score.parameters())
    return Routed(models, router)
