"""A learned router: m_B's state at the end of a prompt says which of the two models answers it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from calmlm.data.labels import encode_prompt
from calmlm.data.padding import padded_left
from calmlm.experiments.prompt_choice import Router, train_router
from calmlm.experiments.real.systems import Alone
from calmlm.experiments.real.world import Item

__all__ = ["Routed"]

T = TypeVar("T")
AT_ONCE = 16


class Routed:
    """m_B or m_A, each with its own examples.

    Args:
        ours: m_B, whose last state at a prompt's end the router looks at; text without a prompt is left to it.
        theirs: m_A.

    Attributes:
        router: its map starts at zero, where m_B answers everything.
    """

    hears = False

    def __init__(self, ours: Alone, theirs: Alone) -> None:
        self.ours, self.theirs = ours, theirs
        self.router = Router(ours.model, 2)

    def fit(self, items: Sequence[Item]) -> float:
        """Learn which model has the lower loss on these items; return the share that is sent to m_A."""
        losses = torch.tensor([self.ours.nats(items), self.theirs.nats(items)])
        train_router(self.router, self.states(items), losses.argmin(0))
        return sum(self.chosen(items)) / len(items)

    @torch.no_grad()
    def states(self, items: Sequence[Item]) -> Tensor:
        """m_B's last hidden state at the last token of each prompt, (items, D_B) float32."""
        ids = [encode_prompt(item.prompt, self.ours.tokenizer) for item in items]
        found = torch.zeros(len(items), self.router.score.in_features)
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for start in range(0, len(order), AT_ONCE):
            chosen = order[start : start + AT_ONCE]
            width = len(ids[chosen[-1]])
            batch = padded_left([ids[i] for i in chosen], width, self.ours.pad, self.ours.model.device)
            found[chosen] = self.router.states(**batch).cpu()
        return found

    @torch.no_grad()
    def chosen(self, items: Sequence[Item]) -> list[bool]:
        """Whether m_A answers, for each item."""
        asked = [index for index, item in enumerate(items) if item.prompt]
        found = [False] * len(items)
        if asked:
            states = self.states([items[index] for index in asked]).to(self.router.score.weight.device)
            for index, choice in zip(asked, self.router.score(states).argmax(-1).tolist(), strict=True):
                found[index] = bool(choice)
        return found

    def nats(self, items: Sequence[Item], swapped: bool = False) -> list[float]:
        """Each target's negative log-probability by the model that is chosen."""
        return self._sent(items, lambda system, own: system.nats(own))

    def write(self, items: Sequence[Item], new_tokens: int) -> list[str]:
        """What the chosen model answers."""
        return self._sent(items, lambda system, own: system.write(own, new_tokens))

    def _sent(self, items: Sequence[Item], ask: Callable[[Alone, list[Item]], list[T]]) -> list[T]:
        """What each item's model makes of it; each model is asked once."""
        chosen = self.chosen(items)
        parts = {
            choice: iter(ask(system, [item for item, own in zip(items, chosen, strict=True) if own == choice]))
            for choice, system in ((False, self.ours), (True, self.theirs))
        }
        return [next(parts[choice]) for choice in chosen]
