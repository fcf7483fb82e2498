"""The text of tokens as they come: whole characters only, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"
LEAD = 5  # tokens of the prompt behind which the text is written, so that a space at its beginning is kept


class Transcript:
    """What is written behind a prompt.

    Args:
        tokenizer: of the model that writes.
        prompt: the tokens that were given.
        stops: strings that end the text, and are no part of it.

    Attributes:
        text: what is settled.
        stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.text = ""
        self.stopped = False
        self._ids = list(prompt[-LEAD:])
        self._from, self._to = 0, len(self._ids)  # tokens whose text is known, behind which new ones are written
        self._before = self._decoded(self._to)
        self._given = 0  # characters of the new tokens that are read
        self._held = ""  # the beginning of a stop string, perhaps

    @property
    def length(self) -> int:
        """Characters so far, those that are not settled included."""
        return len(self.text) + len(self._held)

    def add(self, token: int) -> str:
        """One more token; returns the text that it settles."""
        self._ids.append(token)
        new = self._new()
        whole = new.rstrip(BROKEN)  # a character may still be incomplete
        fresh, self._given = whole[self._given :], max(self._given, len(whole))
        if fresh and whole == new:
            self._from, self._to = self._to, len(self._ids)
            self._before, self._given = self._decoded(self._to), 0
        return self._settle(fresh, end=False)

    def finish(self) -> str:
        """Nothing follows; returns the text that was held back."""
        return "" if self.stopped else self._settle(self._new()[self._given :], end=True)

    def _new(self) -> str:
        text = self._decoded(len(self._ids))
        if text.startswith(self._before):
            return text[len(self._before) :]
        # The prompt ended within a character, which is whole now.
        pairs = enumerate(zip(self._before, text, strict=False))
        return text[next((place for place, (one, other) in pairs if one != other), len(text)) :]

    def _decoded(self, end: int) -> str:
        ids = self._ids[self._from : end]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _settle(self, fresh: str, *, end: bool) -> str:
        text = self._held + fresh
        found = min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, settled, self._held = True, text[:found], ""
        elif end:
            settled, self._held = text, ""
        else:
            keep = max((_overlap(text, stop) for stop in self.stops), default=0)
            settled, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += settled
        return settled


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
