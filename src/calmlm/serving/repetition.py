"""Drafts for one text: what followed where the text said the same before."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from calmlm.decoding.drafting import DraftConfig, DraftLength, DraftStatistics

LEAST, MOST = 2, 3  # tokens by which a place is known again


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
        text = torch.tensor(ids)
        most = min(room, self._length.next()) if _repeats(text) else 0
        if most < 1:
            return []
        # Its max_length is a place in the text that it copies from.
        generator = PromptLookupCandidateGenerator(
            num_output_tokens=most, max_matching_ngram_size=MOST, max_length=sys.maxsize
        )
        return generator.get_candidates(text[None])[0][0, len(ids) :].tolist()

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of how many tokens of a draft were written."""
        self._length.learn(drafted, accepted)


def _repeats(text: torch.Tensor) -> bool:
    """Whether the last tokens of a text (T,) stand in it before."""
    if len(text) <= LEAST:
        return False
    return bool((text.unfold(0, LEAST, 1)[:-1] == text[-LEAST:]).all(1).any())
