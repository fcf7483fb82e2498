"""A model that lets each prompt be answered by one of several models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Chooser", "Routed"]


class Chooser(Protocol):
    """Says which model answers each prompt."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """From prompts (B, T) to indices of models, (B,) int64."""
        ...


class Routed:
    """Several models and what chooses among them; generates like one model.

    Args:
        models: they share a tokenizer.
        choose: says which of them answers each prompt.
    """

    def __init__(self, models: Sequence[Any], choose: Chooser) -> None:
        self.models, self.choose = list(models), choose

    @property
    def device(self) -> torch.device:
        """Where prompts have to be."""
        return self.models[0].device

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Each row by its model; rows that end sooner are padded on the right."""
        chosen = self.choose(input_ids, attention_mask)
        rows: dict[int, Tensor] = {}
        for index, model in enumerate(self.models):
            places = (chosen == index).nonzero()[:, 0]
            if len(places):
                written = model.generate(input_ids=input_ids[places], attention_mask=attention_mask[places], **options)
                rows |= dict(zip(places.tolist(), written, strict=True))
        width = max(len(row) for row in rows.values())
        pad = options.get("pad_token_id") or 0
        out = input_ids.new_full((len(input_ids), width), pad)
        for place, row in rows.items():
            out[place, : len(row)] = row
        return out
