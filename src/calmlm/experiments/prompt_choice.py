"""A linear map of a model's state at the end of a prompt, by which one of several models is chosen to answer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calmlm.bases.families import counted
from calmlm.bases.structure import accepts

__all__ = ["Router", "positions", "train_router"]

STEPS = 300
RIDGE = 1e-3


class Router(nn.Module):
    """``argmax(W h + b)``, where h is the anchor's last hidden state at the last token of the prompt.

    Args:
        anchor: reads the prompt.
        choices: how many models there are.
    """

    def __init__(self, anchor: Any, choices: int) -> None:
        super().__init__()
        self.anchor = anchor
        self.score = nn.Linear(anchor.config.get_text_config(decoder=True).hidden_size, choices).to(anchor.device)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """What it looks at, (B, D_B) float32; prompts are padded on the left."""
        output = self.anchor(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=True,
            **positions(self.anchor, attention_mask),
        )
        return output.hidden_states[-1][:, -1].float()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Indices of the chosen models, (B,)."""
        return self.score(self.states(input_ids, attention_mask)).argmax(-1)


def train_router(router: Router, states: Tensor, better: Tensor, steps: int = STEPS) -> None:
    """Fit the linear map by logistic regression.

    Args:
        router: its ``score`` is changed.
        states: (rows, D_B).
        better: (rows,) int64, which model is better on each row.
        steps: of L-BFGS, at most.
    """
    with torch.enable_grad():
        optimizer = torch.optim.LBFGS(router.score.parameters(), max_iter=steps, line_search_fn="strong_wolfe")
        states, better = states.to(router.score.weight.device), better.to(router.score.weight.device)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(router.score(states), better)
            loss = loss + RIDGE * router.score.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)


def positions(model: Any, attention_mask: Tensor) -> dict[str, Any]:
    """The positions of prompts that are padded on the left, for a model that takes any; most count the padding."""
    if not accepts(model, "position_ids"):
        return {}
    return {"position_ids": counted(attention_mask, attention_mask)}
