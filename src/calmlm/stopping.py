"""Assisted generation that ends where decoding token by token ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer


class Gate(StoppingCriteria, BaseStreamer):
    """Between the loop of assisted generation and what its caller gave to end and to follow it.

    The loop accepts several tokens at once and asks for the end behind the last of them. The gate asks the caller's
    criteria about each, hands the tokens up to the end to the caller's streamer, and cuts off what was written after.

    Args:
        criteria: the caller's.
        streamer: the caller's, or None.
        start: length of the prompt.
    """

    def __init__(self, criteria: StoppingCriteriaList, streamer: BaseStreamer | None, start: int) -> None:
        self.criteria, self.streamer, self.length = criteria, streamer, start
        self.ended = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether the row has ended, (1,) bool."""
        first = self.length
        while self.length < input_ids.shape[1] and not self.ended:
            self.length += 1
            done = self.criteria(input_ids[:, : self.length], scores, **kwargs)
            self.ended = bool(done.all())
        if self.streamer is not None and self.length > first:
            self.streamer.put(input_ids[0, first : self.length].cpu())
        return torch.full((input_ids.shape[0],), self.ended, dtype=torch.bool, device=input_ids.device)

    def put(self, value: Tensor) -> None:
        """Nothing yet: it is not known where the text ends."""

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    def cut(self, output: Any) -> Any:
        """The output of generation without what was written after the end."""
        if isinstance(output, Tensor):
            return output[:, : self.length]
        beyond = output.sequences.shape[1] - self.length
        if beyond > 0:
            output.sequences = output.sequences[:, : self.length]
            for name in ("scores", "logits", "hidden_states", "attentions"):
                steps = getattr(output, name, None)
                if steps is not None:
                    setattr(output, name, steps[: len(steps) - beyond])
            if output.past_key_values is not None:
                output.past_key_values.crop(-beyond)
        return output


def cached_among(input_ids: Tensor, cache: Cache | None, mask: Tensor | None, generation_config: Any) -> int:
    """How many of the tokens ``input_ids`` (B, T) lie in the cache already."""
    total = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", None)
    past = cache.get_seq_length() if cache is not None else 0
    # Fewer tokens than the mask has columns: only the new ones were given.
    return past if total is None or total == input_ids.shape[1] else 0
