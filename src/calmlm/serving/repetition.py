"""Drafts for one text: what followed where the text said the same before."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from calmlm.decoding.drafting import DraftConfig, DraftLength, DraftStatistics

NGRAM = 3  # tokens by which a place is known again, at most


class Lookup:
    """Drafts for one text, which get shorter, down to none, while few of their tokens are written.

    Args:
        most: tokens at a time.
    """

    def __init__(self, most: int) -> None:
        doubt = DraftStatistics(recent_accepted=1.0, recent_tried=2.0)  # most texts do not repeat themselves
        self._length = DraftLength(DraftConfig(num_tokens=most, statistics=doubt), cost=0.0)

    def propose(self, ids: Sequence[int], room: int) -> list[int]:
        """At most ``room`` tokens that may follow."""
        most = min(room, self._length.next())
        if most < 1:
            return []
        # Its max_length is a place in the text that it copies from.
        generator = PromptLookupCandidateGenerator(
            num_output_tokens=most, max_matching_ngram_size=NGRAM, max_length=sys.maxsize
        )
        return generator.get_candidates(torch.tensor([list(ids)]))[0][0, len(ids) :].tolist()

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of how many tokens of a draft were written."""
        self._length.learn(drafted, accepted)
