"""Drafts by an augmenting model that reads the text in tokens of its own.

It writes on in its own tokens, greedily, and their text is proposed in the anchor's. So a draft has no probabilities
over the anchor's tokens: the composition draws each token itself, and a proposed one stays where it is the one that was
drawn (as with prompt lookup). That keeps what greedy decoding writes, and the distribution of sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calmlm.decoding.drafting import Drafter, Drafts
from calmlm.decoding.limits import DraftLimits
from calmlm.modeling import CalmModel
from calmlm.readers import OwnReader

__all__ = ["OwnDrafts"]

_TWICE = 2.0
"""What is drafted is read again for the connections, whose states belong to the anchor's tokens."""


class OwnDrafts(Drafts):
    """Drafts by a model with ``alignment="own"``.

    Args:
        model, drafter, limits: see ``Drafts``.
    """

    def __init__(self, model: CalmModel, drafter: Drafter, limits: DraftLimits) -> None:
        super().__init__(model, drafter, limits, cost=_TWICE)
        reader = model.reader(drafter.name)
        assert isinstance(reader, OwnReader)
        self.reader = reader

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """Draft.

        Args:
            input_ids: (1, T), the text so far.

        Returns:
            the text with the draft behind it, (1, T + k), and None.
        """
        text = input_ids.shape[1]
        seen = self.cache.get_seq_length() - self.limits.before
        limit = min(self.length.next(), self.limits.room(text, seen))
        self.drafted = 0
        # A prompt is read by the composition first: the model would read all of it twice.
        if limit <= 0 or text - seen != 1:
            return input_ids, None
        past = self.cache.part(self.name)
        said = self.reader.draft(input_ids[:, seen:], past, limit, self.settings.confidence)
        assert self.reader.transcoder is not None
        proposed = self.reader.transcoder.respelling(said)[:limit]
        ids = torch.cat((input_ids, input_ids.new_tensor([proposed])), dim=1) if proposed else input_ids
        self.drafted = self.limits.readable(ids, text)
        return ids[:, : text + self.drafted], None
