"""An ingestor without training: what the augmenting model would say, in the anchor's own input embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class AnchorIngestor(nn.Module):
    """The expected input embedding of the augmenting model's next token, which an anchor can read from the first step.

    ::

        E = sum_{v' in top-k} p_A(v') E_B[first(v')] / sum_{v' in top-k} p_A(v')

    first(v') is the anchor's first token of the bytes of v'. Tokens without one have no part in the top k. E_B is asked
    at each call and is no part of this module, so that nothing of the anchor is copied or saved.

    Args:
        tokens: first(v') of each augmenting token, (V_A,) int64; -1 where there is none, but not everywhere.
        top_k: k.
    """

    tokens: Tensor

    def __init__(self, tokens: Tensor, top_k: int) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens, persistent=False)
        self.top_k = min(top_k, len(tokens))

    def forward(self, logits: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Embed distributions.

        Args:
            logits: of the augmenting model, (..., V_A).
            embed: the anchor's input embeddings, from ids (...) to (..., D).

        Returns:
            (..., D) float32, on the device of the embeddings.
        """
        tokens = self.tokens.to(logits.device)
        best, chosen = logits.masked_fill(tokens < 0, -torch.inf).topk(self.top_k, dim=-1)
        shares, ids = best.float().softmax(-1), tokens[chosen].clamp(min=0)
        # One rank after another: all vectors of a long text at once would take k times the memory.
        found = embed(ids[..., 0]).float()
        found = found * shares[..., :1].to(found.device)
        for rank in range(1, self.top_k):
            found = found + shares[..., rank, None].to(found.device) * embed(ids[..., rank]).float()
        return found
