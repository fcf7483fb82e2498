"""Handing on what ``generate`` writes, as text, while it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from calmlm.tokens.transcript import Transcript

__all__ = ["TextEmitter"]


class TextEmitter(BaseStreamer):
    """A streamer for one text, which keeps the space that it may begin with.

    Args:
        tokenizer: of the model that writes.
        emit: takes each piece of text as soon as it is settled.
    """

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        self.tokenizer, self.emit = tokenizer, emit
        self._transcript: Transcript | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt's tokens, (1, T) or (T,), and then those that are written, in turn."""
        ids = value.reshape(-1).tolist()
        if self._transcript is None:
            self._transcript = Transcript(self.tokenizer, ids)
        else:
            self._hand_on("".join(self._transcript.add(token) for token in ids))

    def end(self) -> None:
        """Nothing follows; may be called more than once."""
        if self._transcript is not None:
            self._hand_on(self._transcript.finish())
            self._transcript = None

    def _hand_on(self, text: str) -> None:
        if text:
            self.emit(text)
