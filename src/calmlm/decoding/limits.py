"""Where a draft has to end: no model may receive a token or a position that it does not have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.generation.candidate_generator import CandidateGenerator

from calmlm.modeling import CalmModel
from calmlm.readers import AlignedReader, OwnReader
from calmlm.state.cache import CalmCache
from calmlm.state.longrope import room_before_turn


@dataclass(frozen=True)
class DraftLimits:
    """What a draft of one row may hold.

    Attributes:
        model: the composition.
        cache: its cache, followed as it grows.
        before: tokens that the cache holds from before the text that generation started from.
        max_length: of the text with the draft and the token behind it.
        turns: lengths beyond which no draft may reach from a shorter text.
    """

    model: CalmModel
    cache: CalmCache
    before: int
    max_length: int
    turns: list[int]

    def room(self, text: int, cached: int = 0) -> int:
        """How many tokens may be drafted behind a text of so many tokens, ``cached`` of them read."""
        room = self.max_length - 1 - text
        until_turn = room_before_turn(self.turns, text, cached)
        return room if until_turn is None else min(room, until_turn)

    def readable(self, ids: Tensor, text: int) -> int:
        """How many of the drafted tokens ``ids[:, text:]`` (1, k) every model knows and has positions for."""
        count = ids.shape[1] - text
        unknown = (ids[0, text:] >= self.model.abilities.shared_ids).nonzero()
        if len(unknown):
            count = int(unknown[0])
        unread = self.cache.get_seq_length() - self.before
        for name in self.model.active:
            reader = self.model.reader(name)
            if isinstance(reader, (AlignedReader, OwnReader)) and count > 0:
                ends = reader.room(ids[:, unread : text + count], self.cache.part(name))
                count = min(count, unread + ends - text)
        return max(0, count)


class Bounded(CandidateGenerator):
    """Another generator's drafts, cut off where ``limits`` ask for it.

    Sampling keeps its distribution: an id that a draft may not hold gets no probability in its scores, so that a token
    that stays was drawn from what is left, and behind the place of one that does not stay nothing was proposed. (At the
    last positions of an augmenting model with tokens of its own, what still fits depends on the token that is drafted.)
    """

    def __init__(self, generator: CandidateGenerator, limits: DraftLimits) -> None:
        self.generator, self.limits = generator, limits
        self.requires_model_outputs = generator.requires_model_outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        ids, scores = self.generator.get_candidates(input_ids, **kwargs)
        text, known = input_ids.shape[1], self.limits.model.abilities.shared_ids
        ids = ids[:, : text + max(0, min(ids.shape[1] - text, self.limits.room(text)))]
        count = self.limits.readable(ids, text)
        if scores is not None and scores.shape[-1] > known:
            scores = scores.clone()
            scores[..., known:] = float("-inf")
        return ids[:, : text + count], scores[:, :count] if scores is not None and count else None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        self.generator.update_candidate_strategy(input_ids, scores, num_matches)
        settings = getattr(getattr(self.generator, "assistant_model", None), "generation_config", None)
        if getattr(settings, "num_assistant_tokens_schedule", None) == "heuristic":
            # transformers keeps the length that an assistant has arrived at, for generators that it knows.
            settings.num_assistant_tokens = self.generator.num_assistant_tokens  # type: ignore[union-attr]
