"""Assisted generation that ends where decoding token by token ends."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from calmlm.errors import DataError
from calmlm.state.cache import CalmCache


class Gate(StoppingCriteria, BaseStreamer):
    """Between the loop of assisted generation and what its caller gave to end and to follow it.

    The loop accepts several tokens at once and asks for the end behind the last of them. The gate asks the caller's
    criteria about each, hands the tokens up to the end to the caller's streamer, and cuts off what was written after,
    from the output and from the cache.

    Args:
        criteria: the caller's.
        streamer: the caller's, or None.
        start: length of the prompt.
        cache: the composition's; what the loop crops it by is put off until the gate knows the end.
        before: tokens that the cache holds from before the prompt.
    """

    def __init__(
        self,
        criteria: StoppingCriteriaList,
        streamer: BaseStreamer | None,
        start: int,
        cache: CalmCache,
        before: int,
    ) -> None:
        self.criteria, self.streamer, self.length, self.cache = criteria, streamer, start, cache
        self.before = before
        self.ended = False
        self.beyond = 0
        cache.hold()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether the row has ended, (1,) bool."""
        first = self.length
        while self.length < input_ids.shape[1] and not self.ended:
            self.length += 1
            later = input_ids.shape[1] - self.length
            known = scores[: len(scores) - later] if scores else scores
            self.ended = bool(self.criteria(input_ids[:, : self.length], known, **kwargs).all())
        self.beyond = input_ids.shape[1] - self.length
        self.cache.release(-self.beyond)
        if not self.ended:
            self.cache.hold()
        if self.streamer is not None and self.length > first:
            self.streamer.put(input_ids[0, first : self.length].cpu())
        return torch.full((input_ids.shape[0],), self.ended, dtype=torch.bool, device=input_ids.device)

    def put(self, value: Tensor) -> None:
        """Do nothing yet: the end of the text is not known."""

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    def close(self) -> None:
        """Let the cache follow the loop again, however it ended; rejected drafts are removed from it."""
        if self.cache.held is not None:
            over = int(self.cache.get_seq_length()) + self.cache.held - self.before - self.length
            self.cache.release(-max(0, over))

    def cut(self, output: Any) -> Any:
        """The output of generation without what was written after the end."""
        if isinstance(output, Tensor):
            return output[:, : self.length]
        output.sequences = output.sequences[:, : self.length]
        for name in ("scores", "logits", "hidden_states", "attentions"):
            steps = getattr(output, name, None)
            if steps is not None:
                setattr(output, name, steps[: len(steps) - self.beyond])
        return output


def positions_before(input_ids: Tensor, positions: Tensor | None) -> int:
    """At which position a text of one row begins, (1, T): behind what a cache holds already, less the padding in it."""
    return 0 if positions is None else int(positions[..., -1].max()) + 1 - input_ids.shape[1]


def check_new_tokens(new: int, input_ids: Tensor) -> None:
    """Raise unless some tokens of a text (B, T) are not in its cache yet.

    Raises:
        DataError: otherwise.
    """
    if new <= 0:
        raise DataError(
            f"past_key_values must hold fewer tokens than the text, but they hold {input_ids.shape[1] - new} and the "
            f"text has {input_ids.shape[1]}: pass the whole text, or the new tokens with the attention_mask of all of "
            f"it."
        )
